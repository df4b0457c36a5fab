"""Curvature matrices, seen only as products v ↦ Fv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch as th

from sb3_trpo_ext.numerics.conjugate_gradient import Matvec
from sb3_trpo_ext.numerics.differentiation import (
    central_difference,
    has_functions_of_users,
    twice_differentiable,
    unless_impossible,
)
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

    def block_squares(self, weights: th.Tensor | None = None) -> th.Tensor:
        """The sum of squares of J's entries, one for every tensor of θ, in their order.

        :param weights: of the states, (B,), which their squares are multiplied by; None: 1
        """
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
        return pulled_back(self._outputs, self._parameters, cotangents)

    def block_squares(self, weights: th.Tensor | None = None) -> th.Tensor:
        return estimated_block_squares(self, self._parameters, weights)


class DifferenceLinearization:
    """Jacobian products of outputs whose graph can be differentiated only once: Jv by central differences.

    :param outputs_of: the outputs at the present θ, with a graph if autograd is on
    :param parameters: θ, moved for each Jv and restored bit for bit
    """

    def __init__(self, outputs_of: Callable[[], Sequence[th.Tensor]], parameters: FlatParameters) -> None:
        self._outputs_of = outputs_of
        self._parameters = parameters
        self.outputs = self._at_present()

    def _at_present(self) -> Outputs:
        with th.no_grad():
            return tuple(output.clone() for output in self._outputs_of())

    def jvp(self, v: th.Tensor) -> Outputs:
        return central_difference(self._at_present, self._parameters, v)

    def vjp(self, u: Outputs) -> th.Tensor:
        # anew each time: a graph does not outlive that θ is written to
        with th.enable_grad():
            products = [(output * part).sum() for output, part in zip(self._outputs_of(), u, strict=True)]
            return self._parameters.gradient(th.stack(products).sum())

    def block_squares(self, weights: th.Tensor | None = None) -> th.Tensor:
        return estimated_block_squares(self, self._parameters, weights)


class GeneralLinearization:
    """The Jacobian of any outputs: by reverse mode alone, and by differences where autograd cannot go twice.

    :param outputs_of: the outputs at the present θ, with a graph if autograd is on
    :param parameters: θ
    """

    def __init__(self, outputs_of: Callable[[], Sequence[th.Tensor]], parameters: FlatParameters) -> None:
        self._arguments = outputs_of, parameters
        with twice_differentiable():
            outputs = outputs_of()
            self._chosen: Linearization = AutogradLinearization(outputs, parameters)
        self.outputs = self._chosen.outputs
        if has_functions_of_users(outputs) and not self._is_consistent(parameters.read()):
            self._go_by_differences()

    def _go_by_differences(self) -> Linearization:
        self._chosen = DifferenceLinearization(*self._arguments)
        return self._chosen

    def _is_consistent(self, theta: th.Tensor) -> bool:
        """Whether ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ for some u and v: a backward that is not differentiable itself leaves zeros in Jv."""
        (v, *signs) = _random_signs((theta, *self.outputs), th.Generator().manual_seed(0))
        tangents = self.jvp(v)
        products = th.stack([(sign * tangent).sum() for sign, tangent in zip(signs, tangents, strict=True)])
        pulled = self.vjp(tuple(signs)) * v
        scale = pulled.abs().sum() + sum(tangent.abs().sum() for tangent in tangents)
        return bool((products.sum() - pulled.sum()).abs() <= 1e-4 * scale)

    def jvp(self, v: th.Tensor) -> Outputs:
        return unless_impossible(lambda: self._chosen.jvp(v), lambda: self._go_by_differences().jvp(v))

    def vjp(self, u: Outputs) -> th.Tensor:
        return self._chosen.vjp(u)

    def block_squares(self, weights: th.Tensor | None = None) -> th.Tensor:
        return self._chosen.block_squares(weights)


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


def hessian_product(scalar_of: Callable[[], th.Tensor], parameters: FlatParameters) -> Matvec:
    """The Hessian of a scalar in θ as a product, by double backward (Pearlmutter 1994) or else by differences of ∇.

    :param scalar_of: the scalar at the present θ, with a graph
    :param parameters: θ
    :return: v ↦ Hv on vectors (P,), valid as long as θ is not written to
    """

    def gradient(scalar: th.Tensor, create_graph: bool) -> th.Tensor:
        tensors = parameters.tensors
        parts = th.autograd.grad(scalar, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        return parameters.flatten(parts)

    with twice_differentiable():
        scalar = scalar_of()
        at_theta = gradient(scalar, create_graph=True)

    by_differences = has_functions_of_users([scalar])

    def by_autograd(v: th.Tensor) -> th.Tensor:
        parts = th.autograd.grad(at_theta, parameters.tensors, grad_outputs=v, retain_graph=True, allow_unused=True)
        return parameters.flatten(parts)

    @th.enable_grad()
    def of_differences(v: th.Tensor) -> th.Tensor:
        nonlocal by_differences
        by_differences = True
        return central_difference(lambda: (gradient(scalar_of(), create_graph=False),), parameters, v)[0]

    def product(v: th.Tensor) -> th.Tensor:
        return of_differences(v) if by_differences else unless_impossible(lambda: by_autograd(v), lambda: of_differences(v))

    return product


def pulled_back(outputs: Sequence[th.Tensor], parameters: FlatParameters, u: Sequence[th.Tensor]) -> th.Tensor:
    """Jᵀu (P,) of outputs with a graph, which is kept."""
    gradients = th.autograd.grad(outputs, parameters.tensors, grad_outputs=u, retain_graph=True, allow_unused=True)
    return parameters.flatten(gradients)


def _random_signs(outputs: Outputs, generator: th.Generator) -> Outputs:
    return tuple(th.randint(0, 2, output.shape, generator=generator, device="cpu").to(output) * 2 - 1 for output in outputs)


def estimated_block_squares(linearization: Linearization, parameters: FlatParameters, weights: th.Tensor | None) -> th.Tensor:
    """‖Jᵀu‖² of random signs u times √w, tensor by tensor: its mean is the sum of squares (Hutchinson 1989).

    Which sign a state gets goes by its place in its chunk: chunks, padding and shares of a group change the error of the
    estimate, not what it estimates.
    """
    # signs of its own, so that nothing here draws global random numbers
    generator = th.Generator().manual_seed(0)
    squares = []
    for _ in range(_PROBES):
        signs = _random_signs(linearization.outputs, generator)
        if weights is not None:
            signs = tuple(part * weights.sqrt().to(part).view(-1, *[1] * (part.ndim - 1)) for part in signs)
        pulled = parameters.split(linearization.vjp(signs))
        squares.append(th.stack([part.square().sum() for part in pulled]))
    return th.stack(squares).mean(dim=0)


def damped(matvec: Matvec, damping: float) -> Matvec:
    """v ↦ (F + λI)v."""
    return lambda v: th.add(matvec(v), v, alpha=damping)
