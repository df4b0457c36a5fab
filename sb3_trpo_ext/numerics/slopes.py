"""Elementwise activations σ and their derivatives σ′, both at once and in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch as th
from torch import nn


def activate(module: nn.Module, z: th.Tensor, slope: th.Tensor) -> None:
    """Overwrite z by σ(z) and ``slope``, of the same shape, by σ′(z); at a kink the σ′ that autograd takes."""
    _IN_PLACE.get(type(module), _by_autograd)(module, z, slope)


def _by_autograd(module: nn.Module, z: th.Tensor, slope: th.Tensor) -> None:
    with th.enable_grad():
        free = z.clone().requires_grad_()
        # a copy, because activations may work in place
        a = module(free.clone())
        (gradient,) = th.autograd.grad(a.sum(), free)
    z.copy_(a.detach())
    slope.copy_(gradient)


@cache
def _one(dtype: th.dtype, device: th.device) -> th.Tensor:
    return th.ones((), dtype=dtype, device=device)


def _tanh(_: nn.Module, z: th.Tensor, slope: th.Tensor) -> None:
    th.addcmul(_one(z.dtype, z.device), z.tanh_(), z, value=-1, out=slope)


def _sigmoid(_: nn.Module, z: th.Tensor, slope: th.Tensor) -> None:
    th.addcmul(z.sigmoid_(), z, z, value=-1, out=slope)


def _relu(_: nn.Module, z: th.Tensor, slope: th.Tensor) -> None:
    th.sign(z.relu_(), out=slope)


def _leaky_relu(module: Any, z: th.Tensor, slope: th.Tensor) -> None:
    # sums of masks, because selecting costs many times as much
    th.gt(z, 0.0, out=slope).mul_(1.0 - module.negative_slope).add_(module.negative_slope)
    nn.functional.leaky_relu_(z, module.negative_slope)


def _elu(module: Any, z: th.Tensor, slope: th.Tensor) -> None:
    nn.functional.elu_(th.clamp(z, max=0.0, out=slope), module.alpha)
    is_positive = z.relu_().sign()
    z.add_(slope)
    slope.add_(module.alpha).add_(is_positive, alpha=1.0 - module.alpha)


_IN_PLACE: dict[type[nn.Module], Callable[[Any, th.Tensor, th.Tensor], None]] = {
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
}
