"""KLPPOExt: β, its target, early stopping, and what comes from SB3's PPO."""

import inspect
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt
from sb3_trpo_ext.algorithms import kl_ppo
from sb3_trpo_ext.kl_penalty import KLPenaltySettings, kl_penalty_step
from tests.envs import Walk, limited

FAST = dict(n_steps=64, batch_size=32, seed=0, device="cpu")


def make(env=None, **arguments):
    return KLPPOExt("MlpPolicy", env or limited(Walk()), **{**FAST, **arguments})


def flat(model):
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


def test_keywords_of_ppo_keep_their_names_and_defaults():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (KLPPOExt, PPO))
    assert set(theirs) - set(ours) == {"clip_range", "clip_range_vf", "vf_coef"}
    assert [name for name in theirs if name in ours and ours[name].default != theirs[name].default] == ["target_kl"]
    assert list(ours)[:7] == list(theirs)[:7]


def test_beta_is_halved_while_the_policy_hardly_moves_and_doubled_where_it_runs_away():
    slow = make(learning_rate=1e-6).learn(192)
    assert slow.report.kl < 0.01 / 1.5 and slow.report.beta == 0.25 and slow.beta == 0.125
    fast = make(learning_rate=1e-2).learn(64)
    assert fast.report.kl > 0.015 and fast.beta == 2.0


def test_beta_without_a_target_stays():
    model = make(beta=0.7, target_kl=None).learn(192)
    assert model.beta == model.report.beta == 0.7 and model.report.target_kl is None
    log = model.logger.name_to_value
    assert "trust_region/target_kl" not in log and "train/is_line_search_success" not in log


def test_a_larger_beta_holds_the_policy_back():
    kls = [make(beta=beta, target_kl=None, learning_rate=3e-3).learn(64).report.kl for beta in (0.0, 100.0)]
    assert kls[1] < 0.1 * kls[0]


def test_layers_that_the_optimizer_does_not_hold_are_named():
    model = make()
    model.policy.action_net = th.nn.Linear(64, 2)
    with pytest.warns(UserWarning, match="does not hold 2 of the 7 parameter tensors of the policy"):
        model.learn(64)


def test_beta_and_a_schedule_of_its_target_are_saved(tmp_path):
    model = make(learning_rate=1e-6, target_kl="lin_0.02").learn(128)
    assert model.beta == 0.5  # the second update's target is 0, which is none
    model.save(tmp_path / "model")
    loaded = KLPPOExt.load(tmp_path / "model", env=limited(Walk()), device="cpu")
    assert loaded.beta == model.beta and type(loaded.target_kl) is LinearSchedule
    loaded.learn(64)


def test_max_kl_ends_the_epochs_early():
    model = make(max_kl=0.005, learning_rate=3e-3, n_epochs=50, target_kl=None, beta=0.0).learn(64)
    assert model.report.epochs < 50 and model.outcome_counts == {"accepted": 1}


def test_every_keyword_reaches_the_step(monkeypatch):
    seen = []

    def watched(problem, optimizer, settings):
        seen.append(settings)
        return kl_penalty_step(problem, optimizer, settings)

    monkeypatch.setattr(kl_ppo, "kl_penalty_step", watched)
    own = dict(n_epochs=3, batch_size=16, max_grad_norm=0.3, max_kl=0.2, kl_estimator="sample")
    make(beta=0.7, target_kl="lin_0.02", **own).learn(128)
    assert seen[0] == KLPenaltySettings(beta=0.7, target_kl=0.01, **own)
    assert all(getattr(seen[0], name) != getattr(KLPenaltySettings(beta=1.0), name) for name in own)


def test_the_critic_of_the_default_arguments_keeps_up_with_the_returns():
    """With 10 passes it explains a sixth of their variance here; a policy may then lose again what it has learned."""
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    model = KLPPOExt("MlpPolicy", env, n_steps=256, seed=0, device="cpu").learn(2048)
    explained = []
    for _ in range(6):
        model.learn(1024, reset_num_timesteps=False)
        explained.append(model.logger.name_to_value["train/explained_variance"])
    assert np.mean(explained) > 0.4


def test_both_estimators_of_the_penalty_train():
    models = [make(kl_estimator=estimator).learn(128) for estimator in ("analytic", "sample")]
    assert all(model.outcome_counts == {"accepted": 2} for model in models)
    assert not th.equal(*map(flat, models))


def test_a_learning_rate_that_overflows_costs_the_update():
    model = make().learn(64)
    start = flat(model)
    model.lr_schedule = lambda _: 1e30
    with pytest.warns(UserWarning, match="update skipped: NaN, infinite or huge step"):
        model.learn(64)
    assert th.equal(flat(model), start) and model.outcome_counts == {"accepted": 1, "non_finite_step": 1, "faults": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(beta=-1.0, target_kl=None),
        dict(beta=0.0),
        dict(target_kl=0.0),
        dict(target_kl="lin_x"),
        dict(kl_estimator="k3"),
        dict(max_kl=0.0),
        dict(n_epochs=0),
        dict(max_grad_norm=-0.5),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused_by_name(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=rf"{name} must be .*got {re.escape(repr(value))}"):
        make(**arguments)


def test_keywords_of_ppo_that_are_not_here_are_refused_with_the_reason():
    reasons = {"clip_range": "nothing is clipped", "clip_range_vf": "nothing is clipped", "vf_coef": "fitted on its own"}
    for name, reason in reasons.items():
        with pytest.raises(TypeError, match=rf"^KLPPOExt.__init__.* keyword argument '{name}': .*{reason}"):
            make(**{name: 0.5})


def test_the_policys_keywords_are_never_without_effect():
    with pytest.warns(UserWarning, match="makes no use of n_critic_updates=3$"):
        make(critic="gauss_newton", learning_rate=1e-3, max_grad_norm=1.0, n_critic_updates=3)


def test_how_it_is_going_to_train_is_printed(capsys):
    make(verbose=1)
    make(verbose=1, target_kl=None, beta=3.0)
    out = capsys.readouterr().out
    assert "beta 1, adapted towards a KL(old || new) of 0.01 nats" in out and "beta 3, fixed" in out


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    env = gym.make("Pendulum-v1")
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=3, target_kl=0.7, seed=0, device="cpu").learn(64)
    path = tmp_path_factory.mktemp("models") / "ppo"
    model.save(path)
    return model, path


def test_an_archive_of_ppo_goes_on(ppo):
    model, path = ppo
    loaded = KLPPOExt.load(path, env=gym.make("Pendulum-v1"), device="cpu")
    assert th.equal(flat(loaded), flat(model)) and (loaded.n_epochs, loaded.target_kl) == (3, 0.01)
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.outcome_counts == {"accepted": 1}


@pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt])
def test_the_early_stop_of_ppo_is_no_trust_region(ppo, algorithm):
    _, path = ppo
    loaded = algorithm.load(path, env=gym.make("Pendulum-v1"), device="cpu")
    assert (loaded.target_kl, loaded.kl_reduction) == (0.01, "sum")
    assert algorithm.load(path, device="cpu", target_kl=0.3).target_kl == 0.3
