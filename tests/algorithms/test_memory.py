"""Recurrent policies: sb3_contrib's policy, asked one step at a time, is the oracle of rollouts and updates."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt
from sb3_trpo_ext.evaluation import evaluate_policy as evaluate_masked
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.sampling.sequences import distribution_at, units_of
from tests.cases import ACTION_SPACES, DoubleExtractor, LearnedExtractor, dense, enumerate_actions
from tests.envs import Walk, limited

ALGORITHMS = [TRPOExt, NPGExt, KLPPOExt]
CRITICS = {
    "apart": {},
    "shared": dict(shared_lstm=True, enable_critic_lstm=False),
    "without": dict(enable_critic_lstm=False),
    "two_layers": dict(n_lstm_layers=2, lstm_kwargs=dict(dropout=0.5)),
}
DICT = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})
SMALL = dict(lstm_hidden_size=6, net_arch=[5])


def env_of(action_space=None, observation_space=None, n_envs=2, end_probability=0.05):
    return DummyVecEnv([lambda: limited(Walk(action_space, observation_space, end_probability))] * n_envs)


def make(algorithm=TRPOExt, policy="MlpLstmPolicy", env=None, n_steps=40, kind="apart", policy_kwargs=None, **kwargs):
    if algorithm is KLPPOExt:
        kwargs = {"batch_size": n_steps, **kwargs}
    policy_kwargs = {**SMALL, **CRITICS[kind], **(policy_kwargs or {})}
    return algorithm(policy, env or env_of(), n_steps=n_steps, seed=0, policy_kwargs=policy_kwargs, device="cpu", **kwargs)


class GRU(RecurrentActorCriticPolicy):
    """A user's own recurrence, in the layout that sb3_contrib has for states."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lstm_actor, self.lstm_critic = (nn.GRU(self.features_dim, self.lstm_output_dim) for _ in range(2))
        self.optimizer = self.optimizer_class(self.parameters(), lr=1e-3)

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        n, h, outputs = lstm_states[0].shape[1], lstm_states[0], []
        for x, starts in zip(
            features.view(n, -1, lstm.input_size).unbind(1), episode_starts.view(n, -1).unbind(1), strict=True
        ):
            output, h = lstm(x.unsqueeze(0), h * (1.0 - starts).view(1, n, 1))
            outputs.append(output)
        return th.cat(outputs).transpose(0, 1).flatten(0, 1), (h, h)


def by_steps(model, memory):
    """Values and log-probabilities of a rollout, and what is remembered after it, from sb3_contrib's own calls."""
    buffer, policy = model.rollout_buffer, model.policy

    def states(part):
        return tuple(x.transpose(0, 1).contiguous() for x in part)

    rnn = RNNStates(states(memory.pi), states(memory.vf))
    shape = (buffer.buffer_size, buffer.n_envs)
    observations, actions, starts = model.rollout_buffer_before_update
    values, log_probs = np.zeros(shape), np.zeros(shape)
    with th.no_grad():
        for t in range(shape[0]):
            seen = (
                {k: th.as_tensor(v[t]) for k, v in observations.items()}
                if isinstance(observations, dict)
                else th.as_tensor(observations[t])
            )
            start = th.as_tensor(starts[t])
            found = policy.evaluate_actions(seen, model.as_taken(th.as_tensor(actions[t])), rnn, start)
            values[t], log_probs[t] = found[0].flatten(), found[1]
            rnn = policy.forward(seen, rnn, start)[3]
    return values, log_probs, rnn


class Collected(BaseCallback):
    """Keeps what a rollout was, before an update reorders the buffer."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        observations = buffer.observations
        copied = {k: v.copy() for k, v in observations.items()} if isinstance(observations, dict) else observations.copy()
        self.model.rollout_buffer_before_update = copied, buffer.actions.astype(np.float32), buffer.episode_starts.copy()


def collect(model, rollouts=2):
    """A model with a rollout in its buffer that is no first one, and no update after it."""
    model.train = lambda: None
    model.learn(rollouts * model.n_steps * model.n_envs, callback=Collected())
    return model


# -- rollouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("stepwise", [False, True])
def test_a_rollout_is_what_sb3_contrib_computes_step_by_step(kind, stepwise):
    model = collect(make(kind=kind, values_at_each_step=stepwise))
    assert model.actor_path == ("sb3" if stepwise else "numpy")
    buffer = model.rollout_buffer
    assert buffer.episode_starts[1:].any() and any(part.any() for part in model._memory_at_start.pi)
    values, log_probs, after = by_steps(model, model._memory_at_start)
    np.testing.assert_allclose(buffer.values, values, atol=1e-5)
    np.testing.assert_allclose(buffer.log_probs, log_probs, atol=1e-5)
    for ours, theirs in zip(model._last_lstm_states, after, strict=True):
        for part, exact in zip(ours, theirs, strict=True):
            th.testing.assert_close(part.transpose(0, 1), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("space", ACTION_SPACES)
def test_every_action_space(space):
    model = collect(make(env=env_of(ACTION_SPACES[space])))
    assert model.actor_path == "numpy"
    _, log_probs, _ = by_steps(model, model._memory_at_start)
    np.testing.assert_allclose(model.rollout_buffer.log_probs, log_probs, atol=1e-5)
    assert len(np.unique(model.rollout_buffer.actions)) > 1


class Bare(gym.Env):
    """Nothing is paid, and a time limit ends every episode."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(2, self.t / 10, np.float32), 0.0, False, self.t == 7, {}


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("kind", CRITICS)
def test_time_limits_go_on_with_the_value_of_what_was_remembered(kind, stepwise):
    model = make(env=DummyVecEnv([Bare] * 2), n_steps=20, kind=kind, values_at_each_step=stepwise, gamma=0.9)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    collect(model, rollouts=1)
    policy, zeros = model.policy, model._recurrence.none(1)
    rnn = RNNStates(*(tuple(x.transpose(0, 1) for x in part) for part in zeros))
    start = th.zeros(1)
    with th.no_grad():
        for t in range(7):
            rnn = policy.forward(th.full((1, 2), t / 10), rnn, start)[3]
        value = float(policy.predict_values(th.full((1, 2), 0.7), rnn.vf, start))
    wanted = np.zeros((20, 2))
    wanted[[6, 13]] = 0.9 * value
    assert abs(value) > 1e-3
    np.testing.assert_allclose(model.rollout_buffer.rewards, wanted, atol=1e-6)


def test_the_last_value_is_that_of_the_last_observation_given_what_is_remembered():
    model = collect(make(env=env_of(end_probability=0.0), gae_lambda=0.0, gamma=1.0))
    buffer = model.rollout_buffer
    policy, vf = model.policy, tuple(x.transpose(0, 1).contiguous() for x in model._last_lstm_states.vf)
    with th.no_grad():
        last = policy.predict_values(th.as_tensor(model._last_obs), vf, th.as_tensor(model._last_episode_starts).float())
    running = ~model._last_episode_starts
    np.testing.assert_allclose(
        buffer.returns[-1][running], (buffer.rewards[-1] + last.flatten().numpy())[running], rtol=1e-5, atol=1e-5
    )


def test_a_rollout_that_ends_early_remembers_no_step_too_many():
    class Stop(Collected):
        def _on_step(self):
            return self.n_calls < 10

    model = make()
    model.learn(80, callback=Stop())
    assert model.rollout_buffer.pos == 9
    remembered = model._last_lstm_states
    model.rollout_buffer.buffer_size = 9
    for name in ("observations", "actions", "episode_starts", "values"):
        setattr(model.rollout_buffer, name, getattr(model.rollout_buffer, name)[:9])
    buffer = model.rollout_buffer
    model.rollout_buffer_before_update = buffer.observations, buffer.actions, buffer.episode_starts
    values, _, after = by_steps(model, model._memory_at_start)
    np.testing.assert_allclose(buffer.values, values, atol=1e-5)
    th.testing.assert_close(remembered.pi[0].transpose(0, 1), after.pi[0], atol=1e-5, rtol=1e-5)


# -- updates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 40])
@pytest.mark.parametrize("kind", CRITICS)
def test_at_the_old_policy_the_ratio_is_one_and_the_kl_zero_through_the_recurrence(kind, chunk_size):
    model = collect(make(kind=kind, chunk_size=chunk_size, normalize_advantage=False))
    samples = model._samples()
    assert units_of(samples).length == 40 and samples.episode_starts[1:].any()
    problem = model._policy_problem(samples)
    with th.no_grad():
        log_probs = model.action_distribution(samples.observations, samples).log_prob(samples.actions)
    th.testing.assert_close(log_probs, samples.old_log_prob, atol=1e-5, rtol=1e-5)
    objective, kl = problem.evaluate()
    assert objective == pytest.approx(float(samples.advantages.mean()), abs=1e-5)
    assert kl == pytest.approx(0.0, abs=1e-9)


def test_chunks_of_sequences_change_nothing():
    model = collect(make(env=env_of(n_envs=3)))
    samples = model._samples()
    found = []
    for model.chunk_size in (None, 40, 80):
        problem = model._policy_problem(samples)
        critic = model._critic_problem(samples, problem.parameters)
        v = th.linspace(-1, 1, len(problem.parameters))
        w = th.linspace(-1, 1, len(critic.parameters))
        found.append([problem.gradient()[1], problem.fisher_product()(v), critic.linearize()[0], critic.linearize()[1](w)])
    for other in found[1:]:
        for part, exact in zip(other, found[0], strict=True):
            th.testing.assert_close(part, exact, rtol=1e-4, atol=1e-6)


class Context:
    def __init__(self, starts, memory):
        self.episode_starts, self.memory = starts, memory


DOUBLE = {
    "fixed": dict(features_extractor_class=DoubleExtractor),
    "learned": dict(features_extractor_class=LearnedExtractor, share_features_extractor=False),
}


@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("features", DOUBLE)
@pytest.mark.parametrize("space", ACTION_SPACES)
def test_fisher_products_through_the_recurrence_agree_with_the_scores(space, features, fisher):
    kwargs = {**DOUBLE[features], "lstm_hidden_size": 3, "net_arch": [], "log_std_init": -0.5}
    env = env_of(ACTION_SPACES[space], end_probability=0.2)
    model = make(env=env, n_steps=4, policy_kwargs=kwargs, critic="adam", fisher=fisher)
    model.policy.double()
    for parameter in model.policy.parameters():
        parameter.data += 0.2 * th.randn_like(parameter)
    model._begin_without_memory()
    collect(model)
    samples = model._samples()
    problem = model._policy_problem(samples)
    parameters, recurrence = problem.parameters, model._recurrence
    names = [name for name, p in model.policy.named_parameters() if p in parameters]
    assert any("lstm_actor" in name for name in names) and not any("critic" in name or "value_net" in name for name in names)
    assert any("features" in name for name in names) == (features == "learned")
    exact = th.zeros(len(parameters), len(parameters)).double()
    for row in range(len(samples.actions)):
        first = row - row % 4
        before = Context(samples.episode_starts[first : row + 1], samples.memory.map(lambda part, e=row // 4: part[e : e + 1]))

        def last(before=before, first=first, row=row):
            distribution = recurrence.distribution(samples.observations[first : row + 1], before)
            return distribution

        for action, probability in enumerate_last(model.policy, last()):
            score = parameters.gradient(last().log_prob(action)[-1].sum())
            exact += probability * th.outer(score, score) / len(samples.actions)
    found = dense(problem.fisher_product(), len(parameters))
    th.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)


class Last:
    """The last of several states' distributions, for ``enumerate_actions``."""

    def __init__(self, distribution):
        self._distribution, self.distribution = distribution, distribution.distribution
        if isinstance(self.distribution, th.distributions.Normal):
            self.distribution = th.distributions.Normal(self.distribution.mean[-1:], self.distribution.stddev[-1:])

    def log_prob(self, action):
        return self._distribution.log_prob(action)[-1]


def enumerate_last(policy, distribution):
    return list(enumerate_actions(policy, Last(distribution)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", CRITICS)
def test_learning(algorithm, kind):
    model = make(algorithm, kind=kind).learn(160)
    assert model.outcome_counts == {"accepted": 2}
    own = {name for name, _ in model.policy.named_parameters() if "lstm_critic" in name}
    assert bool(own) == (kind in ("apart", "two_layers"))


@pytest.mark.parametrize("critic", ["gauss_newton", "adam", "none"])
@pytest.mark.parametrize("kind", CRITICS)
def test_a_critic_fit_moves_the_critic_alone(kind, critic):
    model = collect(make(kind=kind, critic=critic))
    samples = model._samples()
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    actor = model._policy_problem(samples).parameters
    if critic == "none":
        assert not model.predict_values(samples.observations, samples).any()
        return
    loss = model._critic_problem(samples, actor).loss()
    model._fit_critic(samples, actor)
    assert model._critic_problem(samples, actor).loss() < loss
    moved = {name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, before[name])}
    expected = ("lstm_critic", "critic", "mlp_extractor.value_net", "value_net")
    assert moved and all(name.startswith(expected) for name in moved)
    assert any(name.startswith("lstm_critic") for name in moved) == (kind in ("apart", "two_layers"))


def test_one_gauss_newton_step_is_chosen_for_a_critic_with_an_lstm_of_its_own():
    assert [make(kind=kind).critic_steps for kind in CRITICS] == [1, 3, 3, 1]
    assert make(critic="gauss_newton").critic_steps == 3
    assert make(critic_steps=2).critic_steps == 2


def test_any_states_of_a_batch_can_be_asked_about():
    model = collect(make(env=env_of(n_envs=3)))
    samples = model._samples()
    units, rows = units_of(samples), th.tensor([119, 3, 90, 41, 3])
    with th.no_grad():
        whole = model.action_distribution(samples.observations, samples).log_prob(samples.actions)
        some = distribution_at(model.agent, samples, rows, units).log_prob(samples.actions[rows])
    th.testing.assert_close(some, whole[rows])


# -- other policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_users_own_recurrence(algorithm):
    model = collect(make(algorithm, GRU))
    values, log_probs, _ = by_steps(model, model._memory_at_start)
    np.testing.assert_allclose(model.rollout_buffer.values, values, atol=1e-5)
    np.testing.assert_allclose(model.rollout_buffer.log_probs, log_probs, atol=1e-5)
    del model.train
    model.learn(80)
    assert model.outcome_counts == {"accepted": 1}


@pytest.mark.parametrize("policy, env", [("MultiInputLstmPolicy", DICT), ("MlpLstmPolicy", spaces.Discrete(4))])
def test_other_observations(policy, env):
    model = collect(make(policy=policy, env=env_of(observation_space=env)))
    _, log_probs, _ = by_steps(model, model._memory_at_start)
    np.testing.assert_allclose(model.rollout_buffer.log_probs, log_probs, atol=1e-5)
    del model.train
    assert model.learn(80).outcome_counts == {"accepted": 1}


@pytest.mark.parametrize("kind", ["apart", "shared"])
def test_images(kind):
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=40, screen_width=40, n_channels=1)])
    model = make(
        policy="CnnLstmPolicy",
        env=env,
        n_steps=16,
        kind=kind,
        policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=4)),
    )
    assert model.learn(16).outcome_counts == {"accepted": 1} and model.critic == "adam"


def test_gsde():
    model = make(use_sde=True, sde_sample_freq=4).learn(160)
    assert model.outcome_counts == {"accepted": 2} and model.actor_path == "sb3"


def test_an_overridden_distribution_acts_and_learns():
    class Narrow(TRPOExt):
        def action_distribution(self, observations, samples=None):
            distribution = super().action_distribution(observations, samples)
            distribution.distribution.scale = 0.1 * distribution.distribution.scale
            return distribution

    model = make(Narrow).learn(80)
    assert model.outcome_counts == {"accepted": 1}
    assert model.rollout_buffer.log_probs.mean() > make().learn(80).rollout_buffer.log_probs.mean() + 2.0


# -- the shell -------------------------------------------------------------------------------------------


def test_sb3_contrib_is_asked_for_only_where_its_policies_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib.common.recurrent.policies", None)
    TRPOExt("MlpPolicy", env_of(), n_steps=40, device="cpu").learn(80)
    with pytest.raises(ImportError, match="MlpLstmPolicy is a policy of sb3_contrib: pip install sb3-contrib"):
        make()


def test_a_choice_that_cannot_be():
    with pytest.raises(AssertionError, match="shared LSTM"):
        make(policy_kwargs=dict(shared_lstm=True, enable_critic_lstm=True))


def test_memory_goes_on_from_rollout_to_rollout_and_from_learn_to_learn():
    model = collect(make(env=env_of(end_probability=0.0), n_steps=5), rollouts=1)
    after = model._last_lstm_states
    model.learn(10, callback=Collected(), reset_num_timesteps=False)
    assert all(th.equal(a, b) for x, y in zip(model._memory_at_start, after, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_predict_and_archives(algorithm, tmp_path):
    model = make(algorithm).learn(80)
    model.save(tmp_path / "ours")
    RecurrentPPO("MlpLstmPolicy", env_of(), n_steps=8, policy_kwargs=SMALL, device="cpu").learn(16).save(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        loaded = algorithm.load(tmp_path / name, env_of(n_envs=3), device="cpu")
        observation = loaded.env.reset()
        action, state = loaded.predict(observation, deterministic=True)
        later, state = loaded.predict(observation, state=state, episode_start=np.zeros(3, dtype=bool), deterministic=True)
        again, _ = loaded.predict(observation, state=state, episode_start=np.ones(3, dtype=bool), deterministic=True)
        assert state[0].shape == (1, 3, 6) and not np.allclose(action, later)
        np.testing.assert_allclose(action, again, rtol=1e-5)
        assert loaded.learn(3 * loaded.n_steps).outcome_counts["accepted"] >= 1
    single, _ = model.predict(np.zeros(3, dtype=np.float32), deterministic=True)
    assert single.shape == (2,)


def test_evaluation_and_normalised_environments():
    env = VecNormalize(env_of())
    evaluated = EvalCallback(
        VecNormalize(env_of(n_envs=1), training=False), eval_freq=20, n_eval_episodes=2, warn=False, verbose=0
    )
    model = make(env=env).learn(80, callback=evaluated)
    assert np.isfinite(evaluated.last_mean_reward)
    assert np.isfinite(evaluate_policy(model, env_of(), n_eval_episodes=2, warn=False)[0])


class Recall(gym.Env):
    """Shows a sign once and pays for repeating it at the end: nothing but memory solves it."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign, self.t = int(self.np_random.integers(2)), 0
        return np.array([2 * self.sign - 1, 0], dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([0, self.t / 3], dtype=np.float32), float(self.t == 3 and action == self.sign), self.t == 3, False, {}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_was_seen_long_ago_is_used(algorithm):
    model = make(
        algorithm,
        env=make_vec_env(Recall, 8, seed=0),
        n_steps=96,
        gamma=1.0,
        policy_kwargs=dict(lstm_hidden_size=16),
    )
    model.learn(25 * 768)
    assert evaluate_policy(model, make_vec_env(Recall, 8, seed=1), n_eval_episodes=40)[0] == 1.0


def test_parameters_of_the_problem_are_the_actors():
    model = collect(make())
    problem = model._policy_problem(model._samples())
    names = {name for name, p in model.policy.named_parameters() if p in FlatParameters(problem.parameters.tensors)}
    assert {name.split(".")[0] for name in names} == {"log_std", "lstm_actor", "mlp_extractor", "action_net"}


# -- memory and masks together ------------------------------------------------------------------------------


class MaskedRecall(Recall):
    """Of four actions that two are allowed, in turns; the sign says which of the two pays at the end."""

    action_space = spaces.Discrete(4)

    def action_masks(self):
        return np.arange(4) % 2 == self.t % 2

    def step(self, action):
        assert self.action_masks()[action]
        return super().step(action // 2)


@pytest.mark.parametrize("kwargs", [{}, dict(values_at_each_step=True), dict(fisher="empirical"), dict(critic="none")])
def test_masks_and_memory(kwargs):
    model = make(env=DummyVecEnv([MaskedRecall] * 2), **kwargs)
    collect(model)
    masks = model.rollout_buffer.further_fields["action_masks"]
    samples = model._samples()
    with th.no_grad():
        distribution = model.action_distribution(samples.observations, samples)
    assert not distribution.distribution.probs[~samples.action_masks].any()
    assert th.equal(samples.action_masks, th.as_tensor(masks).swapaxes(0, 1).flatten(0, 1))
    log_probs = distribution.log_prob(samples.actions.long().flatten())
    th.testing.assert_close(log_probs, samples.old_log_prob, atol=1e-5, rtol=1e-5)
    del model.train
    assert model.learn(80).outcome_counts == {"accepted": 1}


def test_neither_masks_nor_memory_alone_do_it():
    """Without masks the environment refuses; without memory the sign is forgotten."""
    env = make_vec_env(MaskedRecall, 8, seed=0)
    kwargs = dict(n_steps=96, gamma=1.0, seed=0, device="cpu")
    both = TRPOExt("MlpLstmPolicy", env, policy_kwargs=dict(lstm_hidden_size=16), **kwargs).learn(25 * 768)
    forgetful = TRPOExt("MlpPolicy", env, **kwargs).learn(25 * 768)
    scores = [
        evaluate_masked(model, make_vec_env(MaskedRecall, 8, seed=1), n_eval_episodes=80)[0] for model in (both, forgetful)
    ]
    assert scores[0] == 1.0 and scores[1] < 0.75
    with pytest.raises(AssertionError):
        TRPOExt("MlpLstmPolicy", env, use_masking=False, policy_kwargs=dict(lstm_hidden_size=16), **kwargs).learn(768)
