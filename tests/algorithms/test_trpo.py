"""TRPOExt as an SB3 algorithm: arguments, spaces, callbacks, logs, reproducibility, critics."""

import inspect
import re
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.checks import default_of
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling import budget
from tests.cases import ACTION_SPACES, LearnedExtractor
from tests.envs import Walk, limited

FAST = dict(n_steps=64, seed=0, device="cpu")


def make(policy="MlpPolicy", env=None, **arguments):
    return TRPOExt(policy, env or limited(Walk()), **{**FAST, **arguments})


def actor_of(model):
    return [p.detach().clone() for name, p in model.policy.named_parameters() if "value" not in name]


# -- arguments -------------------------------------------------------------------------------------


def test_every_argument_of_sb3_contrib_keeps_its_name_position_and_default():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (TRPOExt, TRPO))
    shared = list(ours)[: len(theirs)]
    assert shared == list(theirs)
    other_scale = {"target_kl", "cg_damping"}
    assert [n for n in theirs if ours[n].default != theirs[n].default] == sorted(other_scale)
    assert all(ours[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(ours)[len(theirs) :])


@pytest.mark.parametrize("space, d", [("box", 2), ("multi_binary", 3), ("discrete", 1), ("multi_discrete", 1)])
def test_the_default_trust_region_is_sb3_contribs_whichever_way_it_is_written(space, d):
    summed, mean = (make(env=Walk(ACTION_SPACES[space]), kl_reduction=reduction) for reduction in ("sum", "mean"))
    assert (summed.target_kl, summed.cg_damping) == (pytest.approx(0.01 * d), pytest.approx(0.1 * d))
    assert (mean.target_kl, mean.cg_damping) == (0.01, 0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(target_kl=0.0),
        dict(target_kl=float("nan")),
        dict(target_kl=float("inf")),
        dict(cg_damping=-0.1),
        dict(cg_damping=float("nan")),
        dict(cg_max_steps=0),
        dict(line_search_shrinking_factor=1.0),
        dict(line_search_shrinking_factor=0.0),
        dict(line_search_max_iter=0),
        dict(line_search_accept_ratio=1.0),
        dict(line_search_accept_ratio=-0.1),
        dict(sub_sampling_factor=0),
        dict(fisher="kfac"),
        dict(kl_reduction="max"),
        dict(critic="sgd"),
        dict(critic_steps=0, critic="gauss_newton"),
        dict(critic_cg_steps=0, critic="gauss_newton"),
        dict(n_critic_updates=0, critic="adam"),
        dict(batch_size=0, critic="adam"),
        dict(ent_coef=-1.0),
        dict(max_grad_norm=-1.0, critic="adam", batch_size=64),
        dict(chunk_size=0),
        dict(initial_std=0.0),
        dict(initial_std=float("nan")),
        dict(initial_std="1"),
        dict(chunk_size=10.5),
        dict(cg_max_steps=2.5),
        dict(target_kl="0.01"),
        dict(n_steps=0),
        dict(gamma=float("nan")),
        dict(gamma=2.0),
        dict(gae_lambda=-1.0),
        dict(ent_coef=float("inf")),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused_by_name(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=rf"{name} must be .*got {re.escape(repr(arguments[name]))}"):
        make(**arguments)


def test_one_warning_names_the_keywords_without_effect():
    with pytest.warns(UserWarning, match=r"'gauss_newton' makes no use of learning_rate=0.1, n_critic_updates=3$") as caught:
        make(learning_rate=0.1, n_critic_updates=3, critic="gauss_newton")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="'none' makes no use of gae_lambda=0.5"):
        make(critic="none", gae_lambda=0.5)
    with pytest.warns(UserWarning, match="'adam' makes no use of critic_steps=7"):
        make(critic="adam", critic_steps=7, batch_size=64)


def test_a_truncated_minibatch_warns_as_in_sb3_contrib():
    with pytest.warns(UserWarning, match="batch_size=128 does not divide"):
        make(critic="adam")


def test_single_transitions_cannot_be_normalised():
    with pytest.raises(AssertionError, match="must be greater than 1"):
        make(n_steps=1)
    make(n_steps=1, normalize_advantage=False).learn(3)


def test_defaults_are_found_through_subclasses_with_kwargs():
    class A2CLike(TRPOExt):
        def __init__(self, *args, gae_lambda=1.0, **kwargs):
            super().__init__(*args, gae_lambda=gae_lambda, **kwargs)

    assert default_of(A2CLike, "gae_lambda") == 1.0 and default_of(A2CLike, "batch_size") == 128
    with pytest.raises(TypeError, match="no keyword 'nothing'"):
        default_of(A2CLike, "nothing")


def test_rollout_buffer_class_as_a_dotted_path():
    model = make(rollout_buffer_class="stable_baselines3.common.buffers.RolloutBuffer")
    assert type(model.rollout_buffer).__name__ == "RolloutBuffer"
    for bad in ("no.such.Buffer", "Buffer", "stable_baselines3.common.buffers.Nothing"):
        with pytest.raises(ValueError, match="class or its dotted path"):
            make(rollout_buffer_class=bad)


def test_the_trust_region_is_printed_in_one_line(capsys):
    make(verbose=1, target_kl=0.03)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Trust region" in line]
    assert len(lines) == 1
    for part in ("0.03", "sum over 2 action dimension", "damping 0.2", "numpy"):
        assert part in lines[0]


# -- what trains -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["auto", "gauss_newton", "hessian", "empirical"])
@pytest.mark.parametrize("space", ACTION_SPACES)
def test_every_action_space_and_fisher_choice(space, fisher):
    model = make(env=limited(Walk(ACTION_SPACES[space])), fisher=fisher, ent_coef=0.01, sub_sampling_factor=3)
    start = actor_of(model)
    model.learn(192)
    assert not all(th.equal(a, b) for a, b in zip(start, actor_of(model), strict=True))
    assert 0 < model.report.kl <= model.target_kl or model.report.kl == 0


class NormDropout(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(self.features_dim), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


def test_with_batch_norm_and_dropout_the_step_starts_near_the_policy_that_acted(monkeypatch):
    model = make(policy_kwargs=dict(features_extractor_class=NormDropout))
    seen = []

    def update(problem):
        seen.append((problem.evaluate(), problem._objective_old))
        return TRPOExt._update_policy(model, problem)

    model._update_policy = update
    mean_before = model.policy.features_extractor.layers[1].running_mean.clone()
    model.learn(64)
    (start, objective_old), statistics = seen[0], model.policy.features_extractor.layers[1]
    assert 0.0 < start.kl <= 0.25 * model.target_kl and start.objective == objective_old
    assert not th.equal(statistics.running_mean, mean_before)
    assert int(statistics.num_batches_tracked) > 0 and not model.policy.training
    assert model.report.outcome == "accepted"


class Routed(BaseFeaturesExtractor):
    """Sends each state through one of two layers."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.routes = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])

    def forward(self, observations):
        first = observations[:, :1] > 0
        if bool(first.all()) or not bool(first.any()):
            return self.routes[int(bool(first.all()))](observations)
        return th.where(first, self.routes[1](observations), self.routes[0](observations))


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("extractor", [LearnedExtractor, Routed])
def test_the_critic_never_moves_the_policy(critic, share, extractor):
    kwargs = dict(batch_size=64, learning_rate=0.1) if critic == "adam" else {}
    model = make(
        critic=critic,
        policy_kwargs=dict(features_extractor_class=extractor, share_features_extractor=share),
        **kwargs,
    )
    obs = th.randn(9, 3)
    fit = model._fit_critic

    def checked(samples, policy_parameters):
        with th.no_grad():
            before = model.policy.get_distribution(obs).distribution.mean.clone()
            values = model.policy.predict_values(obs).clone()
        parameters = policy_parameters.read()
        report = fit(samples, policy_parameters)
        with th.no_grad():
            assert th.equal(model.policy.get_distribution(obs).distribution.mean, before)
            assert not th.equal(model.policy.predict_values(obs), values)
        assert th.equal(policy_parameters.read(), parameters)
        assert all(p.requires_grad for p in model.policy.parameters())
        return report

    model._fit_critic = checked
    model.learn(192)
    assert model.outcome_counts["accepted"] > 0


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_batch_norm_is_refreshed_once_also_in_chunks_with_a_rest_of_one(chunk_size):
    model = make(n_steps=65, chunk_size=chunk_size, policy_kwargs=dict(features_extractor_class=NormDropout))
    model.learn(65)
    assert int(model.policy.features_extractor.layers[1].num_batches_tracked) == 1


def test_a_skipped_update_leaves_running_statistics_alone(monkeypatch):
    model = make(policy_kwargs=dict(features_extractor_class=NormDropout))
    model.learn(64)
    before = [buffer.clone() for buffer in model.policy.buffers()]
    monkeypatch.setattr(PolicyProblem, "fisher_product", lambda self: lambda v: v * float("nan"))
    with pytest.warns(UserWarning, match="curvature"):
        model.learn(64, reset_num_timesteps=False)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.buffers(), strict=True))


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_an_update_keeps_no_more_unfolded_observations_than_a_chunk_and_comes_out_the_same(critic):
    updated = []
    for chunk_size in (8, None):
        env = limited(Walk(observation_space=spaces.Discrete(50)))
        arguments = dict(batch_size=8) if critic == "adam" else {}
        model = make(env=env, critic=critic, chunk_size=chunk_size, **arguments)
        model.learn(64)
        samples = next(iter(model.rollout_buffer.get(None)))
        problem = model._policy_problem(samples)
        for _, inputs in (problem._mlp, model._critic_problem(samples, problem.parameters).mlp):
            assert isinstance(inputs, th.Tensor) is (chunk_size is None)
        assert model.outcome_counts == {"accepted": 1}
        updated.append(th.cat([p.detach().flatten() for p in model.policy.parameters()]))
    th.testing.assert_close(*updated, rtol=1e-3, atol=1e-4)


def test_without_a_chunk_size_the_width_of_the_layers_counts_too():
    observations = np.zeros((1, 3))
    narrow, wide = (make(policy_kwargs=dict(net_arch=[width])) for width in (64, 4096))
    assert narrow.states_per_pass(observations) > 1e5
    assert 3 * 4096 * 4 * wide.states_per_pass(observations) < 2**28
    assert make(chunk_size=5).states_per_pass(observations) == 5


class Convolutions(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 64, 4))

    def forward(self, observations):
        return self.layers(observations)


class Recurrent(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 64)
        self.layer = nn.LSTM(3, 64, batch_first=True)

    def forward(self, observations):
        return self.layer(observations)[0][:, -1]


WIDE = {
    # name: observations, actions, extractor, numbers in one state at once
    "one-hot observations": (spaces.Discrete(5000), None, None, 15000),
    "several one-hot observations": (spaces.MultiDiscrete([2500, 2500]), None, None, 15000),
    "one-hot observations in a dict": (spaces.Dict(a=spaces.Discrete(5000), b=spaces.Box(-1, 1, (2,))), None, None, 15002),
    "many choices": (None, spaces.Discrete(5000), None, 50000),
    "several with many choices": (None, spaces.MultiDiscrete([2500, 2500]), None, 50000),
    "many switches": (None, spaces.MultiBinary(5000), None, 50000),
    "small images": (spaces.Box(-1, 1, (3, 8, 8)), None, Convolutions, 3 * 64 * 64 / 4),
    "recurrent": (spaces.Box(-1, 1, (50, 3)), None, Recurrent, 3 * 50 * 64 * 6 / 4),
}


@pytest.mark.parametrize("observation_space, action_space, extractor, numbers", WIDE.values(), ids=WIDE)
def test_without_a_chunk_size_what_the_networks_see_and_keep_counts(observation_space, action_space, extractor, numbers):
    kwargs = {} if extractor is None else dict(features_extractor_class=extractor)
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = make(policy, Walk(action_space, observation_space), policy_kwargs=kwargs)
    observations = model.policy.obs_to_tensor(model.observation_space.sample())[0]
    random = th.get_rng_state()
    assert 256 <= model.states_per_pass(observations) <= 2**24 // numbers
    assert th.equal(th.get_rng_state(), random) and model.states_per_pass(observations) == model.states_per_pass(observations)


def test_what_autograd_keeps_of_a_policy_is_measured_once_a_rollout_and_by_state(monkeypatch):
    asked = []
    monkeypatch.setattr(
        budget, "numbers_saved", lambda function, module: asked.append(function) or 10**6 + 5000 * len(function())
    )
    model = make(policy_kwargs=dict(activation_fn=nn.PReLU))
    monkeypatch.setattr(model, "action_distribution", lambda observations, samples=None: observations)
    monkeypatch.setattr(model, "predict_values", lambda observations: observations)
    sizes = [model.states_per_pass(np.zeros((n, 3), np.float32)) for n in (7, 7, 1)]
    assert sizes == [2**26 // (3 * 4997 + 3)] * 3 and len(asked) == 4


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_what_a_gradient_hook_holds_stays(critic):
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, critic=critic, seed=0, device="cpu")
    value, mean = model.policy.value_net.weight, model.policy.action_net.weight
    start = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    for held in (value, mean):
        held.register_hook(th.zeros_like)
    model.learn(64)
    assert model.outcome_counts == {"accepted": 1}
    moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, start[name])}
    assert moved == set(start) - {"value_net.weight", "action_net.weight"}


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_a_layer_put_in_later_is_trained_or_named(critic):
    """Its parameters are not the optimizer's, which alone Adam moves."""
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, critic=critic, seed=0, device="cpu")
    policy = model.policy
    policy.action_net, policy.value_net = nn.Linear(64, 2), nn.Linear(64, 1)
    starts = [layer.weight.detach().clone() for layer in (policy.action_net, policy.value_net)]
    named = pytest.warns(UserWarning, match="does not hold 2 of the 6 parameter tensors of the critic")
    with named if critic == "adam" else nullcontext():
        model.learn(64)
    moved = [not th.equal(a, b.weight) for a, b in zip(starts, (policy.action_net, policy.value_net), strict=True)]
    assert moved == [True, critic == "gauss_newton"]


def test_values_of_a_subclass_are_what_the_critic_fits():
    class Scaled(TRPOExt):
        def predict_values(self, observations):
            return 100.0 * super().predict_values(observations)

    model = Scaled("MlpPolicy", limited(Walk()), critic="gauss_newton", **FAST)
    model.learn(64)
    samples = next(iter(model.rollout_buffer.get(None)))
    with th.no_grad():
        errors = samples.returns - model.predict_values(samples.observations).flatten()
    assert float(errors.square().mean()) == pytest.approx(model.logger.name_to_value["train/value_loss"], rel=1e-4)


class ExtraSamples(NamedTuple):
    observations: th.Tensor
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    masks: th.Tensor
    lstm_states: tuple
    length: int


class ExtraBuffer(RolloutBuffer):
    def get(self, batch_size=None):
        for samples in super().get(batch_size):
            yield ExtraSamples(*samples[:6], samples.actions * 0, (th.zeros(1, 2, 3), th.zeros(1, 2, 3)), 7)


class Seeing(TRPOExt):
    def action_distribution(self, observations, samples=None):
        if samples is not None:
            assert len(samples.masks) == len(observations)
            assert samples.lstm_states[0].shape == (1, 2, 3) and samples.length == 7
        return super().action_distribution(observations, samples)


def test_further_fields_of_a_buffers_samples_reach_the_distributions():
    model = Seeing("MlpPolicy", limited(Walk()), rollout_buffer_class=ExtraBuffer, chunk_size=20, **FAST)
    model.learn(64)
    assert model.outcome_counts == {"accepted": 1}


def test_the_automatic_critic_follows_the_keywords_then_the_features(tmp_path):
    assert make().critic == "gauss_newton"
    assert make(learning_rate=1e-2, batch_size=64).critic == "adam"
    with pytest.warns(UserWarning, match="'adam' makes no use of critic_steps=2"):
        assert make(n_critic_updates=3, critic_steps=2, batch_size=64).critic == "adam"
    images = limited(Walk(observation_space=spaces.Box(0, 255, (1, 36, 36), np.uint8)))
    assert make("CnnPolicy", images, batch_size=64).critic == "adam"
    assert make("CnnPolicy", images, critic_steps=2).critic == "gauss_newton"
    make().save(tmp_path / "model")
    assert TRPOExt.load(tmp_path / "model").critic == "gauss_newton"


def test_without_a_critic_the_value_network_is_left_alone():
    model = make(critic="none")
    before = [p.clone() for name, p in model.policy.named_parameters() if "value" in name]
    model.learn(128)
    after = [p for name, p in model.policy.named_parameters() if "value" in name]
    assert all(th.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_optimizer_holds_all_parameters_in_sb3s_order():
    model = make()
    assert [id(p) for p in model.policy.optimizer.param_groups[0]["params"]] == [id(p) for p in model.policy.parameters()]


def test_chunks_do_not_change_an_update():
    adam = dict(critic="adam", batch_size=64)
    whole, chunked = make(**adam).learn(64), make(**adam, chunk_size=13).learn(64)
    for a, b in zip(whole.policy.parameters(), chunked.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_real_environments_train():
    make(env="HalfCheetah-v5", n_steps=128).learn(256)
    model = make(env="CartPole-v1", n_steps=1024, seed=1)
    model.learn(20_480)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    assert np.mean(returns[-20:]) > 120  # a random policy has 22


# -- the SB3 contract --------------------------------------------------------------------------------


def test_log_keys_and_their_meaning(tmp_path):
    model = make(env="Pendulum-v1", target_kl=0.02)
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    model.learn(64)
    for output in model.logger.output_formats:
        output.close()
    log = model.logger.name_to_value
    for key in ("policy_objective", "value_loss", "kl_divergence_loss", "explained_variance", "is_line_search_success"):
        assert np.isfinite(log[f"train/{key}"]), key
    assert {"train/learning_rate", "train/n_updates", "train/std", "train/entropy"} <= set(log)
    assert log["train/kl_divergence_loss"] == model.report.kl <= log["trust_region/target_kl"] == 0.02
    for key in ("predicted_kl", "expected_improvement", "improvement", "fraction", "backtracks"):
        assert np.isfinite(log[f"trust_region/{key}"]), key
    for key in ("cg_iterations", "cg_residual", "gradient_norm", "step_norm"):
        assert log[f"trust_region/{key}"] > 0, key
    assert log["outcome/accepted"] == 1
    assert {"time/rollout_seconds", "time/policy_seconds", "time/critic_seconds"} <= set(log)


def test_what_is_logged_as_kl_is_the_kl_of_the_policies():
    model = make(env="Pendulum-v1")
    model.learn(64)
    old = model.policy.state_dict()
    old = {name: tensor.clone() for name, tensor in old.items()}
    model.learn(64, reset_num_timesteps=False)
    obs = th.as_tensor(model.rollout_buffer.observations)
    with th.no_grad():
        new = model.policy.get_distribution(obs).distribution
        new = th.distributions.Normal(new.mean.clone(), new.stddev.clone())
        model.policy.load_state_dict(old)
        before = model.policy.get_distribution(obs).distribution
    expected = th.distributions.kl_divergence(before, new).sum(dim=1).mean()
    assert model.report.kl == pytest.approx(float(expected), rel=1e-4)


def test_schedules_and_names(tmp_path):
    model = make(critic="adam", batch_size=64, learning_rate=LinearSchedule(1e-2, 1e-3, 1.0), tensorboard_log=str(tmp_path))
    model.learn(128)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert (tmp_path / "TRPOExt_1").is_dir()


def test_a_constant_schedule_at_the_default_is_no_reason_to_warn():
    from stable_baselines3.common.utils import ConstantSchedule

    make(learning_rate=ConstantSchedule(1e-3), critic="gauss_newton")


class ValueNamed(ActorCriticPolicy):
    """The actor goes through a layer that is called value_*."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.value_something = nn.Linear(64, 64)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi):
        return super()._get_action_dist_from_latent(th.tanh(self.value_something(latent_pi)))


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_a_policy_parameter_called_value_is_a_policy_parameter(critic):
    model = make(ValueNamed, critic=critic, **(dict(batch_size=64) if critic == "adam" else {}))
    assert model.actor_path == "torch"
    before = model.policy.value_something.weight.clone()
    model.learn(64)
    assert not th.equal(model.policy.value_something.weight, before)


class Attention(BaseFeaturesExtractor):
    """Attends to the entries of an observation as tokens, then looks up one that it picks."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.read = nn.Linear(1, 4)
        self.attend = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.look_up = nn.EmbeddingBag(3, 4)

    def forward(self, observations):
        chosen = observations.argmax(dim=1, keepdim=True)
        return self.attend(self.read(observations[:, :, None])).mean(dim=1) + self.look_up(chosen)


@pytest.mark.parametrize("fisher", ["auto", "hessian", "empirical"])
def test_attention_and_embedding_bags_train(fisher):
    kwargs = dict(features_extractor_class=Attention, share_features_extractor=False)
    model = make(policy_kwargs=kwargs, fisher=fisher, critic="gauss_newton")
    model.learn(128)
    assert model.outcome_counts == {"accepted": 2}
