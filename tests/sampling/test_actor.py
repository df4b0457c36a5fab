import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from torch import nn

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.distributions import family_of
from sb3_trpo_ext.sampling import noise as noise_module
from sb3_trpo_ext.sampling.actor import SB3Actor, TorchActor, numpy_actor, usable
from sb3_trpo_ext.sampling.heads import BernoulliHead, CategoricalHead, GaussianHead, head_of
from tests.cases import ACTION_SPACES, CASES
from tests.envs import Walk

OBSERVATION_SPACES = {
    "box": spaces.Box(-2, 2, (3,)),
    "box_float64": spaces.Box(-2, 2, (3,), dtype=np.float64),
    "box_matrix": spaces.Box(-2, 2, (2, 3)),
    "box_int": spaces.Box(0, 9, (4,), dtype=np.int64),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "multi_binary": spaces.MultiBinary(4),
}
E = 6


def policy_of(observation_space, action_space, activation=nn.Tanh, **kwargs):
    policy = ActorCriticPolicy(observation_space, action_space, lambda _: 1e-3, activation_fn=activation, **kwargs)
    for parameter in policy.parameters():
        parameter.data += 0.2 * th.randn_like(parameter)
    policy.set_training_mode(False)
    return policy


def batch_of(space, n=E, seed=0):
    space.seed(seed)
    return np.stack([space.sample() for _ in range(n)])


def both(policy, n_envs=E, n_steps=3):
    fast = numpy_actor(policy, n_envs)
    general = TorchActor(policy.get_distribution, policy, n_envs)
    for actor in (fast, general):
        th.manual_seed(4)
        actor.prepare(n_steps)
    return fast, general


@pytest.mark.parametrize("actions", ACTION_SPACES)
@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
def test_numpy_and_torch_give_the_same_outputs_and_from_the_same_noise_the_same_actions(observations, actions):
    space = OBSERVATION_SPACES[observations]
    policy = policy_of(space, ACTION_SPACES[actions])
    fast, general = both(policy)
    for step in range(3):
        obs = batch_of(space, seed=step)
        with th.no_grad():
            distribution = policy.get_distribution(th.as_tensor(obs))
        outputs = family_of(distribution).parameters(distribution)[0]
        mine = th.as_tensor(fast.outputs(obs).copy())
        if actions == "discrete":  # torch normalises its logits
            mine = mine.log_softmax(dim=1)
        if actions == "multi_discrete":
            mine = th.cat([part.log_softmax(dim=1) for part in mine.split([3, 2], dim=1)], dim=1)
        th.testing.assert_close(mine, outputs, rtol=1e-5, atol=1e-5)
        a, b = fast.act(obs, step).actions, general.act(obs, step).actions
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        sb3 = policy(th.as_tensor(obs))[0].detach().numpy()
        assert a.shape == b.shape == sb3.shape and a.dtype == b.dtype == sb3.dtype


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU])
@pytest.mark.parametrize("n_envs", [1, 5])
def test_activations(activation, n_envs):
    space = spaces.Box(-9, 9, (4,))
    policy = policy_of(space, ACTION_SPACES["box"], activation, net_arch=[16, 8])
    obs = batch_of(space, n_envs)
    with th.no_grad():
        expected = policy.get_distribution(th.as_tensor(obs)).mode().numpy()
    np.testing.assert_allclose(numpy_actor(policy, n_envs).outputs(obs), expected, rtol=1e-5, atol=1e-5)


def test_no_hidden_layer_and_several_action_dimensions():
    policy = policy_of(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2, 2)), net_arch=[])
    fast, general = both(policy)
    obs = batch_of(policy.observation_space)
    assert fast.act(obs, 0).actions.shape == (E, 2, 2)
    np.testing.assert_allclose(fast.act(obs, 0).actions, general.act(obs, 0).actions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if not c.use_sde and not c.learned_extractor], ids=lambda c: c.name)
def test_actions_have_the_distribution_of_the_policy(case):
    policy = case.policy(dtype=th.float32)
    n = 40_000
    obs = np.repeat(batch_of(policy.observation_space, 1), n, axis=0)
    fast = numpy_actor(policy, n)
    fast.prepare(1)
    actions = th.as_tensor(fast.act(obs, 0).actions)
    with th.no_grad():
        distribution = policy.get_distribution(th.as_tensor(obs))
        # the mean log-probability of draws from a distribution is minus its entropy
        log_prob = distribution.log_prob(actions)
        entropy = distribution.entropy()
    error = float((log_prob + entropy).mean() / (log_prob.std() / n**0.5))
    assert abs(error) < 4
    if case.space == "box":
        mean, std = distribution.distribution.mean[0], distribution.distribution.stddev[0]
        assert ((actions.mean(dim=0) - mean).abs() < 4 * std / n**0.5).all()
        th.testing.assert_close(actions.std(dim=0), std, rtol=0.02, atol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_weights_are_copied_when_the_actor_is_made(n):
    policy = policy_of(spaces.Box(-1, 1, (n,)), spaces.Box(-1, 1, (n,)))
    fast, obs = numpy_actor(policy, E), batch_of(policy.observation_space)
    before = fast.outputs(obs).copy()
    for parameter in policy.parameters():
        parameter.data += 1.0
    np.testing.assert_array_equal(fast.outputs(obs), before)


class OwnForward(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


class OwnLatent(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi):
        return super()._get_action_dist_from_latent(latent_pi * 2)


class Frozen(nn.Tanh):
    pass


def make(cls=ActorCriticPolicy, space=OBSERVATION_SPACES["box"], action_space=ACTION_SPACES["box"], **kwargs):
    return cls(space, action_space, lambda _: 1e-3, **kwargs)


@pytest.mark.parametrize(
    "policy",
    [
        make(OwnForward),
        make(OwnLatent),
        make(use_sde=True),
        make(activation_fn=Frozen),
        make(activation_fn=nn.GELU),
        make(space=spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)),
    ],
)
def test_policies_that_are_anything_else_have_no_fast_actor(policy):
    assert numpy_actor(policy, 1) is None


def test_hooks_and_patched_methods_are_respected():
    policy = make()
    assert numpy_actor(policy, 1) is not None
    handle = policy.register_forward_hook(lambda *_: None)
    assert numpy_actor(policy, 1) is None
    handle.remove()
    for module in (policy.features_extractor, policy.mlp_extractor, policy.mlp_extractor.policy_net):
        handle = module.register_forward_hook(lambda *_: None)
        assert numpy_actor(policy, 1) is None
        handle.remove()
    policy.log_std.register_hook(lambda gradient: None)
    assert numpy_actor(policy, 1) is None, "the Fisher products would go round it"
    policy = make()
    policy.get_distribution = lambda obs: None
    assert numpy_actor(policy, 1) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e300])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_entries_that_are_not_usable_act_as_zeros(bad, n_envs):
    space = spaces.Box(-1, 1, (3,), dtype=np.float64 if bad == 1e300 else np.float32)
    policy = policy_of(space, ACTION_SPACES["box"], activation=nn.ReLU)
    fast, general = both(policy, n_envs)
    obs = batch_of(policy.observation_space, n_envs)
    zeroed = obs.copy()
    obs[0, 1], zeroed[0, 1] = bad, 0.0
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(fast.outputs(obs).copy(), fast.outputs(zeroed))
    np.testing.assert_array_equal(general.act(obs, 0).actions, general.act(zeroed, 0).actions)
    assert obs[0, 1] != 0.0, "the caller's observation is left as it was"


def test_usable_leaves_good_observations_alone():
    good = {"a": np.ones(3), "b": np.ones(2, dtype=np.uint8)}
    assert all(usable(good)[key] is good[key] for key in good)
    spoiled = np.array([np.nan, 1.0, -np.inf, 1e300])
    assert usable({"a": spoiled})["a"].tolist() == [0.0, 1.0, 0.0, 0.0] and np.isnan(spoiled[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_usable_knows_every_precision(dtype):
    huge = min(1e18, float(np.finfo(dtype).max))
    spoiled = np.array([np.inf, huge, np.nan, -np.inf], dtype=dtype)
    assert usable(spoiled).tolist() == [0.0, spoiled[1], 0.0, 0.0] and usable(spoiled).dtype == dtype


def test_distributions_without_a_head():
    assert head_of(make(use_sde=True).action_dist) is None


@pytest.mark.parametrize(
    "head", [GaussianHead(3), BernoulliHead(3), CategoricalHead([3], flat=True)], ids=lambda h: type(h).__name__
)
@pytest.mark.parametrize("n_steps, n_envs", [(64, 1), (113, 2), (49, 5), (17, 1)])
def test_noise_drawn_in_blocks_is_that_drawn_at_once(monkeypatch, head, n_steps, n_envs):
    drawn = []
    for most in (2**23, 100, 1):
        monkeypatch.setattr(noise_module, "_MOST_NUMBERS_AHEAD", most)
        th.manual_seed(0)
        sizes = []

        def draw(steps, sizes=sizes):
            sizes.append(steps)
            return head.noise((steps, n_envs, 3))

        noise = noise_module.noise_ahead(draw, n_steps, 3 * n_envs)
        drawn.append(np.stack([noise[step].copy() for step in range(n_steps)] + [th.rand(n_envs, 3).numpy()]))
        assert sum(sizes) == n_steps and (max(sizes) < 48 if most < n_steps * n_envs * 3 and n_steps > 48 else True)
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU], ids=["numpy", "torch"])
def test_a_rollout_draws_a_great_deal_of_noise_in_blocks(monkeypatch, activation):
    actions = []
    for most in (2**23, 40):
        monkeypatch.setattr(noise_module, "_MOST_NUMBERS_AHEAD", most)
        model = TRPOExt("MlpPolicy", Walk(), n_steps=64, seed=0, device="cpu", policy_kwargs=dict(activation_fn=activation))
        actor = model._make_actor(model.rollout_buffer)
        actor.prepare(64)
        assert isinstance(actor._noise, noise_module.NoiseInBlocks) is (most == 40)
        model.set_random_seed(0)
        actions.append(model.learn(64).rollout_buffer.actions.copy())
    assert np.array_equal(*actions)


CHOICES = {"discrete": spaces.Discrete(5), "multi_discrete": spaces.MultiDiscrete([3, 4])}
WAYS = {
    "numpy": lambda policy: numpy_actor(policy, E),
    "torch": lambda policy: TorchActor(policy.get_distribution, policy, E),
    "sb3": SB3Actor,
}


def acted(way, policy, obs):
    actor = WAYS[way](policy)
    th.manual_seed(4)
    actor.prepare(1)
    return actor.act(obs, 0).actions


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int32, np.uint64, bool])
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("way", WAYS)
def test_choices_that_come_as_other_numbers_are_cast_as_sb3_casts_them(way, kind, dtype):
    policy = policy_of(CHOICES[kind], ACTION_SPACES["box"])
    obs = batch_of(CHOICES[kind]) % (2 if dtype is bool else 9)
    expected = acted(way, policy, obs)
    np.testing.assert_array_equal(acted(way, policy, obs.astype(dtype)), expected)
    if np.dtype(dtype).kind == "f":
        np.testing.assert_array_equal(acted(way, policy, obs.astype(dtype) + dtype(0.5)), expected)


@pytest.mark.parametrize("bad", [-1, 7])
@pytest.mark.parametrize("kind", [*CHOICES, "dict"])
@pytest.mark.parametrize("way", WAYS)
def test_a_number_that_is_no_choice_is_named_with_its_space(way, kind, bad):
    space, cls = CHOICES.get(kind, CHOICES["multi_discrete"]), ActorCriticPolicy
    obs = batch_of(space)
    obs.reshape(E, -1)[2, 0] = bad
    policy = policy_of(space, ACTION_SPACES["box"])
    if kind == "dict":
        if way == "numpy":
            return  # acts on vectors alone
        cls, space, obs = MultiInputActorCriticPolicy, spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": space}), {"b": obs}
        obs["a"] = np.zeros((E, 2), dtype=np.float32)
        policy = cls(space, ACTION_SPACES["box"], lambda _: 1e-3)
    limit = 4 if kind == "discrete" else 2
    with pytest.raises(ValueError, match=rf"observations in .*Discrete.* must be integers from 0 to {limit}, got {bad}$"):
        acted(way, policy, obs)


@pytest.mark.parametrize("way", WAYS)
def test_what_came_is_named_as_it_came(way):
    obs = np.full(E, 1.0)
    obs[2] = 5.5
    with pytest.raises(ValueError, match=r"observations in Discrete\(5\) must be integers from 0 to 4, got 5\.5$"):
        acted(way, policy_of(spaces.Discrete(5), ACTION_SPACES["box"]), obs)


def test_an_observation_space_with_a_start_is_told_of():
    space = spaces.Discrete(5, start=3)
    with pytest.raises(ValueError, match=r"in Discrete\(5, start=3\) must be .* 0 to 4, got 7; SB3 knows no start: subtract"):
        acted("numpy", policy_of(space, ACTION_SPACES["box"]), np.full(E, 7))


class OwnNormal(th.distributions.Normal):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) + 1000.0


class OwnFamily(ActorCriticPolicy):
    """Puts another distribution into SB3's."""

    def _get_action_dist_from_latent(self, latent_pi):
        distribution = super()._get_action_dist_from_latent(latent_pi)
        distribution.distribution = OwnNormal(distribution.distribution.loc, distribution.distribution.scale)
        return distribution


def test_a_distribution_of_another_class_inside_sb3s_draws_its_own_actions():
    policy = make(OwnFamily)
    assert acted("torch", policy, batch_of(policy.observation_space)).min() > 900
