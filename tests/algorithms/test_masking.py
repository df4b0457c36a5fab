"""Masks from end to end: every way of acting, learning, branching and predicting keeps to them."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_maskable
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_trpo_ext import KLPPOExt, NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.masks import NoActionAllowed
from tests.cases import ACTION_SPACES
from tests.envs import Picky, Telling, Walk, is_allowed, limited

FINITE = {name: space for name, space in ACTION_SPACES.items() if name != "box"}
T = 32


class OwnDistribution(TRPOExt):
    """Knows nothing of masks."""

    def action_distribution(self, observations, samples=None):
        return self.policy.get_distribution(observations)


class OwnForward(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


class Reading(TRPOExt):
    def allowed(self, observations):
        return observations["mask"]


WAYS = {
    "numpy": (TRPOExt, "MlpPolicy", {}),
    "sb3": (TRPOExt, "MlpPolicy", dict(values_at_each_step=True)),
    "torch": (OwnDistribution, "MlpPolicy", {}),
    "own forward": (TRPOExt, OwnForward, {}),
    "sb3_contrib": (TRPOExt, MaskableActorCriticPolicy, {}),
    "sb3_contrib's buffer": (TRPOExt, MaskableActorCriticPolicy, dict(rollout_buffer_class=MaskableRolloutBuffer)),
    "npg": (NPGExt, "MlpPolicy", {}),
    "kl_ppo": (KLPPOExt, "MlpPolicy", dict(n_epochs=2)),
    "hessian": (TRPOExt, "MlpPolicy", dict(fisher="hessian", ent_coef=0.1, chunk_size=20)),
    "empirical": (TRPOExt, "MlpPolicy", dict(fisher="empirical", sub_sampling_factor=2)),
}


def model_of(env, algorithm=TRPOExt, policy="MlpPolicy", **kwargs):
    return algorithm(policy, env, **dict(n_steps=T, seed=1, device="cpu") | kwargs)


def samples_of(model):
    return next(iter(model.rollout_buffer.get(None)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("space", FINITE)
def test_no_forbidden_action_is_taken_and_learning_sees_what_acting_saw(space, way):
    algorithm, policy, kwargs = WAYS[way]
    env = DummyVecEnv([lambda: limited(Picky(FINITE[space]))] * 2)
    model = model_of(env, algorithm, policy, **kwargs)
    if way in ("numpy", "sb3", "torch"):
        assert model.actor_path == way
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(3 * 2 * T)  # an action that is not allowed would have been an AssertionError
    assert model.outcome_counts["accepted"] == 3 and "faults" not in model.outcome_counts
    assert any(not th.equal(p, q) for p, q in zip(before, model.policy.parameters(), strict=True))
    _, callback = model._setup_learn(10**6)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, T)
    samples = samples_of(model)
    masks = samples.action_masks.bool().numpy()
    assert all(is_allowed(model.action_space, m, a) for m, a in zip(masks, samples.actions.numpy(), strict=True))
    with th.no_grad():
        log_probs = model.agent.distribution(samples.observations, samples).log_prob(model.as_taken(samples.actions))
    th.testing.assert_close(log_probs, samples.old_log_prob, atol=1e-5, rtol=1e-5)
    problem = model._policy_problem(samples)
    assert problem.evaluate().kl == pytest.approx(0.0, abs=1e-7)
    # as often as the environments were in a state where somebody acts
    asked = model.env.get_attr("n_asked")
    assert asked == [4 * T] * 2


def test_the_three_ways_act_alike_and_fill_alike():
    fills = []
    for way in ("numpy", "torch"):
        algorithm, policy, kwargs = WAYS[way]
        model = model_of(DummyVecEnv([lambda: Picky(FINITE["multi_discrete"])] * 2), algorithm, policy, **kwargs)
        model.learn(2 * T)
        fills.append((model.rollout_buffer.actions, model.rollout_buffer.further_fields["action_masks"]))
    assert all(np.array_equal(a, b) for a, b in zip(*fills, strict=True))


@pytest.mark.parametrize("space", FINITE)
def test_a_mask_among_the_observations_is_read_by_one_method(space):
    env = DummyVecEnv([lambda: limited(Telling(FINITE[space]))] * 2)
    model = model_of(env, Reading, "MultiInputPolicy")
    model.learn(2 * 2 * T)
    assert model.actor_path == "torch" and model.outcome_counts["accepted"] == 2
    # SB3's own helper passes no masks, and needs none
    evaluate_policy(model, Monitor(Telling(FINITE[space])), 2)
    assert not model_of(env, Reading, "MultiInputPolicy", use_masking=False)._is_masked
    with pytest.raises(AssertionError):
        model_of(env, policy="MultiInputPolicy").learn(2 * T)


def test_what_observations_and_environment_allow_must_both_allow():
    class Half(TRPOExt):
        def allowed(self, observations):
            return th.tensor([True, True, False]).expand(len(observations), -1)

    class Other(Walk):
        def action_masks(self):
            return [False, True, True]

    model = model_of(DummyVecEnv([lambda: Other(spaces.Discrete(3))]), Half, use_masking=True)
    model.learn(T)
    assert (model.rollout_buffer.actions == 1).all()
    assert (model.predict(np.zeros((4, 3)), action_masks=[[False, True, True]] * 4)[0] == 1).all()


@pytest.mark.parametrize("cls", [DummyVecEnv, SubprocVecEnv])
def test_masks_through_a_stack_of_vectorized_environments(cls):
    space = spaces.Discrete(4)

    def masker():
        return Monitor(ActionMasker(Walk(space), lambda env: np.arange(4) == 2))

    model = model_of(VecNormalize(cls([masker] * 2)), use_masking=True)
    model.learn(2 * T)
    assert (model.rollout_buffer.actions == 2).all()
    model.env.close()


@pytest.mark.parametrize("share", [True, False])
def test_images(share):
    env = ActionMasker(FakeImageEnv(), lambda env: [False, True, False, True, False, False])
    kwargs = dict(features_extractor_kwargs=dict(features_dim=8), share_features_extractor=share)
    model = model_of(env, policy="CnnPolicy", policy_kwargs=kwargs, batch_size=T)
    model.learn(T)
    assert model.actor_path == ("sb3" if share else "torch")
    assert set(model.rollout_buffer.actions.flatten()) <= {1.0, 3.0}
    assert {int(model.predict(env.observation_space.sample(), action_masks=[0, 0, 0, 0, 1, 0])[0])} == {4}


# -- vine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vine", [dict(n_branch_actions="all"), dict(proposal="uniform"), dict(proposal="policy")])
@pytest.mark.parametrize("space", FINITE)
def test_branches_keep_to_masks(space, vine):
    env = DummyVecEnv([lambda: SnapshotWrapper(limited(Picky(FINITE[space])))] * 2)
    kwargs = dict(n_rollout_states=8, branch_length=4, **vine)
    model = model_of(env, rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=kwargs)
    model.learn(2 * T)
    buffer, branches = model.rollout_buffer, model.rollout_buffer.branches
    envs, steps = np.divmod(branches.states, T)
    masks = buffer.further_fields["action_masks"][steps, envs]
    first = branches.first
    for n, mask in enumerate(masks):
        allowed = np.array([is_allowed(FINITE[space], mask, action) for action in first.actions[n]])
        drawn = first.multiplicities[n] > 0
        assert (allowed == drawn).all() if buffer.is_enumerated else allowed[drawn].all()
        log_probs = branches.log_probs[n]
        assert np.isfinite(log_probs[allowed]).all() and not np.exp(log_probs[~allowed]).any()
        if buffer.is_enumerated:
            assert np.exp(log_probs).sum() == pytest.approx(1.0, rel=1e-5)
        elif buffer.proposal == "uniform":
            blocks = np.split(mask, np.cumsum([3, 2] if space == "multi_discrete" else [2, 2, 2])[:-1])
            count = mask.sum() if space == "discrete" else np.prod([block.sum() for block in blocks])
            np.testing.assert_allclose(first.log_proposal[n], -np.log(count))
    assert model.outcome_counts["accepted"] == 1


# -- when, and what is refused ---------------------------------------------------------------------------


def test_masks_are_a_matter_of_the_environment_unless_said_otherwise():
    masked, plain = (DummyVecEnv([lambda cls=cls: cls(spaces.Discrete(3))]) for cls in (Picky, Walk))
    assert model_of(masked)._is_masked and not model_of(plain)._is_masked
    model = model_of(plain, use_masking=True)
    with pytest.raises(ValueError, match=r"use_masking=True needs an environment with action_masks\(\)"):
        model.learn(T)
    model.learn(T, use_masking=False)
    assert not hasattr(samples_of(model), "action_masks")
    with pytest.raises(ValueError, match="use_masking=True needs"):
        model.learn(T)
    with pytest.raises(AssertionError):
        model_of(masked, use_masking=False).learn(8 * T)
    model.set_env(masked)
    model.learn(T)
    assert hasattr(samples_of(model), "action_masks")
    # a run without leaves nothing behind
    model.set_env(plain)
    model.learn(T, use_masking=False)
    assert not hasattr(samples_of(model), "action_masks")


def test_what_is_refused():
    env = DummyVecEnv([lambda: Picky(spaces.Discrete(3))])
    with pytest.raises(ValueError, match="use_masking must be one of 'auto', True, False, got 'yes'"):
        model_of(env, use_masking="yes")
    with pytest.raises(ValueError, match="use_masking must be one of"):
        model_of(env).learn(T, use_masking=2)
    with pytest.raises(AssertionError, match="The algorithm only supports"):
        model_of(IdentityEnvBox(), use_masking=True)
    with pytest.raises(ValueError, match=r"policy must be a name, or a class whose get_distribution\(\) takes action_masks"):
        model_of(env, policy=ActorCriticPolicy, use_masking=True)
    model_of(env, policy=ActorCriticPolicy)
    with pytest.raises(ValueError, match="action_masks must be None for Box"):
        model_of(IdentityEnvBox()).predict(np.zeros(1), action_masks=[True])
    with pytest.raises(NoActionAllowed, match="mask of observation 0 allows none of the 3 choices"):
        model_of(env).predict(np.zeros(3), action_masks=[0, 0, 0])
    with pytest.raises(ValueError, match="mask of observation 0 must have 3 entries"):
        model_of(env).predict(np.zeros(3), action_masks=[0, 1])


def test_an_environment_that_forbids_everything_is_named():
    class Stuck(Walk):
        n_steps = 0

        def action_masks(self):
            self.n_steps += 1
            return [True, True, self.n_steps < 5, False, False]

    env = DummyVecEnv([lambda: Picky(FINITE["multi_discrete"]), lambda: Stuck(FINITE["multi_discrete"])])
    with pytest.raises(NoActionAllowed, match=r"environment 1 allows none of the 2 choices in dimension 1 of MultiDiscrete"):
        model_of(env).learn(2 * T)


def test_a_buffer_that_makes_its_samples_in_a_way_of_its_own_is_told_of():
    class Own(RolloutBuffer):
        def get(self, batch_size=None):
            for samples in super().get(batch_size):
                yield RolloutBufferSamples(*(getattr(samples, name) for name in RolloutBufferSamples._fields))

    model = model_of(DummyVecEnv([lambda: Picky(spaces.Discrete(3))]), rollout_buffer_class=Own)
    with pytest.raises(ValueError, match="samples must have action_masks"):
        model.learn(T)


# -- predict, evaluation, archives -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["MlpPolicy", MaskableActorCriticPolicy])
@pytest.mark.parametrize("space", FINITE)
def test_predict_and_sb3_contribs_evaluation(space, policy, tmp_path):
    env = Monitor(limited(Picky(FINITE[space])))
    model = model_of(env, policy=policy)
    evaluate_maskable(model, env, 3)
    with pytest.raises(AssertionError):
        evaluate_maskable(model, env, 10, use_masking=False, deterministic=False)
    model.learn(T, callback=MaskableEvalCallback(env, eval_freq=T, warn=False, log_path=tmp_path, verbose=0))
    obs = env.observation_space.sample()
    for deterministic in (True, False):
        for _ in range(5):
            env.reset()
            mask = env.get_wrapper_attr("action_masks")()
            action, state = model.predict(obs, deterministic=deterministic, action_masks=mask)
            assert is_allowed(FINITE[space], mask, action) and state is None
            assert env.action_space.contains(np.asarray(action, dtype=env.action_space.dtype))
            actions, _ = model.predict(np.stack([obs, obs]), action_masks=[mask, mask])
            assert actions.shape == (2, *env.action_space.shape)


def test_archives_keep_what_was_said_and_go_on(tmp_path):
    env = DummyVecEnv([lambda: Picky(spaces.Discrete(3))])
    model = model_of(env, use_masking=True)
    model.learn(T, use_masking=True)
    model.save(tmp_path / "model")
    loaded = TRPOExt.load(tmp_path / "model", env)
    assert loaded.use_masking is True and loaded._is_masked
    loaded.learn(T)
    assert not TRPOExt.load(tmp_path / "model")._is_masked
    assert TRPOExt.load(tmp_path / "model", env, use_masking=False)._is_masked is False


@pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt, KLPPOExt])
@pytest.mark.parametrize("space", FINITE)
@pytest.mark.filterwarnings("ignore:batch_size=:UserWarning", "ignore:.*makes no use of:UserWarning")
def test_archives_of_maskable_ppo_load_and_train(space, algorithm, tmp_path):
    env = DummyVecEnv([lambda: Picky(FINITE[space])])
    theirs = MaskablePPO("MlpPolicy", env, n_steps=T, n_epochs=1, seed=0, device="cpu")
    theirs.learn(T)
    theirs.save(tmp_path / "theirs")
    ours = algorithm.load(tmp_path / "theirs", env)
    obs = np.zeros((1, 3), dtype=np.float32)
    masks = env.env_method("action_masks")
    actions = [m.predict(obs, deterministic=True, action_masks=np.stack(masks))[0] for m in (theirs, ours)]
    assert np.array_equal(*actions)
    ours.learn(T)
    assert ours._is_masked and ours.outcome_counts["accepted"] == 1


def test_a_buffer_with_further_fields_can_be_copied_and_pickled():
    model = model_of(DummyVecEnv([lambda: Picky(spaces.Discrete(3))]))
    model.learn(T)
    for again in (copy.deepcopy(model.rollout_buffer), pickle.loads(pickle.dumps(model.rollout_buffer))):
        assert isinstance(again, RolloutBuffer) and again.full
        assert th.equal(samples_of_buffer(again).action_masks, samples_of_buffer(model.rollout_buffer).action_masks)


def samples_of_buffer(buffer):
    np.random.seed(0)
    return next(iter(buffer.get(None)))


def test_masking_makes_a_hard_task_easy():
    """Of 20 actions, 19 are forbidden: who keeps to masks need not learn anything."""

    class OneWay(gym.Env):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(20)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.right, self.t = int(self.np_random.integers(20)), 0
            return np.zeros(1, dtype=np.float32), {}

        def action_masks(self):
            return np.arange(20) == self.right

        def step(self, action):
            reward, self.t = float(action == self.right), self.t + 1
            self.right = int(self.np_random.integers(20))
            return np.zeros(1, dtype=np.float32), reward, self.t == 10, False, {}

    model = model_of(Monitor(OneWay()))
    assert evaluate_maskable(model, Monitor(OneWay()), 3)[0] == 10.0
    assert evaluate_maskable(model, Monitor(OneWay()), 3, use_masking=False)[0] < 5.0


@pytest.mark.parametrize(
    "space, share",
    [
        (spaces.Discrete(2), 1.0),
        (spaces.Discrete(10), 0.36),
        (spaces.MultiDiscrete([2, 10]), 0.68),
        (spaces.MultiDiscrete([1, 10]), 0.36),
        (spaces.Discrete(1), 1.0),
        (spaces.MultiBinary(3), 3.0),
    ],
)
def test_the_default_damping_is_to_the_curvature_what_it_is_with_two_choices(space, share):
    """p(1 - p) of one among n equally likely choices is (n - 1) / n^2, for two 1/4."""
    masked, plain = (DummyVecEnv([lambda cls=cls: cls(space)]) for cls in (Picky, Walk))
    assert model_of(masked).cg_damping == pytest.approx(0.1 * share)
    dimensions = 3.0 if isinstance(space, spaces.MultiBinary) else 1.0
    assert model_of(plain).cg_damping == model_of(masked, use_masking=False).cg_damping == 0.1 * dimensions
    assert model_of(masked, cg_damping=0.2).cg_damping == 0.2
