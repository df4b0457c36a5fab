"""One policy update against the installed sb3_contrib.TRPO, from the same buffer and parameters."""

import copy
import inspect
from functools import partial

import pytest
import torch as th
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.compat import TRPO as CompatTRPO
from tests.cases import ACTION_SPACES
from tests.envs import Walk, limited


def actor(model):
    return th.cat([p.detach().clone().flatten() for name, p in model.policy.named_parameters() if "value" not in name])


def full_step_of_sb3_contrib(model):
    """The first candidate of the line search, whether it is accepted or not."""
    before, seen = actor(model), []
    get_distribution = model.policy.get_distribution

    def spy(observations):
        seen.append(actor(model))
        return get_distribution(observations)

    model.policy.get_distribution = spy
    model.train()
    # called for the old distribution, the new one, and then once for each candidate
    return seen[2] - before


def full_step_of_ours(model):
    before = actor(model)
    model.train()
    return (actor(model) - before) / model.report.fraction


AS_THEIRS = dict(kl_reduction="mean", critic="adam", line_search_accept_ratio=0.0)


@pytest.mark.parametrize("ours", [partial(TRPOExt, **AS_THEIRS), CompatTRPO], ids=["TRPOExt", "compat.TRPO"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("space", ACTION_SPACES)
def test_an_update_is_that_of_sb3_contrib(space, seed, ours):
    arguments = dict(n_steps=512, batch_size=128, seed=seed, device="cpu", target_kl=0.01)
    env = DummyVecEnv([lambda: limited(Walk(ACTION_SPACES[space]))] * 2)
    theirs = TRPO("MlpPolicy", env, **arguments)
    theirs.learn(1024)  # away from the start
    _, callback = theirs._setup_learn(1024)
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, 512)
    ours = ours("MlpPolicy", env, **arguments)
    ours.set_parameters(theirs.get_parameters())
    ours.rollout_buffer = copy.deepcopy(theirs.rollout_buffer)
    for model in (theirs, ours):
        model.set_logger(Logger(folder=None, output_formats=[]))
    a, b = full_step_of_sb3_contrib(theirs), full_step_of_ours(ours)
    assert float(a @ b / (a.norm() * b.norm())) >= 0.9999
    assert float(b.norm() / a.norm()) == pytest.approx(1.0, abs=0.01)


def test_a_script_of_theirs_starts_from_their_weights():
    arguments = ("MlpPolicy", "Pendulum-v1", 2e-3, 256, 64, 0.98, 10, 0.2)  # by position, as a script may have them
    theirs, ours = (cls(*arguments, target_kl=0.02, seed=3, device="cpu") for cls in (TRPO, CompatTRPO))
    for a, b in zip(theirs.policy.state_dict().items(), ours.policy.state_dict().items(), strict=True):
        assert a[0] == b[0] and th.equal(a[1], b[1])
    have_one_value(theirs, ours)


def test_the_arguments_of_sb3_contrib_come_first_with_their_defaults():
    theirs, ours = (inspect.signature(cls).parameters for cls in (TRPO, CompatTRPO))
    assert list(ours)[: len(theirs)] == list(theirs)
    have_one_value(*(cls("MlpPolicy", "Pendulum-v1", device="cpu") for cls in (TRPO, CompatTRPO)))


def have_one_value(theirs, ours):
    names = [name for name in inspect.signature(TRPO).parameters if hasattr(theirs, name) and name not in ("policy", "env")]
    assert len(names) > 15
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_its_archives_load_everywhere(tmp_path):
    model = CompatTRPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=64, target_kl=0.02, device="cpu").learn(64)
    model.save(tmp_path / "model")
    for cls in (CompatTRPO, TRPOExt, TRPO):
        loaded = cls.load(tmp_path / "model", device="cpu")
        assert loaded.target_kl == 0.02 and loaded.cg_damping == 0.1
    loaded = CompatTRPO.load(tmp_path / "model", device="cpu", critic="gauss_newton")
    assert loaded.critic == "gauss_newton" and loaded.kl_reduction == "mean"


SCALE = "In sb3_contrib.TRPO's numbers, an average over 2 action dimensions, this is "


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (dict(target_kl=0.02), "target_kl=0.01;"),
        (dict(cg_damping=0.2), "cg_damping=0.1;"),
        (dict(target_kl="lin_0.02", cg_damping=0.2), "target_kl / 2, cg_damping=0.1;"),
        (dict(), None),
        (dict(target_kl=0.02, verbose=0), None),
        (dict(target_kl=0.02, kl_reduction="mean"), None),
    ],
)
def test_given_numbers_are_told_in_those_of_sb3_contrib(arguments, told, capsys, tmp_path):
    env = limited(Walk(ACTION_SPACES["box"]))
    model = TRPOExt("MlpPolicy", env, device="cpu", **{"verbose": 1, **arguments})
    out = capsys.readouterr().out
    assert (SCALE + told in out) if told else SCALE not in out
    model.save(tmp_path / "model")
    TRPOExt.load(tmp_path / "model", device="cpu")
    assert SCALE not in capsys.readouterr().out  # once


def test_one_action_dimension_has_one_scale(capsys):
    TRPOExt("MlpPolicy", "Pendulum-v1", target_kl=0.02, verbose=1, device="cpu")
    TRPOExt("MlpPolicy", "CartPole-v1", target_kl=0.02, verbose=1, device="cpu")
    assert "numbers" not in capsys.readouterr().out
