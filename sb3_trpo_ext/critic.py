"""Fits of the value function V to returns: minibatch Adam, or Gauss-Newton with conjugate gradient.

Neither moves the policy: parameters that the policy depends on are held fixed, and a fit that ends
in anything not finite is taken back whole.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch as th
from torch.nn import functional as F

from sb3_trpo_ext.numerics.averages import StateAverage
from sb3_trpo_ext.numerics.conjugate_gradient import CGStatus, Matvec, conjugate_gradient
from sb3_trpo_ext.numerics.curvature import (
    AutogradLinearization,
    Linearization,
    damped,
    gauss_newton_product,
)
from sb3_trpo_ext.numerics.dense import DenseLinearization, DenseNetwork
from sb3_trpo_ext.numerics.line_search import backtracking_line_search
from sb3_trpo_ext.numerics.parameters import FlatParameters, restored_on_error

Rows = slice | th.Tensor

_LEAST_SCALE = 1e-3


class FitOutcome(str, Enum):
    """What became of a critic fit."""

    FITTED = "fitted"
    NO_PARAMETERS = "no_parameters"
    """Every parameter of V is also the policy's: there is nothing that a fit may move."""
    NON_FINITE = "non_finite"
    """The fit met NaN or infinity and was taken back."""


@dataclass(frozen=True)
class CriticReport:
    """What one critic fit did.

    :param outcome: by name
    :param loss: mean squared error; averaged over minibatches for Adam, after the fit for Gauss-Newton
    """

    outcome: FitOutcome
    loss: float = math.nan


class CriticProblem:
    """Mean squared error of V(s) against returns on B states, in the parameters that are V's alone.

    :param values_of: rows ↦ V(s), (rows,) or (rows, 1), rows being a slice or an index tensor
    :param returns: targets R, (B,)
    :param parameters: φ, the parameters that the fit may move
    :param chunk_size: states in one pass
    :param mlp: V as a dense network on fixed inputs (B, in), if that is what it is
    """

    def __init__(
        self,
        values_of: Callable[[Rows], th.Tensor],
        returns: th.Tensor,
        parameters: FlatParameters,
        *,
        chunk_size: int = 2**14,
        mlp: tuple[DenseNetwork, th.Tensor] | None = None,
    ) -> None:
        self.returns = returns
        self.parameters = parameters
        self._values_of = values_of
        self._mlp = mlp
        self._average = StateAverage(len(returns), chunk_size)

    def values(self, rows: Rows) -> th.Tensor:
        """V(s) of these states, (rows,), with a graph if autograd is on."""
        if self._mlp is not None:
            network, inputs = self._mlp
            return network(inputs[rows]).flatten()
        return self._values_of(rows).flatten()

    @th.no_grad()
    def loss(self) -> float:
        """Mean squared error over all states."""

        def squared_errors(rows: slice) -> th.Tensor:
            return (self.returns[rows] - self.values(rows)).double().square().sum()

        return float(self._average(squared_errors))

    def linearize(self) -> tuple[th.Tensor, Matvec, th.Tensor]:
        """(1/B) Jᵀ(R − V), which is −½ ∇loss; v ↦ (1/B) JᵀJv, J being the Jacobian of V in φ; and the scales of φ.

        The scale of a parameter, (P,), is the root mean square of the columns of J/√B that belong to its
        tensor, estimated from one product with random signs (Hutchinson).
        """
        linearization = self._average.keep_if_whole(self._linearization)

        def pull_back_errors(rows: slice) -> th.Tensor:
            at = linearization(rows)
            return at.vjp((self.returns[rows].view_as(at.outputs[0]) - at.outputs[0],))

        def curvature(v: th.Tensor) -> th.Tensor:
            return self._average(lambda rows: gauss_newton_product(linearization(rows), lambda jv: jv, v))

        # signs of its own, so that a fit uses no global random numbers
        signs = th.randint(0, 2, (len(self.returns),), generator=th.Generator().manual_seed(0)).to(self.returns) * 2 - 1

        def pull_back_signs(rows: slice) -> th.Tensor:
            at = linearization(rows)
            return at.vjp((signs[rows].view_as(at.outputs[0]),))

        squares = (self._average(pull_back_signs) * len(signs) ** 0.5).square()
        scales = th.cat([part.mean().sqrt().expand(part.numel()) for part in self.parameters.split(squares)])
        return self._average(pull_back_errors), curvature, scales.clamp(min=_LEAST_SCALE * float(scales.max()))

    def _linearization(self, rows: slice) -> Linearization:
        if self._mlp is not None:
            network, inputs = self._mlp
            return DenseLinearization(network, inputs[rows], self.parameters)
        with th.enable_grad():
            return AutogradLinearization([self.values(rows)], self.parameters)


@dataclass(frozen=True)
class AdamSettings:
    """Minibatch fits with the policy's own optimizer; names as in sb3_contrib.TRPO."""

    n_critic_updates: int
    batch_size: int
    max_grad_norm: float = 0.0
    """Clip the gradient's norm at this; 0 for no clipping."""


def fit_adam(problem: CriticProblem, optimizer: th.optim.Optimizer, settings: AdamSettings) -> CriticReport:
    """Fit V by ``n_critic_updates`` passes of minibatch descent on the mean squared error.

    The other parameters of the optimizer have no gradient, which torch's optimizers pass over.

    :param optimizer: holds φ among its parameters; its state is restored too if the fit fails
    """
    phi, state = problem.parameters.read(), copy.deepcopy(optimizer.state_dict())
    losses: list[th.Tensor] = []
    with restored_on_error(problem.parameters):
        for _ in range(settings.n_critic_updates):
            permutation = th.randperm(len(problem.returns)).to(problem.returns.device)
            for rows in permutation.split(settings.batch_size):
                losses.append(_adam_step(problem, optimizer, rows, settings.max_grad_norm))
    mean_loss = float(th.stack(losses).mean())
    if not (math.isfinite(mean_loss) and bool(th.isfinite(problem.parameters.read()).all())):
        problem.parameters.write(phi)
        optimizer.load_state_dict(state)
        return CriticReport(FitOutcome.NON_FINITE)
    return CriticReport(FitOutcome.FITTED, mean_loss)


def _adam_step(problem: CriticProblem, optimizer: th.optim.Optimizer, rows: th.Tensor, max_grad_norm: float) -> th.Tensor:
    """One minibatch; its loss before the step."""
    optimizer.zero_grad()
    loss = F.mse_loss(problem.values(rows), problem.returns[rows])
    loss.backward()
    if max_grad_norm > 0.0:
        th.nn.utils.clip_grad_norm_(problem.parameters.tensors, max_grad_norm)
    optimizer.step()
    return loss.detach()


@dataclass(frozen=True)
class GaussNewtonSettings:
    """Second-order fits on the whole batch."""

    steps: int = 3
    cg_max_steps: int = 10
    prior: float = 30.0
    """λ is at least prior / B: the fewer the states, the more the old φ weighs."""
    max_candidates: int = 5
    max_damping: float = 1e4


def fit_gauss_newton(problem: CriticProblem, damping: float, settings: GaussNewtonSettings) -> tuple[CriticReport, float]:
    """Fit V by Levenberg-Marquardt steps: (JᵀJ/B + λI) d = Jᵀ(R − V)/B, solved by conjugate gradient.

    A step is halved until the loss falls; λ shrinks where the quadratic model predicted the
    decrease well and grows where it did not (Nocedal & Wright 2006, ch. 4 and 10; Martens 2010).

    :param damping: λ to start from
    :return: what the fit did, and the λ to go on from
    """
    phi, loss_start = problem.parameters.read(), problem.loss()
    loss, adapted = loss_start, damping
    with restored_on_error(problem.parameters):
        for _ in range(settings.steps):
            loss, adapted = _levenberg_marquardt_step(problem, loss, adapted, settings)
    if not (math.isfinite(loss) and bool(th.isfinite(problem.parameters.read()).all())):
        problem.parameters.write(phi)
        return CriticReport(FitOutcome.NON_FINITE, loss_start), damping
    return CriticReport(FitOutcome.FITTED, loss), adapted


def _levenberg_marquardt_step(
    problem: CriticProblem, loss: float, damping: float, settings: GaussNewtonSettings
) -> tuple[float, float]:
    """One step from a given loss; the loss and the λ that it leaves, the loss NaN if the solve was not finite."""
    min_damping = settings.prior / len(problem.returns)
    damping = max(damping, min_damping)
    phi = problem.parameters.read()
    descent, curvature, scales = problem.linearize()
    # in units in which every tensor moves V alike (Marquardt's scaling): the last layer's and the hidden
    # layers' columns of J differ by as much as the returns are large
    descent = descent / scales
    solution = conjugate_gradient(
        damped(lambda v: curvature(v / scales) / scales, damping),
        descent,
        max_steps=settings.cg_max_steps,
        recompute_residual=False,
    )
    if solution.status is CGStatus.NON_FINITE:
        return math.nan, damping
    step = solution.x

    def evaluate(fraction: float) -> float:
        problem.parameters.write(phi + fraction * step / scales)
        return problem.loss()

    def accept(fraction: float, candidate: float) -> bool:
        return candidate < loss

    search = backtracking_line_search(evaluate, accept, shrinking_factor=0.5, max_iter=settings.max_candidates)
    if not search.accepted:
        problem.parameters.write(phi)
        return loss, min(2.0 * damping, settings.max_damping)
    # the model's decrease for the full step: dᵀ(JᵀJ/B + λI)d is dᵀ Jᵀ(R − V)/B, as CG started from zero
    predicted = float(step.double() @ descent.double()) + damping * float(step.double() @ step.double())
    quality = (loss - search.value) / predicted if search.backtracks == 0 and predicted > 0.0 else 0.0
    if quality > 0.75:
        damping = max(0.5 * damping, min_damping)
    elif quality < 0.25:
        damping = min(2.0 * damping, settings.max_damping)
    return search.value, damping
