"""The runs that are kept in the repository, and what README and report say of them."""

import json
from pathlib import Path

import pytest
from _learning_report import HEADER, environment_row, index
from _results import GROUPS, PAIRS, Results
from _runs import BUDGETS, outdated, path_of, read_all, setting_of
from _scores import interquartile_mean

from sb3_trpo_ext import TRPOExt

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "learning"
ENV_IDS = GROUPS["MuJoCo"]


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


@pytest.mark.parametrize(
    ("page", "title"), [(ROOT / "README.md", "### Learning curves"), (FOLDER / "report.md", f"### MuJoCo, {PAIRS[0].title}")]
)
def test_tables_are_of_them(results, page, title):
    lines = page.read_text().partition(title)[2].splitlines()
    chance = HEADER.index("P(improvement)")  # the one column that takes a long bootstrap
    for env_id in ENV_IDS:
        row = next(line for line in lines if line.startswith(f"| {env_id} "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        made = environment_row(results, PAIRS[0], env_id, results.together(PAIRS[0], env_id, ENV_IDS))
        assert cells[:chance] + cells[chance + 1 :] == made[:chance] + made[chance + 1 :]


IQM = "- interquartile mean of normalised scores: "


@pytest.mark.parametrize(
    ("pair", "page", "before"),
    [
        (PAIRS[0], "README.md", ("### Learning curves", IQM)),
        (PAIRS[2], "README.md", (f"{PAIRS[2].title}: ",)),
        *((pair, "benchmarks/results/learning/report.md", (f"### MuJoCo, {pair.title}\n", IQM)) for pair in PAIRS[::2]),
    ],
)
def test_means_of_scores_are_of_them(results, pair, page, before):
    said = (ROOT / page).read_text()
    for mark in before:
        said = said.partition(mark)[2]
    finals = [results.finals(name, ENV_IDS) for name in pair[1:]]
    assert said.startswith(f"{interquartile_mean(*finals, results.random(ENV_IDS)):.2f} [")


def test_the_readme_spells_out_the_setting_of_hopper():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
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
