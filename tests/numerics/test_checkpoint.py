import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.numerics.checkpoint import Checkpoint
from sb3_trpo_ext.numerics.parameters import FlatParameters

OPTIMIZERS = [th.optim.Adam, lambda p: th.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: th.optim.RMSprop(p, lr=0.1)]


def step(parameters, optimizer):
    optimizer.zero_grad()
    sum(p.square().sum() + p.sum() for p in parameters).backward()
    optimizer.step()


def memory(optimizer, parameters):
    return {(i, k): th.as_tensor(v).clone() for i, p in enumerate(parameters) for k, v in optimizer.state.get(p, {}).items()}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_restoring_brings_back_theta_and_what_the_optimizer_knows_of_it(make, steps_before):
    own, other = nn.Parameter(th.randn(3)), nn.Parameter(th.randn(2))
    optimizer = make([own, other])
    for _ in range(steps_before):
        step([own, other], optimizer)
    theta, known = own.detach().clone(), memory(optimizer, [own])
    checkpoint = Checkpoint(FlatParameters([own]), optimizer)
    for _ in range(2):  # twice: what was restored must not be what the next steps write to
        step([own, other], optimizer)
        theta_other, known_other = other.detach().clone(), memory(optimizer, [other])
        assert not th.equal(own, theta)
        checkpoint.restore()
        assert th.equal(own, theta) and th.equal(other, theta_other)
        th.testing.assert_close(memory(optimizer, [own]), known, rtol=0, atol=0)
        th.testing.assert_close(memory(optimizer, [other]), known_other, rtol=0, atol=0)


def test_as_a_context_it_restores_on_errors_alone():
    own = nn.Parameter(th.ones(2))
    optimizer = th.optim.Adam([own])
    with pytest.raises(KeyboardInterrupt), Checkpoint(FlatParameters([own]), optimizer):
        step([own], optimizer)
        raise KeyboardInterrupt
    assert th.equal(own, th.ones(2)) and not optimizer.state
    with Checkpoint(FlatParameters([own]), optimizer):
        step([own], optimizer)
    assert not th.equal(own, th.ones(2)) and optimizer.state
