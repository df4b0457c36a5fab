import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.numerics.parameters import FlatParameters, frozen


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_read_and_write_are_exact_and_in_place(network):
    parameters = FlatParameters(network.parameters())
    storages = [p.data_ptr() for p in network.parameters()]
    theta = parameters.read()
    assert theta.shape == (len(parameters),) == (3 * 4 + 4 + 4 * 2 + 2,)
    parameters.write(theta + 1.0)
    assert th.equal(parameters.read(), theta + 1.0)
    parameters.write(theta)
    assert th.equal(parameters.read(), theta)
    assert storages == [p.data_ptr() for p in network.parameters()]


def test_a_copy_is_read(network):
    parameters = FlatParameters(network.parameters())
    theta = parameters.read()
    parameters.write(th.zeros_like(theta))
    assert theta.any()


def test_reached_by_follows_the_graph_and_not_names(network):
    network.add_module("value_net", nn.Linear(2, 2))
    other = nn.Linear(3, 1)
    module = nn.ModuleList([network, other])
    reached = FlatParameters.reached_by([network(th.randn(1, 3))], module)
    assert {id(p) for p in reached.tensors} == {id(p) for p in network.parameters()}
    assert len(FlatParameters.reached_by([th.ones(2)], module)) == 0


def test_frozen_parameters_of_the_user_are_not_reached(network):
    network[0].weight.requires_grad_(False)
    reached = FlatParameters.reached_by([network(th.randn(1, 3))], network)
    assert network[0].weight not in reached and network[0].bias in reached


def test_gradient_is_zero_where_the_scalar_does_not_depend(network):
    parameters = FlatParameters(network.parameters())
    gradient = parameters.split(parameters.gradient(network[0].bias.square().sum()))
    assert not gradient[0].any() and th.equal(gradient[1], 2 * network[0].bias)
    assert not parameters.gradient(th.tensor(1.0)).any()


def test_without(network):
    everything, last = FlatParameters(network.parameters()), FlatParameters(network[2].parameters())
    assert [id(p) for p in everything.without(last).tensors] == [id(p) for p in network[0].parameters()]


def test_frozen_context_keeps_graphs_away_and_is_undone_by_exceptions(network):
    first = FlatParameters(network[0].parameters())
    with pytest.raises(RuntimeError), frozen(first):
        assert not any(p.requires_grad for p in network[0].parameters())
        assert all(p.requires_grad for p in network[2].parameters())
        raise RuntimeError
    assert all(p.requires_grad for p in network.parameters())


def test_wrong_shape_is_refused(network):
    with pytest.raises(ValueError, match=r"shape \(26,\), got \(3,\)"):
        FlatParameters(network.parameters()).write(th.zeros(3))


def test_nothing_chosen():
    empty = FlatParameters([])
    assert len(empty) == 0 and empty.read().shape == (0,)
    empty.write(th.zeros(0))
