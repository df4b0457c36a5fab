"""What SB3 asks of an algorithm, of every sibling: spaces, callbacks, seeds, environments, archives, faults."""

import inspect
import math
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_trpo_ext import KLPPOExt, NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.algorithms.base import OnPolicyExt
from sb3_trpo_ext.checks import default_of
from sb3_trpo_ext.policy_problem import PolicyProblem
from tests.cases import ACTION_SPACES
from tests.envs import Faulty, Walk, limited

SIBLINGS = [TRPOExt, NPGExt, KLPPOExt]
FAST = dict(n_steps=64, batch_size=32, seed=0, device="cpu")
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
DICT = spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (2,)), "kind": spaces.Discrete(3)})

pytestmark = pytest.mark.parametrize("algorithm", SIBLINGS)


def make(algorithm, policy="MlpPolicy", env=None, **arguments):
    arguments = {**FAST, **arguments}
    if arguments.get("critic", "adam") != "adam" and algorithm is not KLPPOExt:
        del arguments["batch_size"]  # of no use, and would warn
    return algorithm(policy, env or limited(Walk()), **arguments)


def flat(model):
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


# -- arguments -----------------------------------------------------------------------------------------


def test_the_signature_names_every_keyword_with_its_default(algorithm):
    shown, shared = (inspect.signature(cls).parameters for cls in (algorithm, OnPolicyExt))
    assert set(shared) < set(shown) and not any(p.kind is p.VAR_KEYWORD for p in shown.values())
    model = make(algorithm, seed=None, device="cpu")
    for name in shared.keys() - {"policy", "env", "device", "n_steps", "batch_size", "policy_kwargs", "critic", *SB3_WRAPS}:
        assert getattr(model, name) == shown[name].default == default_of(algorithm, name), name


SB3_WRAPS = {"rollout_buffer_class", "rollout_buffer_kwargs", "stats_window_size", "learning_rate"}


def test_trpo_and_the_shared_constructor_have_the_same_defaults(algorithm):
    ours = inspect.signature(TRPOExt).parameters
    assert all(
        parameter.default == ours[name].default for name, parameter in inspect.signature(OnPolicyExt).parameters.items()
    )


def test_a_keyword_that_no_sibling_has_is_refused(algorithm):
    message = rf"^{algorithm.__name__}.__init__\(\) got an unexpected keyword argument 'momentum'$"
    with pytest.raises(TypeError, match=message):
        make(algorithm, momentum=0.2)


def test_a_warning_points_at_who_called_the_constructor(algorithm):
    with pytest.warns(UserWarning, match="'adam' makes no use of critic_steps=7") as caught:
        make(algorithm, critic_steps=7)
    assert caught[0].filename == __file__


def test_how_it_is_going_to_train_is_printed_in_one_line(algorithm, capsys):
    make(algorithm, verbose=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Critic: adam; acting: numpy" in line]
    assert len(lines) == 1 and "KL" in lines[0]


# -- what trains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ACTION_SPACES)
def test_every_action_space(algorithm, space):
    model = make(algorithm, env=limited(Walk(ACTION_SPACES[space])), ent_coef=0.01)
    start = flat(model)
    model.learn(192)
    assert not th.equal(start, flat(model)) and set(model.outcome_counts) <= {"accepted", "no_improvement"}


@pytest.mark.parametrize("critic", ["adam", "gauss_newton", "none"])
@pytest.mark.parametrize(
    "policy, space",
    [
        ("CnnPolicy", IMAGE),
        ("MultiInputPolicy", DICT),
        ("MlpPolicy", spaces.Discrete(4)),
        ("MlpPolicy", spaces.MultiBinary(3)),
    ],
)
def test_every_kind_of_observation(algorithm, policy, space, critic):
    small = dict(features_extractor_kwargs=dict(features_dim=8)) if policy == "CnnPolicy" else {}
    if policy == "MultiInputPolicy":
        small = dict(features_extractor_kwargs=dict(cnn_output_dim=8))
    env = limited(Walk(spaces.Discrete(2), space))
    model = make(algorithm, policy, env, critic=critic, n_steps=32, policy_kwargs=small)
    model.learn(64)
    assert model.report is not None and "faults" not in model.outcome_counts


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("sample_freq", [-1, 4])
def test_gsde(algorithm, squash, sample_freq):
    model = make(algorithm, use_sde=True, sde_sample_freq=sample_freq, policy_kwargs=dict(squash_output=squash), ent_coef=0.01)
    model.learn(192)
    assert model.outcome_counts.get("accepted", 0) > 0


@pytest.mark.parametrize(
    ("space", "arguments"),
    [
        *((space, {}) for space in ACTION_SPACES),
        ("box", dict(use_sde=True)),
        ("discrete", dict(critic="gauss_newton")),
        ("discrete", dict(critic="gauss_newton", policy_kwargs=dict(activation_fn=th.nn.PReLU))),
    ],
)
def test_torchs_default_device_is_the_users_affair(algorithm, space, arguments):
    model = make(algorithm, env=limited(Walk(ACTION_SPACES[space])), **arguments)
    with th.device("meta"):  # which holds no numbers, so that whatever is made there by mistake is found out
        model.learn(64)
    assert model.outcome_counts["accepted"] == 1


class Dropping(th.nn.Module):
    """Dropout, which evaluation mode stops or not."""

    def __init__(self, always):
        super().__init__()
        self.always = always

    def forward(self, x):
        return th.nn.functional.dropout(x, 0.2, training=self.always or self.training)


@pytest.mark.parametrize("always", [True, False])
def test_a_policy_that_is_another_each_time_is_told_of(algorithm, always):
    model = make(algorithm)
    model.policy.mlp_extractor.policy_net.append(Dropping(always))
    told = pytest.warns(UserWarning, match="asked again about the same states, the policy gives another distribution")
    with told if always else nullcontext():
        model.learn(64)


def test_a_device_without_double_precision_is_refused_at_once(algorithm):
    with pytest.raises(ValueError, match=r"device must be one with double precision.*got 'mps'"):
        make(algorithm, device="mps")


def test_another_environment(algorithm):
    model = make(algorithm)
    model.learn(64)
    model.set_env(limited(Walk()))
    model.learn(64)
    assert model.outcome_counts["accepted"] == 2


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_vectorised_and_normalised_environments(algorithm, vec_env):
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, vec_env_cls=vec_env, seed=0))
    model = make(algorithm, env=env).learn(256)
    env.close()
    assert model.outcome_counts == {"accepted": 2} and model.actor_path == "numpy"


def test_vine_sampling(algorithm):
    branches = dict(n_rollout_states=8, n_branch_actions="all", branch_length=5)
    env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=SnapshotWrapper, seed=0)
    model = make(algorithm, env=env, rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=branches, ent_coef=0.01)
    start = flat(model)
    model.learn(256)
    assert set(model.outcome_counts) <= {"accepted", "no_improvement"} and not th.equal(start, flat(model))


# -- SB3's habits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, dict(use_sde=True), dict(critic="gauss_newton"), dict(values_at_each_step=True)], ids=str
)
def test_a_seed_gives_the_same_run_bit_for_bit(algorithm, arguments):
    def run():
        return flat(make(algorithm, env=make_vec_env("Pendulum-v1", n_envs=2), **arguments).learn(384))

    assert th.equal(run(), run())


def test_callbacks_of_sb3(algorithm, tmp_path):
    evaluation = EvalCallback(gym.make("Pendulum-v1"), eval_freq=100, n_eval_episodes=1, log_path=str(tmp_path), warn=False)
    checkpoint = CheckpointCallback(save_freq=100, save_path=str(tmp_path))
    counted = EveryNTimesteps(50, CheckpointCallback(save_freq=1, save_path=str(tmp_path), name_prefix="event"))
    model = make(algorithm, env="Pendulum-v1")
    model.learn(256, callback=CallbackList([evaluation, checkpoint, counted]), progress_bar=True)
    assert (tmp_path / "evaluations.npz").exists() and (tmp_path / "rl_model_200_steps.zip").exists()
    assert counted.n_calls == model.num_timesteps == 256


class Values(BaseCallback):
    def _on_step(self):
        assert self.locals["values"].shape == (1, 1) and self.locals["log_probs"].shape == (1,)
        return True


def test_values_at_each_step_are_in_the_locals(algorithm):
    make(algorithm, values_at_each_step=True).learn(64, callback=Values())


def test_the_remaining_progress_ends_at_zero_however_far_the_last_rollout_goes(algorithm):
    seen = []
    model = make(algorithm, learning_rate=lambda progress: seen.append(progress) or 1e-3, critic="adam")
    model.learn(100)
    assert model.num_timesteps == 128 and model._current_progress_remaining == 0.0 and min(seen) == 0.0


class Casting(Walk):
    """Gives its observations as another kind of number than its space has."""

    def __init__(self, space, kind):
        super().__init__(None, space)
        self.kind = kind

    def _observation(self):
        return np.asarray(super()._observation()).astype(self.kind)


def test_choices_from_other_processes_may_be_of_any_kind_of_number(algorithm):
    for space, kind in ((spaces.Discrete(4), float), (spaces.MultiDiscrete([3, 2]), np.uint64)):
        env = SubprocVecEnv([lambda space=space, kind=kind: limited(Casting(space, kind))] * 2, start_method="fork")
        model = make(algorithm, env=env).learn(128)
        env.close()
        assert model.actor_path == "numpy" and "faults" not in model.outcome_counts


def test_log_keys_and_the_name_of_the_log(algorithm, tmp_path):
    model = make(algorithm, tensorboard_log=str(tmp_path)).learn(64)
    assert (tmp_path / f"{algorithm.__name__}_1").is_dir()
    log = model.logger.name_to_value
    for key in ("policy_objective", "value_loss", "kl_divergence_loss", "explained_variance", "learning_rate", "entropy"):
        assert np.isfinite(log[f"train/{key}"]), key
    for key in ("target_kl", "expected_improvement", "improvement", "gradient_norm", "step_norm"):
        assert np.isfinite(log[f"trust_region/{key}"]), key
    assert log["outcome/accepted"] == 1 and log["train/kl_divergence_loss"] == model.report.kl > 0


def test_chunks_do_not_change_an_update(algorithm):
    whole, chunked = make(algorithm).learn(64), make(algorithm, chunk_size=13).learn(64)
    th.testing.assert_close(flat(whole), flat(chunked), rtol=1e-3, atol=1e-4)


# -- archives ------------------------------------------------------------------------------------------


def test_an_archive_goes_on_where_it_was_saved(algorithm, tmp_path):
    model = make(algorithm, n_critic_updates=3).learn(192)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=limited(Walk()), device="cpu")
    assert th.equal(flat(loaded), flat(model)) and loaded.outcome_counts == model.outcome_counts
    named = inspect.signature(algorithm).parameters.keys() - {"policy", "env", "_init_setup_model", "device"}
    derived = {"learning_rate", "rollout_buffer_class", "rollout_buffer_kwargs", "stats_window_size"}
    for name in named - derived:
        assert getattr(loaded, name) == getattr(model, name), name
    theirs, ours = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    th.testing.assert_close(theirs, ours, rtol=0, atol=0)
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps + 128 and not th.equal(flat(loaded), flat(model))


# -- faults --------------------------------------------------------------------------------------------


def state_of(model):
    """Everything that an update may move, and must not move if it fails."""
    memory = model.policy.optimizer.state_dict()["state"]
    return flat(model), {(i, name): value.clone() for i, state in memory.items() for name, value in state.items()}


def learn_with_a_fault(model, quantity):
    with pytest.warns(UserWarning, match=f"update skipped: NaN, infinite or huge {quantity}"):
        model.learn(64, reset_num_timesteps=False)
    assert model.outcome_counts["faults"] == 1


@pytest.mark.parametrize("bad", [math.nan, 1e30])
def test_bad_data_skip_the_update_and_training_goes_on(algorithm, bad):
    model = make(algorithm, env=Faulty(limited(Walk()), "rewards", bad, every=50, until=50))
    start = flat(model)
    learn_with_a_fault(model, "rewards")
    assert th.equal(start, flat(model))
    model.learn(128, reset_num_timesteps=False)
    assert model.outcome_counts["accepted"] == 2 and bool(th.isfinite(flat(model)).all())


def test_a_gradient_that_is_not_finite(algorithm, monkeypatch):
    model = make(algorithm).learn(64)
    start, gradient = state_of(model), PolicyProblem.gradient
    monkeypatch.setattr(PolicyProblem, "gradient", lambda self: (gradient(self)[0], gradient(self)[1] * math.nan))
    learn_with_a_fault(model, "gradient")
    assert model.outcome_counts["non_finite_gradient"] == 1
    th.testing.assert_close(state_of(model), start, rtol=0, atol=0)


def test_a_critic_fit_that_overflows_takes_the_policy_step_back_with_it(algorithm, monkeypatch):
    model = make(algorithm, critic="gauss_newton").learn(64)
    start, problem_of = state_of(model), model._critic_problem

    def overflowing(*args):
        problem = problem_of(*args)
        problem.returns = problem.returns * math.inf
        return problem

    monkeypatch.setattr(model, "_critic_problem", overflowing)
    learn_with_a_fault(model, "value loss")
    assert model.report.outcome == "undone" and model.report.kl == model.report.step_norm == 0.0
    th.testing.assert_close(state_of(model), start, rtol=0, atol=0)


def test_an_interrupt_leaves_the_policy_as_it_was(algorithm, monkeypatch):
    model = make(algorithm).learn(64)
    start = state_of(model)

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyProblem, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, reset_num_timesteps=False)
    th.testing.assert_close(state_of(model), start, rtol=0, atol=0)


def test_constant_advantages_are_an_outcome_and_no_step(algorithm):
    class Constant(Walk):
        def step(self, action):
            observation, _, _, truncated, info = super().step(action)
            return observation, 0.0, False, truncated, info

    model = make(algorithm, critic="none").learn(64)
    model.set_env(Constant())
    start = state_of(model)
    model.learn(64)
    assert model.outcome_counts == {"accepted": 1, "zero_gradient": 1}
    th.testing.assert_close(state_of(model), start, rtol=0, atol=0)
