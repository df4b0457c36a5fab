"""π_old, as a KL from it needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch import nn

from sb3_trpo_ext.distributions import DistributionFamily, map_tensors
from sb3_trpo_ext.numerics.averages import Rows, Units
from sb3_trpo_ext.numerics.checkpoint import Copies

_MOST_NUMBERS_KEPT = 2**24


class OldPolicy:
    """The policy that acted: the module's as it is now, whatever becomes of its parameters and running statistics.

    Its distributions on a batch are kept, or, where they are many numbers, computed anew when they are asked for.

    :param family: of its distributions
    :param distribution_of: rows ↦ π(·|s) of the module as it is
    :param module: all that these depend on
    :param states: B, or the units that the batch consists of
    """

    def __init__(
        self,
        family: DistributionFamily,
        distribution_of: Callable[[Rows], Distribution],
        module: nn.Module,
        states: int | Units,
    ) -> None:
        self._family = family
        self._distribution_of = distribution_of

        def tensors() -> list[th.Tensor]:
            return [*module.parameters(), *module.buffers()]

        self._values = Copies(tensors)
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors()}
        units = Units.of(states)
        self._keeps = units.count * _numbers_in(self.at_present(slice(0, units.length))) <= _MOST_NUMBERS_KEPT
        self._kept: dict[int, Any] = {}  # by the first row of each chunk

    def keep(self, rows: slice, distribution: Distribution) -> None:
        """Take the distribution of a chunk, made without a graph before anything moved."""
        if self._keeps:
            self._kept[rows.start] = self._freeze(distribution)

    def on_chunk(self, rows: slice) -> Any:
        """What was frozen of a chunk that :meth:`keep` has seen. To be asked before the present policy is."""
        return self._kept[rows.start] if self._keeps else self.on_rows(rows)

    def on_rows(self, rows: Rows) -> Any:
        """The same for any states, computed anew."""
        with self._values.put_in_place():
            return self.at_present(rows)

    def on_minibatches(self, partition: Sequence[Rows]) -> list[Any]:
        """The same for many at once; None for each where they are to be asked for one by one."""
        if not self._keeps:
            return [None] * len(partition)
        with self._values.put_in_place():
            return [self.at_present(rows) for rows in partition]

    @th.no_grad()
    def at_present(self, rows: Rows) -> Any:
        """What the family freezes of the policy as it is now."""
        return self._freeze(self._distribution_of(rows))

    def _freeze(self, distribution: Distribution) -> Any:
        """What the family keeps of a distribution without a graph, apart from θ: means or logits may be views of it."""

        def apart(tensor: th.Tensor) -> th.Tensor:
            return tensor.clone() if tensor.untyped_storage().data_ptr() in self._memory else tensor

        try:
            return map_tensors(apart, self._family.freeze(distribution))
        except TypeError as error:
            family = type(self._family).__name__
            raise ValueError(f"{family}.freeze() must give tensors, in tuples, lists or dicts, or copies: {error}") from error


def _numbers_in(frozen: Any) -> int:
    numbers = 0

    def count(tensor: th.Tensor) -> th.Tensor:
        nonlocal numbers
        numbers += tensor.numel()
        return tensor

    map_tensors(count, frozen)
    return numbers
