"""The runs that are kept in the repository, and what the page and the report say of them."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from _learning_report import PAGE_MARKS, index, report
from _results import DEFAULT_NORM, GROUPS, ZOO, Results
from _runs import outdated, path_of, read_all
from _settings import BUDGETS, setting_of

from sb3_trpo_ext import TRPOExt

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "learning"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the source archive comes without results")
ENV_IDS = GROUPS["MuJoCo"]
PAGE = "docs/benchmarks.md"


@pytest.fixture(scope="module")
def runs():
    return read_all(FOLDER)


@pytest.fixture(scope="module")
def results(runs):
    return Results(runs, range(10))


def test_they_are_of_the_present_settings(runs):
    named = {path_of(FOLDER, *(run.about[key] for key in ("algorithm", "env", "seed"))) for run in runs}
    assert named == set(FOLDER.glob("*/*/*.csv"))
    found = {(run.about["algorithm"], run.about["env"], changed) for run in runs for changed in outdated(run)}
    assert found == set()


def test_the_index_is_of_them(runs):
    assert json.loads((FOLDER / "index.json").read_text()) == json.loads(json.dumps(index(runs)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``report --page`` makes of them now, in a folder of its own, with short bootstraps."""
    root = tmp_path_factory.mktemp("made")
    folder = root / FOLDER.relative_to(ROOT)
    for path in FOLDER.glob("*/*/*.csv"):
        copy = folder / path.relative_to(FOLDER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (root / PAGE).parent.mkdir()
    (root / PAGE).write_text("".join(PAGE_MARKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("_scores.REPEATS", 50)
        patch.setattr("_learning_report.draw_all", lambda _, into: [into / name for name in PICTURES])
        report(argparse.Namespace(folder=folder, seeds=range(10), page=root / PAGE, quick=False))
    return root


PICTURES = ("mujoco-zoo.png", "mujoco-default.png", "classic-zoo.png", "profiles.png")
"""In the order in which they are drawn."""
INTERVAL = re.compile(r" \[[^]]*, [^]]*\](?!\()")


def without_intervals(text):
    """As words, for tables are as wide as their longest cell; a link in brackets is none."""
    return [INTERVAL.sub("", re.sub("-{2,}", "--", " ".join(line.split()))) for line in text.splitlines()]


def test_the_report_is_of_them(made):
    kept, now = ((root / FOLDER.relative_to(ROOT) / "report.md").read_text() for root in (ROOT, made))
    assert without_intervals(kept) == without_intervals(now)
    assert {path.name for path in FOLDER.glob("*.png")} == set(PICTURES)


def test_the_page_is_of_them(made):
    begin, end = PAGE_MARKS
    kept, now = ((root / PAGE).read_text().partition(begin)[2].partition(end)[0] for root in (ROOT, made))
    assert without_intervals(kept) == without_intervals(now)


def test_intervals_are_about_those_of_a_bootstrap_by_hand(results):
    rng, random = np.random.default_rng(0), results.random(ENV_IDS)
    for pair, page in ((ZOO, PAGE), (DEFAULT_NORM, "benchmarks/results/learning/report.md")):
        finals = [results.finals(name, ENV_IDS) for name in pair[1:]]
        drawn = []
        for _ in range(2000):
            rows = [rng.integers(len(side), size=side.shape) for side in finals]
            ours, theirs = (np.take_along_axis(side, row, axis=0) for side, row in zip(finals, rows, strict=True))
            scores = np.sort(((ours - random) / (theirs.mean(axis=0) - random)).ravel())
            cut = len(scores) // 4
            drawn.append(scores[cut : len(scores) - cut].mean())
        text = (ROOT / page).read_text().partition(f"### MuJoCo, {pair.title}\n" if page != PAGE else PAGE_MARKS[0])[2]
        low, high = re.search(r"interquartile mean of normalised scores: [\d.]+ \[([\d.]+), ([\d.]+)\]", text).groups()
        np.testing.assert_allclose([float(low), float(high)], np.percentile(drawn, [2.5, 97.5]), atol=0.03)


def test_the_guide_spells_out_the_setting_of_hopper():
    blocks = (ROOT / "docs" / "guide" / "zoo.md").read_text().split("```python\n")[1:]
    (block,) = [text for block in blocks if "VecNormalize(" in (text := block.partition("```")[0])]
    names = {"TRPOExt": TRPOExt}
    exec(block.partition("model.learn(1_000_000)")[0], names)
    model, env, setting = names["model"], names["env"], setting_of("trpo_ext_zoo", "Hopper-v5")
    assert "model.learn(1_000_000)" in block and BUDGETS["Hopper-v5"] == 1_000_000
    assert env.num_envs == setting.n_envs and setting.normalize.keys() <= {"gamma", "norm_obs", "norm_reward"}
    assert all(getattr(env, key) == value for key, value in setting.normalize.items()) and env.norm_obs and env.norm_reward
    other = TRPOExt(env=env, **setting.arguments)
    for name in ("n_steps", "gamma", "gae_lambda", "critic", "critic_steps", "cg_damping", "cg_max_steps", "seed"):
        assert getattr(model, name) == getattr(other, name), name
    assert [model.target_kl(progress) for progress in (1.0, 0.3)] == [other.target_kl(progress) for progress in (1.0, 0.3)]
