"""Running statistics of batch normalisation: those of one whole batch, whatever the chunks it is seen in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch as th
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sb3_trpo_ext.numerics.averages import ALONE, Group, Units
from sb3_trpo_ext.numerics.differentiation import as_written


class ChannelMoments:
    """Mean and variance of each channel, pooled over batches (Chan, Golub & LeVeque 1979), in double precision."""

    def __init__(self) -> None:
        self.count: float = 0
        self._mean: th.Tensor = th.zeros(())
        self._squares: th.Tensor = th.zeros(())

    def add(self, inputs: th.Tensor, weights: th.Tensor | None = None) -> None:
        """Inputs (B, C, ·) of states that count as much as their weights (B,)."""
        count: float = inputs.numel() // inputs.shape[1]
        if count == 0:
            return
        dimensions = [dimension for dimension in range(inputs.ndim) if dimension != 1]
        if weights is None:
            variance, mean = (part.double() for part in th.var_mean(inputs, dimensions, correction=0))
        else:
            shares = (weights.double() / weights.sum()).view(-1, *[1] * (inputs.ndim - 1)) * len(inputs) / count
            mean = (shares * inputs).sum(dimensions)
            variance = (shares * inputs.double().square()).sum(dimensions) - mean.square()
            count = float(weights.sum()) * count / len(inputs)
        self._pool(count, mean, variance * count)

    def _pool(self, count: float, mean: th.Tensor, squares: th.Tensor) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._mean = self._mean + shift * (count / total)
        self._squares = self._squares + squares + shift.square() * (self.count * count / total)
        self.count = total

    def share(self, group: Group) -> None:
        """Become everybody's."""
        if group is ALONE:
            return
        total = group.sum(th.full_like(self._mean, self.count))
        mean = group.sum(self._mean * self.count) / total
        self._squares = group.sum(self._squares + (self._mean - mean).square() * self.count)
        self._mean, self.count = mean, float(total[0])

    @property
    def mean(self) -> th.Tensor:
        return self._mean

    @property
    def variance(self) -> th.Tensor:
        """Without bias, as running statistics have it."""
        return self._squares / (self.count - 1)


def layers_with_statistics(module: nn.Module) -> list[_BatchNorm]:
    """Batch normalisations of torch's own that take running statistics, the module being in training mode."""
    return [layer for layer in module.modules() if _is_known(layer) and layer.training]


def has_others_with_buffers(module: nn.Module) -> bool:
    """Whether other layers have buffers, which a pass in training mode may move."""
    return any(layer._buffers and not _is_known(layer) for layer in module.modules())


def _is_known(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(layer, _BatchNorm) and type(layer).forward is _BatchNorm.forward and layer.track_running_stats


@th.no_grad()
def take_batch_statistics(
    layers: Iterable[_BatchNorm], run: Callable[[slice], Any], chunks: Sequence[slice], units: Units
) -> None:
    """Give batch normalisations the statistics that their inputs have over the whole batch.

    As evaluation mode will see them: without dropout, and behind layers whose statistics are already new. That takes a
    pass for each layer. A layer's ``momentum`` is for batches that are small parts of the data; only ``None``, the
    average over all batches so far, and 0, no change, mean here what they say.

    :param run: rows ↦ a pass of these states through the layers, in evaluation mode
    :param chunks: of the batch
    :param units: what it consists of; in a group everybody's layers must be called in one order
    """
    pending = list(layers)
    while pending:
        layer, moments = _moments_of_first(pending, run, chunks, units)
        if layer is None:
            return
        _move(layer, moments)
        pending.remove(layer)


def _moments_of_first(
    layers: Iterable[_BatchNorm], run: Callable[[slice], Any], chunks: Sequence[slice], units: Units
) -> tuple[_BatchNorm | None, ChannelMoments]:
    """The first of these layers that is called, and the moments of its inputs."""
    first: _BatchNorm | None = None
    moments = ChannelMoments()

    def see(layer: _BatchNorm, inputs: tuple[th.Tensor, ...]) -> None:
        nonlocal first
        first = first or layer
        if layer is first:
            moments.add(inputs[0], None if units.weights is None else units.weights[rows])

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with as_written():
            for rows in chunks:
                run(rows)
    finally:
        for hook in hooks:
            hook.remove()
    if first is not None:
        moments.share(units.group)
    return first, moments


def _move(layer: _BatchNorm, moments: ChannelMoments) -> None:
    mean, variance, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if moments.count < 2 or mean is None or variance is None or batches is None:
        return
    batches += 1
    fraction = 1.0 / float(batches) if layer.momentum is None else float(layer.momentum > 0.0)
    mean.lerp_(moments.mean.to(mean), fraction)
    variance.lerp_(moments.variance.to(variance), fraction)
