"""Activations as NumPy functions in place: for acting, where torch costs more than the sums do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

InPlace = Callable[[np.ndarray], None]


def numpy_activation(module: nn.Module | None) -> InPlace | None:
    return None if module is None else NUMPY_ACTIVATIONS[type(module)](module)


def _leaky(slope: float) -> InPlace:
    def leaky(x: np.ndarray) -> None:
        np.copyto(x, slope * x, where=x < 0.0)

    return leaky


def _elu(alpha: float) -> InPlace:
    def elu(x: np.ndarray) -> None:
        np.copyto(x, alpha * np.expm1(np.minimum(x, 0.0)), where=x < 0.0)

    return elu


def _tanh(x: np.ndarray) -> None:
    np.tanh(x, out=x)


def _relu(x: np.ndarray) -> None:
    np.maximum(x, 0.0, out=x)


def _sigmoid(x: np.ndarray) -> None:
    # by tanh, which does not overflow
    np.multiply(np.tanh(0.5 * x) + 1.0, 0.5, out=x)


def _silu(x: np.ndarray) -> None:
    x *= 0.5 * (np.tanh(0.5 * x) + 1.0)


NUMPY_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], InPlace]] = {
    nn.Tanh: lambda _: _tanh,
    nn.ReLU: lambda _: _relu,
    nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
    nn.ELU: lambda module: _elu(module.alpha),
    nn.Sigmoid: lambda _: _sigmoid,
    nn.SiLU: lambda _: _silu,
}
