"""Curvature matrices, seen only as products v ↦ Fv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch as th

from sb3_trpo_ext.numerics.conjugate_gradient import Matvec
from sb3_trpo_ext.numerics.parameters import FlatParameters

Outputs = tuple[th.Tensor, ...]
Metric = Callable[[Outputs], Outputs]

_PROBES = 4


class Linearization(Protocol):
    """The Jacobian J of some outputs, each (B, ·), in θ (P,), at a fixed θ."""

    outputs: Outputs

    def jvp(self, v: th.Tensor) -> Outputs:
        """v ↦ Jv: tangents of the outputs for a direction (P,)."""
        ...

    def vjp(self, u: Outputs) -> th.Tensor:
        """u ↦ Jᵀu: a vector (P,) from cotangents in the shapes of the outputs."""
        ...

    def block_squares(self) -> th.Tensor:
        """The sum of squares of J's entries, one for every tensor of θ, in their order."""
        ...


class AutogradLinearization:
    """Jacobian products of any differentiable outputs, by reverse mode alone.

    Jᵀu is linear in u, so its derivative in u along v is Jv: one backward pass through the graph
    of the first (the "double backward trick"), and the graph is built once.

    :param outputs: tensors with a graph, the first dimension being the batch
    :param parameters: θ
    """

    def __init__(self, outputs: Sequence[th.Tensor], parameters: FlatParameters) -> None:
        self.outputs = tuple(output.detach() for output in outputs)
        self._outputs = [output for output in outputs if output.requires_grad]
        self._reached = [output.requires_grad for output in outputs]
        self._parameters = parameters
        self._dummies = [th.zeros_like(output, requires_grad=True) for output in self._outputs]
        self._pullback = th.autograd.grad(
            self._outputs,
            parameters.tensors,
            grad_outputs=self._dummies,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def jvp(self, v: th.Tensor) -> Outputs:
        parts = [(g, part) for g, part in zip(self._pullback, self._parameters.split(v), strict=True) if g.requires_grad]
        tangents = iter(
            th.autograd.grad(
                [g for g, _ in parts],
                self._dummies,
                grad_outputs=[part for _, part in parts],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        return tuple(
            next(tangents) if reached else th.zeros_like(output)
            for reached, output in zip(self._reached, self.outputs, strict=True)
        )

    def vjp(self, u: Outputs) -> th.Tensor:
        cotangents = [part for part, reached in zip(u, self._reached, strict=True) if reached]
        return self._parameters.flatten(
            th.autograd.grad(
                self._outputs,
                self._parameters.tensors,
                grad_outputs=cotangents,
                retain_graph=True,
                allow_unused=True,
            )
        )

    def block_squares(self) -> th.Tensor:
        """Estimated: ‖Jᵀu‖² of random signs u has the sum of squares as its mean (Hutchinson 1989)."""
        # signs of its own, so that nothing here draws global random numbers
        generator = th.Generator().manual_seed(0)
        squares = []
        for _ in range(_PROBES):
            signs = (
                th.randint(0, 2, output.shape, generator=generator, device="cpu").to(output) * 2 - 1 for output in self.outputs
            )
            parts = self._parameters.split(self.vjp(tuple(signs)))
            squares.append(th.stack([part.square().sum() for part in parts]))
        return th.stack(squares).mean(dim=0)


def gauss_newton_product(linearization: Linearization, metric: Metric, v: th.Tensor) -> th.Tensor:
    """v ↦ JᵀMJv, *summed* over the batch (Schraudolph 2002): two passes, no second derivatives.

    With M the Hessian of KL(old ‖ new) in the distribution's parameters this is the Fisher matrix
    of TRPO (appendix C of the paper), because the gradient of the KL vanishes at θ_old.

    :param linearization: J
    :param metric: M, tangents ↦ cotangents, block-diagonal over the batch
    :param v: direction, shape (P,)
    """
    tangents = linearization.jvp(v)  # v   -> Jv
    cotangents = metric(tangents)  #  Jv  -> MJv
    return linearization.vjp(cotangents)  # MJv -> JᵀMJv


def hessian_product(scalar: th.Tensor, parameters: FlatParameters) -> Matvec:
    """The Hessian of a scalar in θ as a product, by double backward (Pearlmutter 1994).

    :param scalar: with a graph that can be differentiated twice
    :param parameters: θ
    :return: v ↦ Hv on vectors (P,), valid as long as θ is not written to
    """
    gradient = parameters.flatten(
        th.autograd.grad(scalar, parameters.tensors, create_graph=True, allow_unused=True, materialize_grads=True)
    )

    def product(v: th.Tensor) -> th.Tensor:
        return parameters.flatten(
            th.autograd.grad(gradient, parameters.tensors, grad_outputs=v, retain_graph=True, allow_unused=True)
        )

    return product


def damped(matvec: Matvec, damping: float) -> Matvec:
    """v ↦ (F + λI)v."""
    return lambda v: th.add(matvec(v), v, alpha=damping)
