import copy
import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer

from sb3_trpo_ext import TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.objectives import AllActionsSurrogate, SelfNormalizedSurrogate
from sb3_trpo_ext.sampling.buffers import adds_like_sb3
from sb3_trpo_ext.sampling.proposals import FirstActions
from sb3_trpo_ext.sampling.vine_buffer import Branches, vine_surrogate
from tests.cases import ACTION_SPACES
from tests.envs import Walk, limited

OBSERVATIONS = spaces.Box(-1, 1, (3,))
DICT = spaces.Dict({"a": OBSERVATIONS, "b": spaces.Discrete(3)})
T, E = 5, 2


def buffer_of(observations=OBSERVATIONS, actions="discrete", cls=VineRolloutBuffer, **kwargs):
    kwargs = dict(n_rollout_states=4, **kwargs) if "n_rollout_states" not in kwargs else kwargs
    return cls(T, observations, ACTION_SPACES[actions], device="cpu", n_envs=E, **kwargs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(n_rollout_states=11), r"n_rollout_states must be at most n_steps \* n_envs = 10.*got 11"),
        (dict(n_rollout_states=0), "n_rollout_states must be an integer of at least 1"),
        (dict(n_branch_actions=1), "n_branch_actions must be 'all' or at least 2.*got 1"),
        (dict(n_branch_actions="some"), "n_branch_actions must be an integer"),
        (dict(actions="box", n_branch_actions="all"), "n_branch_actions must be an integer for Box.*finite.*got 'all'"),
        (dict(actions="box", proposal="uniform"), "proposal must be 'auto' or 'policy' for Box.*got 'uniform'"),
        (dict(proposal="random"), "proposal must be one of 'auto', 'policy', 'uniform', got 'random'"),
        (dict(n_branch_actions="all", proposal="policy"), "proposal must be 'auto' with n_branch_actions='all'.*got 'policy'"),
        (dict(branch_length=0), "branch_length must be an integer of at least 1"),
        (dict(branch_bootstrap="yes"), "branch_bootstrap must be one of True, False"),
        (dict(common_random_numbers=None), "common_random_numbers must be one of True, False"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        buffer_of(**arguments)


@pytest.mark.parametrize(("n_steps", "n_envs", "expected"), [(64, 8, 128), (256, 8, 512), (5, 2, 2), (1, 1, 1)])
def test_the_rollout_set_is_a_quarter_of_the_trunk_unless_given(n_steps, n_envs, expected):
    def made(**arguments):
        return VineRolloutBuffer(n_steps, OBSERVATIONS, ACTION_SPACES["box"], device="cpu", n_envs=n_envs, **arguments)

    assert made().n_rollout_states == made(n_rollout_states=None).n_rollout_states == expected
    assert made(n_rollout_states=1).n_rollout_states == 1


@pytest.mark.parametrize(
    ("expected", "critic", "given"),
    [
        (10, "gauss_newton", {}),
        (100, "gauss_newton", dict(branch_bootstrap=False)),
        (100, "none", {}),
        (7, "gauss_newton", dict(branch_length=7, branch_bootstrap=False)),
        (7, "none", dict(branch_length=7)),
    ],
)
def test_branches_are_short_where_they_go_on_with_values_unless_given(expected, critic, given):
    arguments = dict(n_steps=4, critic=critic, device="cpu")
    vine = dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=given)
    assert TRPOExt("MlpPolicy", limited(Walk()), **arguments, **vine).rollout_buffer.branch_length == expected


def test_an_action_set_that_is_not_small_cannot_be_enumerated():
    with pytest.raises(ValueError, match="at most 1000 actions"):
        VineRolloutBuffer(T, OBSERVATIONS, spaces.MultiBinary(10), device="cpu", n_rollout_states=1, n_branch_actions="all")


def test_the_automatic_proposal_is_the_papers():
    assert buffer_of(actions="box").proposal == "policy"
    assert all(buffer_of(actions=name).proposal == "uniform" for name in ("discrete", "multi_discrete", "multi_binary"))


def test_dict_observations_are_held_too():
    class Own(VineRolloutBuffer):
        pass

    for cls in (VineRolloutBuffer, Own):
        buffer = buffer_of(DICT, cls=cls)
        assert isinstance(buffer, DictRolloutBuffer) and isinstance(buffer, cls)
        assert set(buffer.observations) == {"a", "b"} and adds_like_sb3(buffer)
    assert not isinstance(buffer_of(), DictRolloutBuffer)


class Derived(VineRolloutBuffer):
    pass


@pytest.mark.parametrize("again", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))], ids=["copy", "pickle"])
@pytest.mark.parametrize("cls", [VineRolloutBuffer, Derived])
@pytest.mark.parametrize("observations", [OBSERVATIONS, DICT], ids=["box", "dict"])
def test_copies_and_pickles(again, cls, observations):
    buffer = filled(observations=observations, cls=cls)
    other = again(buffer)
    assert type(other) is type(buffer) and vars(other).keys() == vars(buffer).keys()
    np.testing.assert_array_equal(other.branches.q_values, buffer.branches.q_values)
    one, another = (next(each.get()) for each in (buffer, other))
    assert sorted(one.transitions.tolist()) == sorted(another.transitions.tolist())


def filled(**kwargs):
    """A buffer whose observations are numbered, with branches from three states."""
    buffer = buffer_of(n_rollout_states=3, **kwargs)
    number = np.arange(T)[:, None] + T * np.arange(E)[None]
    for name, store in buffer.observations.items() if isinstance(buffer.observations, dict) else [("a", buffer.observations)]:
        if name == "a":
            store[...] = number[..., None]
    buffer.pos, buffer.full = T, True
    shape = (3, 2)
    first = FirstActions(np.zeros((*shape, 1)), np.full(shape, -1.0), np.array([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0]]))
    buffer.branches = Branches(
        np.array([1, 4, 7]), first, np.array([[1.0, 2.0], [0.0, 4.0], [5.0, 0.0]]), np.full(shape, -1.5)
    )
    return buffer


@pytest.mark.parametrize("observations", [OBSERVATIONS, DICT], ids=["box", "dict"])
def test_samples_know_which_transitions_they_are(observations):
    buffer = filled(observations=observations)
    samples = next(buffer.get())
    leaf = samples.observations["a"] if isinstance(observations, spaces.Dict) else samples.observations
    np.testing.assert_array_equal(leaf[:, 0], samples.transitions)
    assert sorted(samples.transitions.tolist()) == list(range(T * E))
    surrogate = vine_surrogate(buffer, samples, lambda actions: actions.long().flatten(), normalize=False)
    np.testing.assert_array_equal(leaf[surrogate.states, 0], [1, 4, 7])


def test_weights_and_effective_sample_size():
    buffer = filled()
    weights = buffer.branches.weights(is_enumerated=False)
    np.testing.assert_allclose(weights, [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    assert buffer.branches.effective_sample_size() == pytest.approx(4.0)


def test_which_surrogate():
    samples = next(filled().get())
    as_taken = lambda actions: actions.long().flatten()  # noqa: E731
    assert isinstance(vine_surrogate(filled(), samples, as_taken, True), SelfNormalizedSurrogate)
    assert isinstance(vine_surrogate(filled(n_branch_actions="all"), samples, as_taken, True), AllActionsSurrogate)


def test_a_new_rollout_has_no_branches_yet():
    buffer = filled()
    buffer.reset()
    assert buffer.branches is None
    assert vine_surrogate(buffer, None, th.Tensor.long, True) is None
