"""Conjugate gradient for symmetric positive definite systems seen only as a product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch as th

# bounds the memory of long runs; vectors of shape (P,)
_KEPT_RESIDUALS = 128

Matvec = Callable[[th.Tensor], th.Tensor]


class CGStatus(str, Enum):
    """How a conjugate gradient run ended, and what a user can do about it."""

    CONVERGED = "converged"
    """‖b − Ax‖ ≤ max(rtol·‖b‖, atol)."""
    STEP_LIMIT = "step_limit"
    """``max_steps`` products were spent: the usual end in TRPO; raise the limit or the damping for more."""
    ZERO_RHS = "zero_rhs"
    """b = 0, so x = 0: there is nothing to solve."""
    NON_POSITIVE_CURVATURE = "non_positive_curvature"
    """pᵀAp ≤ 0: A is not positive definite; raise the damping."""
    SINGULAR = "singular"
    """pᵀAp is no more than rounding beside the largest curvature met: x solves the system in all directions before."""
    NON_FINITE = "non_finite"
    """NaN or infinity in b or in a product: look at the data that A and b were built from."""


@dataclass(frozen=True)
class CGSolution:
    """What :func:`conjugate_gradient` returns.

    :param x: the last finite iterate, shape (P,)
    :param status: how the run ended
    :param iterations: steps taken, each with one product
    :param residual_norm: ‖b − Ax‖, recomputed if so asked, else from the recursion
    """

    x: th.Tensor
    status: CGStatus
    iterations: int
    residual_norm: float


def conjugate_gradient(
    matvec: Matvec,
    b: th.Tensor,
    *,
    max_steps: int,
    rtol: float = 1e-10,
    atol: float = 0.0,
    recompute_residual: bool = True,
) -> CGSolution:
    """Solve A x = b for symmetric positive definite A (Hestenes & Stiefel 1952), from x = 0.

    Stopping rule: ‖b − Ax‖ ≤ max(rtol·‖b‖, atol). Each step takes one product; no random numbers
    are used. A direction whose curvature pᵀAp / pᵀp is below the machine epsilon times the largest met is not
    taken: its product is rounding alone, and dividing by it would blow the step up. That is no fault of A's, which
    may well be singular. Residuals are reorthogonalised, which keeps as many vectors (P,) as there are steps, 128
    at the most. The recursion's residual drifts from b − Ax on ill-conditioned systems, so by default
    the end is checked with one more product: a convergence that the recomputed residual does not
    bear out is not claimed, and the run goes on from that residual while steps are left.

    In exact arithmetic a zero start gives xᵀAx = xᵀb at every step.

    :param matvec: v ↦ Av, on vectors of shape (P,)
    :param b: right-hand side, shape (P,)
    :param max_steps: the most steps to take, at least 1
    :param rtol: tolerance relative to ‖b‖
    :param atol: absolute tolerance on ‖b − Ax‖
    :param recompute_residual: check the end against b − Ax, at the cost of one product
    :raises ValueError: for a ``b`` that is no vector, ``max_steps`` < 1 or a negative tolerance
    """
    if b.ndim != 1:
        raise ValueError(f"b must be a vector of shape (P,), got shape {tuple(b.shape)}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if rtol < 0 or atol < 0:
        raise ValueError(f"rtol and atol must not be negative, got rtol={rtol}, atol={atol}")

    scale = float(b.abs().max()) if b.numel() else 0.0
    if scale == 0.0 or not math.isfinite(scale):
        status = CGStatus.ZERO_RHS if scale == 0.0 else CGStatus.NON_FINITE
        return CGSolution(th.zeros_like(b), status, 0, scale)
    # in units of max|b|, so that no square over- or underflows
    b = b / scale
    tolerance = max(rtol * float(b.norm()), atol / scale)
    x, r, iterations = th.zeros_like(b), b, 0
    while True:
        x, r, status, steps = _recursion(matvec, x, r, tolerance, max_steps - iterations)
        iterations += steps
        claimed = status is CGStatus.CONVERGED
        if not recompute_residual or status is CGStatus.NON_FINITE:
            break
        r = b - matvec(x)
        if float(r.norm()) <= tolerance:
            status = CGStatus.CONVERGED
            break
        if not claimed or iterations == max_steps:
            status = CGStatus.STEP_LIMIT if claimed else status
            break
    return CGSolution(scale * x, status, iterations, scale * float(r.norm()))


def _recursion(
    matvec: Matvec, x: th.Tensor, r: th.Tensor, tolerance: float, max_steps: int
) -> tuple[th.Tensor, th.Tensor, CGStatus, int]:
    """Textbook CG from x with residual r: the last finite x and r, how it ended, and steps taken.

    Each residual is made orthogonal to those before it, as in exact arithmetic it is: without that,
    rounding makes CG take more than P steps even on well-conditioned systems.
    """
    p, rr = r, float(r @ r)
    pp, largest, epsilon = rr, 0.0, th.finfo(r.dtype).eps
    directions = r.new_empty(min(max_steps, _KEPT_RESIDUALS), len(r))
    for step in range(max_steps):
        Ap = matvec(p)
        pAp = float(p @ Ap)
        if not math.isfinite(pAp):
            return x, r, CGStatus.NON_FINITE, step
        if abs(pAp) < epsilon * largest * pp:
            return x, r, CGStatus.SINGULAR, step
        if pAp <= 0.0:
            return x, r, CGStatus.NON_POSITIVE_CURVATURE, step
        largest = max(largest, pAp / pp)
        alpha = rr / pAp
        th.div(r, math.sqrt(rr), out=directions[step % len(directions)])
        known = directions[: step + 1]
        x_next, r_next = th.add(x, p, alpha=alpha), th.sub(r, Ap, alpha=alpha)
        r_next -= (known @ r_next) @ known
        rr_next = float(r_next @ r_next)
        if not (math.isfinite(rr_next) and math.isfinite(alpha)):
            return x, r, CGStatus.NON_FINITE, step
        p = th.add(r_next, p, alpha=rr_next / rr)
        pp = rr_next + (rr_next / rr) ** 2 * pp  # as r_next and p are orthogonal
        x, r, rr = x_next, r_next, rr_next
        if math.sqrt(rr) <= tolerance:
            return x, r, CGStatus.CONVERGED, step + 1
    return x, r, CGStatus.STEP_LIMIT, max_steps
