"""What the pages show works: every Python block runs, commands name options that exist, arguments are all described."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest

import sb3_trpo_ext
from sb3_trpo_ext import KLPPOExt, NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer, distributions
from sb3_trpo_ext.algorithms.base import OnPolicyExt
from sb3_trpo_ext.compat import TRPO
from sb3_trpo_ext.sampling.snapshot.adapters import _BY_CLASS
from sb3_trpo_ext.zoo.__main__ import VERBS

ROOT = Path(sb3_trpo_ext.__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_ext"))

from inherited_arguments import with_all_arguments, without_description  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
NOT_FOR_TESTS = {"vine.md": "class Tank(gym.Env):"}
"""Blocks that show part of a class, by page: how they begin."""


def blocks(page):
    shown = PYTHON.findall(page.read_text())
    return [block for block in shown if not block.startswith(NOT_FOR_TESTS.get(page.name, "\0"))]


@pytest.fixture(autouse=True)
def _warnings_that_the_pages_may_give():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"this learn\(\) has made no step: it was one rollout long", UserWarning)
        yield


@pytest.fixture
def one_rollout(monkeypatch):
    """Training ends after its first rollout."""
    learn = OnPolicyExt.learn
    monkeypatch.setattr(OnPolicyExt, "learn", lambda self, _, *args, **kwargs: learn(self, 1, *args, **kwargs))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_code_runs_from_top_to_bottom(page, one_rollout, monkeypatch, tmp_path):
    if "onnx" in page.read_text():
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    known = dict(_BY_CLASS)
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))
    scope = {"__name__": "page"}
    try:
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), scope)
    finally:
        if isinstance(model := scope.get("model"), OnPolicyExt) and hasattr(model, "_logger"):
            model.logger.close()
        _BY_CLASS.clear()
        _BY_CLASS.update(known)


OPTION = re.compile(r"(?<=\s)-{1,2}[a-zA-Z][\w-]*")
ZOO = Path(__import__("rl_zoo3").__file__).parent
SOURCES = {
    "zoo train": [ZOO / "train.py"],
    "zoo enjoy": [ZOO / "enjoy.py"],
    "zoo record_video": [ZOO / "record_video.py"],
    "zoo plot_train": [ZOO / "plots" / "plot_train.py"],
    "zoo all_plots": [ZOO / "plots" / "all_plots.py"],
    "zoo plot_from_file": [ZOO / "plots" / "plot_from_file.py"],
    "plots": [ROOT / "sb3_trpo_ext" / "plots.py"],
    "lab": [ROOT / "sb3_trpo_ext" / "lab" / "__main__.py"],
}
"""Who reads the options of a command."""


def commands():
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"python -m sb3_trpo_ext\.(zoo \w+|plots|lab)(.*)", line.partition("  #")[0])
                if found and language in ("", "sh"):
                    yield page.name, found[1], found[2]


def test_commands_name_verbs_and_options_that_exist():
    seen = set()
    for page, program, rest in commands():
        assert program in SOURCES, f"{page}: {program}"
        seen.add(program)
        source = "".join(path.read_text() for path in SOURCES[program])
        for option in OPTION.findall(rest):
            assert f'"{option}"' in source, f"{page}: {program} {option}"
    assert seen == set(SOURCES) and {f"zoo {verb}" for verb in VERBS} <= seen


# -- the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TRPOExt, NPGExt, KLPPOExt, TRPO, VineRolloutBuffer, SnapshotWrapper])
def test_each_argument_is_described(cls):
    assert without_description(cls) == set()


def test_the_reference_lists_what_is_inherited_with_the_default_that_holds():
    listed = with_all_arguments(KLPPOExt, KLPPOExt.__doc__.splitlines())
    (learning_rate,) = [line for line in listed if line.startswith(":param learning_rate:")]
    assert learning_rate.endswith("Default: ``0.0003``")
    text = "\n".join(listed)
    assert ":param chunk_size:" in text and ":param initial_std:" in text
    assert listed.index(learning_rate) < text.splitlines().index(next(line for line in listed if ":param chunk_size" in line))


def test_pages_say_whom_they_are_for():
    for page in [*(DOCS / "guide").glob("*.md"), *(DOCS / "reference").glob("*.md")]:
        assert page.read_text().splitlines()[2].startswith("*For who"), page.name


# -- the first page ------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = pytest.mark.skipif(not RESULTS.exists(), reason="the source archive comes without results")
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?")


def test_the_readme_fits_one_screen_or_two():
    prose = re.sub(r"```.*?```|\]\([^)]*\)|`[^`]*`", "", README, flags=re.DOTALL)
    assert len(README.splitlines()) <= 120
    assert len(NUMBER.findall(prose)) <= 40


@MEASURED
def test_the_readme_gives_the_speeds_that_were_measured():
    measured = json.loads((RESULTS / "throughput.json").read_text())["end_to_end"]
    ratio = {entry["name"]: f"{entry['ratio']['median']:.1f}" for entry in measured}
    cheetah, cartpole, eight = (
        ratio[f"learn(), {name}"] for name in ("HalfCheetah-v5, n_envs=1", "CartPole-v1, n_envs=1", "HalfCheetah-v5, n_envs=8")
    )
    assert f"HalfCheetah-v5 {cheetah}, with eight environments {eight}, CartPole-v1 {cartpole}" in README
    assert f"run {min(eight, cheetah, cartpole)} to {max(eight, cheetah, cartpole)} times as fast" in README


@MEASURED
def test_the_readme_and_the_site_give_the_scores_of_the_report():
    report, page = (RESULTS / "learning" / "report.md").read_text(), (DOCS / "benchmarks.md").read_text()
    goals = report.partition("### Goals")[2]
    zoo, norm = (re.search(rf"{what}[^|]*\| +(\S+ \[.*?\])", goals)[1] for what in ("Zoo files: IQM", "defaults, normalised"))
    as_theirs = re.search(r"initial spread as theirs, normalised observations: (\S+) \[", page)[1]
    for text in (README, page):
        assert zoo in text and norm in text and as_theirs in text


@MEASURED
def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        if "{include}" in page.read_text():
            continue
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
