"""One step of a torch optimizer on some of its parameters."""

from __future__ import annotations

import torch as th
from torch import nn

from sb3_trpo_ext.numerics.parameters import FlatParameters


def gradient_step(
    loss: th.Tensor, parameters: FlatParameters, optimizer: th.optim.Optimizer, max_grad_norm: float = 0.0
) -> None:
    """Descend on a loss; the optimizer's other parameters, on which the loss must not depend, stay as they are.

    :param loss: with a graph
    :param max_grad_norm: clip the gradient's norm at this; 0 for no clipping
    """
    # parameters without a gradient are passed over by torch's optimizers
    optimizer.zero_grad()
    loss.backward()
    clip(parameters.tensors, max_grad_norm)
    optimizer.step()


def clip(tensors: list[nn.Parameter], max_grad_norm: float) -> None:
    """Scale gradients down to a norm; 0 leaves them."""
    if max_grad_norm > 0.0:
        nn.utils.clip_grad_norm_(tensors, max_grad_norm)
