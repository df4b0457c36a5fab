"""Layers with running statistics: those of the batch, within the bound on the KL, and as they were after an interrupt."""

import copy
import inspect
import sys

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt
from tests.envs import Walk, limited

FAR = spaces.Box(-30.0, 30.0, (3,))
FRAMES = spaces.Box(0, 255, (2, 6, 6), np.uint8)


class Shifted(Walk):
    """Observations around ``centre``."""

    def __init__(self, space=FAR, centre=10.0):
        super().__init__(observation_space=space)
        self.centre = centre

    def _observation(self):
        if self.observation_space is FRAMES:
            return self.np_random.integers(0, 256, FRAMES.shape, dtype=np.uint8)
        return (self.centre + self.np_random.normal(size=3)).astype(np.float32)


class Normalised(BaseFeaturesExtractor):
    def __init__(self, space, momentum=0.1, affine=True):
        super().__init__(space, 4)
        if len(space.shape) == 3:
            first = [nn.BatchNorm2d(2, momentum=momentum), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten()]
            n = 48
        else:
            first, n = [nn.BatchNorm1d(3, momentum=momentum, affine=affine)], 3
        self.layers = nn.Sequential(*first, nn.Dropout(0.5), nn.Linear(n, 4), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, observations):
        return self.layers(observations)


def make(algorithm=TRPOExt, space=FAR, n_steps=65, **arguments):
    kwargs = dict(features_extractor_class=Normalised) | arguments.pop("policy_kwargs", {})
    policy = "CnnPolicy" if space is FRAMES else "MlpPolicy"
    kwargs |= dict(normalize_images=False) if space is FRAMES else {}
    return algorithm(policy, limited(Shifted(space)), n_steps=n_steps, seed=0, device="cpu", policy_kwargs=kwargs, **arguments)


def norms(model):
    return [layer for layer in model.policy.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def samples_of(model):
    return next(iter(model.rollout_buffer.get(None)))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("space", [FAR, FRAMES], ids=["vectors", "images"])
def test_running_statistics_are_those_of_the_batch_whatever_the_chunks(space, share):
    models = [
        make(space=space, chunk_size=size, policy_kwargs=dict(share_features_extractor=share)).learn(65)
        for size in (None, 64, 7)
    ]
    first, *others = ([buffer for layer in norms(model) for buffer in layer.buffers()] for model in models)
    for other in others:
        for ours, whole in zip(other, first, strict=True):
            th.testing.assert_close(ours, whole)
    layer, inputs = norms(models[0])[0], samples_of(models[0]).observations.float()
    dimensions = [0, *range(2, inputs.ndim)]
    th.testing.assert_close(layer.running_mean, inputs.mean(dimensions))
    th.testing.assert_close(layer.running_var, inputs.var(dimensions))
    assert int(layer.num_batches_tracked) == 1 and not models[0].policy.training


def test_statistics_of_deeper_layers_are_those_of_what_evaluation_mode_gives_them():
    model = make(policy_kwargs=dict(net_arch=[]))
    model.critic = "none"  # no fit after the statistics
    model.learn(65)
    layers = model.policy.features_extractor.layers
    start = make(policy_kwargs=dict(net_arch=[])).policy.features_extractor.layers
    for own, moved in zip(start, layers, strict=True):
        for buffer, value in zip(own.buffers(), moved.buffers(), strict=True):
            buffer.copy_(value)
    start.eval()
    inputs = start[:3](samples_of(model).observations)
    th.testing.assert_close(layers[3].running_mean, inputs.mean(0).detach(), rtol=1e-4, atol=1e-5)
    th.testing.assert_close(layers[3].running_var, inputs.var(0).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_the_average_over_all_batches_and_no_change_mean_what_they_say(momentum):
    model = make(policy_kwargs=dict(features_extractor_kwargs=dict(momentum=momentum)))
    means, layer = [], norms(model)[0]
    for _ in range(2):
        model.learn(65, reset_num_timesteps=False)
        means.append(samples_of(model).observations.mean(0))
    expected = th.zeros(3) if momentum == 0.0 else th.stack(means).mean(0)
    th.testing.assert_close(layer.running_mean, expected)


def test_a_normalisation_that_its_owner_keeps_out_of_training_mode_stays():
    model = make()
    layer = norms(model)[0]
    layer.eval().train = lambda mode=True: layer
    model.learn(65)
    assert not layer.running_mean.any() and int(layer.num_batches_tracked) == 0
    assert int(norms(model)[1].num_batches_tracked) == 1


def acting(model, observations):
    model.policy.set_training_mode(False)
    with th.no_grad():
        return copy.deepcopy(model.policy.get_distribution(observations).distribution)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("centre", [10.0, -5.0])
@pytest.mark.parametrize("chunk_size", [None, 32])
def test_the_kl_between_acting_policies_is_what_is_reported_and_within_the_bound(chunk_size, centre, affine):
    model = make(n_steps=128, chunk_size=chunk_size, policy_kwargs=dict(features_extractor_kwargs=dict(affine=affine)))
    model.learn(256)
    for parameter in model.policy.parameters():
        parameter.data *= 1.5
    model.env.envs[0].unwrapped.centre = centre  # elsewhere
    train, distances = model.train, []
    before = norms(model)[0].running_mean.clone()

    def train_and_compare():
        observations = samples_of(model).observations
        old = acting(model, observations)
        train()
        distances.append(float(th.distributions.kl_divergence(old, acting(model, observations)).sum(1).mean()))
        if model.report.outcome == "accepted":
            assert model.report.kl == pytest.approx(distances[-1], rel=1e-3)

    model.train = train_and_compare
    model.learn(3 * 128, reset_num_timesteps=False)
    assert max(distances) <= model.target_kl * (1 + 1e-4) and model.report.outcome == "accepted"
    assert (norms(model)[0].running_mean - centre).abs().max() < max(1.0, (before - centre).abs().max())


class Assigned(BaseFeaturesExtractor):
    """A normalisation of somebody else's, which puts new tensors in its buffers' places."""

    def __init__(self, space):
        super().__init__(space, 3)
        self.register_buffer("mean", th.zeros(3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, observations):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * observations.mean(0)
        return self.norm(observations - self.mean)


def state_of(model):
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same(one, other):
    return all(th.equal(one[name], other[name]) for name in one)


def interrupted(function, after):
    """Calls of the package's functions that were seen; a KeyboardInterrupt is raised in the one after so many."""
    seen, tracer = 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal seen
        # what a generator raises when it is thrown away is lost
        is_function = not frame.f_code.co_flags & inspect.CO_GENERATOR
        if event == "call" and is_function and frame.f_globals.get("__name__", "").startswith("sb3_trpo_ext."):
            seen += 1
            if seen == after:
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
    return seen


@pytest.mark.parametrize(
    "algorithm, extractor", [(TRPOExt, Normalised), (TRPOExt, Assigned), (NPGExt, Assigned), (KLPPOExt, Normalised)]
)
def test_an_interrupt_anywhere_in_an_update_leaves_parameters_and_buffers_as_they_were(algorithm, extractor):
    few = dict(n_epochs=2) if algorithm is KLPPOExt else {}
    model = make(algorithm, n_steps=64, policy_kwargs=dict(features_extractor_class=extractor), **few).learn(64)
    start, moments = state_of(model), copy.deepcopy(model.policy.optimizer.state_dict())
    n_calls = interrupted(model.train, after=None)
    assert not same(start, state_of(model)) and n_calls > 200
    untouched = 0
    for after in range(3, n_calls, n_calls // 24):
        model.policy.load_state_dict(start)
        model.policy.optimizer.load_state_dict(copy.deepcopy(moments))
        model.report = None
        interrupted(model.train, after)
        is_as_before = same(start, state_of(model)) and all(parameter.requires_grad for parameter in model.policy.parameters())
        assert is_as_before or model.report is not None, after  # the latter is set when an update is complete
        untouched += is_as_before
    assert untouched > 20
