"""One step of a torch optimizer on some of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from torch import nn

from sb3_trpo_ext.numerics.averages import ALONE, Group
from sb3_trpo_ext.numerics.parameters import FlatParameters


def gradient_step(
    loss: th.Tensor,
    parameters: FlatParameters,
    optimizer: th.optim.Optimizer,
    max_grad_norm: float = 0.0,
    group: Group = ALONE,
) -> None:
    """Descend on a loss; the optimizer's other parameters, on which the loss must not depend, stay as they are.

    :param loss: with a graph
    :param max_grad_norm: clip the gradient's norm at this; 0 for no clipping
    :param group: of whose losses the sum is meant
    """
    # torch's optimizers skip parameters without a gradient
    optimizer.zero_grad()
    loss.backward()
    sum_gradients(parameters.tensors, group)
    clip(parameters.tensors, max_grad_norm)
    optimizer.step()


def sum_gradients(tensors: Sequence[th.Tensor], group: Group) -> None:
    """Give everybody of a group the sum of their gradients, in place; None counts as zeros."""
    if group is ALONE:
        return
    for tensor in tensors:
        tensor.grad = th.zeros_like(tensor) if tensor.grad is None else tensor.grad
    gradients = [tensor.grad.flatten() for tensor in tensors if tensor.grad is not None]
    total = group.sum(th.cat(gradients))
    for tensor, part in zip(tensors, total.split([len(gradient) for gradient in gradients]), strict=True):
        assert tensor.grad is not None
        tensor.grad.copy_(part.view_as(tensor))


def clip(tensors: list[nn.Parameter], max_grad_norm: float) -> None:
    """Scale gradients down to a norm; 0 leaves them."""
    if max_grad_norm > 0.0:
        nn.utils.clip_grad_norm_(tensors, max_grad_norm)
