"""The chosen parameters of a module as one flat vector θ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch as th
from torch import nn

from sb3_trpo_ext.numerics.averages import ALONE, Group


class FlatParameters:
    """An ordered choice of parameters, read and written as one vector θ of shape (P,).

    Writing copies values into the existing storages, so optimizers, tied modules and views keep
    seeing the same tensors, and ``write(read())`` is exact.

    :param parameters: the parameters, in the order in which θ lists them; duplicates are dropped
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.tensors: list[nn.Parameter] = list(dict.fromkeys(parameters))
        self.sizes = [parameter.numel() for parameter in self.tensors]
        self._length = sum(self.sizes)

    @classmethod
    def reached_by(cls, outputs: Sequence[th.Tensor], module: nn.Module) -> FlatParameters:
        """The parameters of ``module`` that ``outputs`` depend on, found from the autograd graph.

        :param outputs: tensors computed from the module; those without a graph are skipped
        :param module: whose parameters are asked for; its order is kept
        """
        candidates = [parameter for parameter in module.parameters() if parameter.requires_grad]
        roots = [output.sum() for output in outputs if output.requires_grad]
        if not roots or not candidates:
            return cls([])
        gradients = th.autograd.grad(roots, candidates, allow_unused=True)
        return cls(p for p, gradient in zip(candidates, gradients, strict=True) if gradient is not None)

    @classmethod
    def reached_by_any(cls, batches: Iterable[Sequence[th.Tensor]], module: nn.Module, group: Group = ALONE) -> FlatParameters:
        """The parameters that the outputs of any batch, of anybody's, depend on, in the module's order."""
        reached = {id(parameter) for outputs in batches for parameter in cls.reached_by(outputs, module).tensors}
        own = th.tensor([id(parameter) in reached for parameter in module.parameters()], dtype=th.float64, device="cpu")
        return cls(p for p, count in zip(module.parameters(), group.sum(own).tolist(), strict=True) if count > 0.0)

    def __len__(self) -> int:
        """P, the number of scalars in θ."""
        return self._length

    def __contains__(self, parameter: object) -> bool:
        return any(parameter is own for own in self.tensors)

    def without(self, other: FlatParameters) -> FlatParameters:
        """The parameters that are here and not in ``other``."""
        return FlatParameters(parameter for parameter in self.tensors if parameter not in other)

    def read(self) -> th.Tensor:
        """A copy of θ, shape (P,)."""
        return self.flatten(parameter.detach() for parameter in self.tensors)

    def write(self, theta: th.Tensor) -> None:
        """Copy θ of shape (P,) into the parameters, in place.

        :raises ValueError: if θ has another shape
        """
        with th.no_grad():
            for parameter, part in zip(self.tensors, self.split(theta), strict=True):
                parameter.copy_(part)

    def split(self, vector: th.Tensor) -> list[th.Tensor]:
        """Views of a vector (P,) in the shapes of the parameters.

        :raises ValueError: if the vector has another shape
        """
        if vector.shape != (self._length,):
            raise ValueError(f"expected a vector of shape ({len(self)},), got {tuple(vector.shape)}")
        parts = th.split_with_sizes(vector, self.sizes) if self.sizes else ()
        return [part.view_as(parameter) for part, parameter in zip(parts, self.tensors, strict=True)]

    def flatten(self, tensors: Iterable[th.Tensor | None]) -> th.Tensor:
        """One vector (P,) from tensors in the shapes of the parameters; ``None`` stands for zeros."""
        parts = [
            (th.zeros_like(parameter) if tensor is None else tensor).reshape(-1)
            for parameter, tensor in zip(self.tensors, tensors, strict=True)
        ]
        return th.cat(parts) if parts else th.zeros(0)

    def gradient(self, scalar: th.Tensor) -> th.Tensor:
        """∇ of a scalar with respect to θ, shape (P,); zero where it does not depend on θ."""
        if not scalar.requires_grad or not self.tensors:
            return self.flatten(None for _ in self.tensors)
        return self.flatten(th.autograd.grad(scalar, self.tensors, allow_unused=True))


@contextmanager
def frozen(parameters: FlatParameters) -> Iterator[None]:
    """Context in which the given parameters take no gradient, so no graph is kept through them."""
    trained = [parameter for parameter in parameters.tensors if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def restored_on_error(parameters: FlatParameters) -> Iterator[None]:
    """Context that an exception, an interrupt included, leaves with θ as it was on entry, bit for bit."""
    theta = parameters.read()
    try:
        yield
    except BaseException:
        parameters.write(theta)
        raise
