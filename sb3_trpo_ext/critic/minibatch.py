"""First-order fits of V: minibatch descent with the policy's own optimizer, Adam in most cases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch as th
from torch.nn import functional as F

from sb3_trpo_ext.critic.problem import CriticProblem, CriticReport, FitOutcome
from sb3_trpo_ext.numerics.checkpoint import Checkpoint
from sb3_trpo_ext.numerics.dense import DenseLinearization
from sb3_trpo_ext.numerics.flat_optimizer import FlatOptimizer
from sb3_trpo_ext.numerics.gradient_step import clip, gradient_step, sum_gradients


@dataclass(frozen=True)
class AdamSettings:
    """Minibatch fits with the policy's own optimizer; names as in sb3_contrib.TRPO."""

    n_critic_updates: int
    batch_size: int
    max_grad_norm: float = 0.0
    """Clip the gradient's norm at this; 0 for no clipping."""


def fit_adam(problem: CriticProblem, optimizer: th.optim.Optimizer, settings: AdamSettings) -> CriticReport:
    """Fit V by ``n_critic_updates`` passes of minibatch descent on the mean squared error.

    The other parameters of the optimizer are not touched.

    :param optimizer: holds φ among its parameters; its state is restored too if the fit fails
    """
    descent = _descent(problem, optimizer, settings)
    losses: list[th.Tensor] = []
    with Checkpoint(problem.parameters, optimizer) as start:
        for _ in range(settings.n_critic_updates):
            losses += descent.epoch([rows.to(problem.returns.device) for rows in problem.units.partition(settings.batch_size)])
        descent.finish()
    mean_loss = float(problem.units.group.sum(th.stack(losses)).mean())
    if not (math.isfinite(mean_loss) and bool(th.isfinite(problem.parameters.read()).all())):
        start.restore()
        return CriticReport(FitOutcome.NON_FINITE)
    return CriticReport(FitOutcome.FITTED, mean_loss)


class _Descent(Protocol):
    """One pass after the other over the batch."""

    def epoch(self, minibatches: list[th.Tensor]) -> list[th.Tensor]:
        """Step on each minibatch, given by its rows, one after the other; the losses before the steps."""
        ...

    def finish(self) -> None:
        """Called after the last pass."""
        ...


def _descent(problem: CriticProblem, optimizer: th.optim.Optimizer, settings: AdamSettings) -> _Descent:
    """Layer by layer where V is a dense network and the optimizer treats every number alike, else by autograd."""
    flat = None if problem.mlp is None else FlatOptimizer.of(optimizer, problem.parameters)
    return _AutogradDescent(problem, optimizer, settings) if flat is None else _DenseDescent(problem, flat, settings)


class _AutogradDescent:
    def __init__(self, problem: CriticProblem, optimizer: th.optim.Optimizer, settings: AdamSettings) -> None:
        self._problem, self._optimizer, self._settings = problem, optimizer, settings

    def epoch(self, minibatches: list[th.Tensor]) -> list[th.Tensor]:
        return [self._step(rows) for rows in minibatches]

    def _step(self, rows: th.Tensor) -> th.Tensor:
        values = self._problem.values(rows)
        errors = F.mse_loss(values, self._problem.targets(rows, values), reduction="none")
        units = self._problem.units
        loss = units.mean(errors, rows, units.total_of(rows))
        gradient_step(loss, self._problem.parameters, self._optimizer, self._settings.max_grad_norm, units.group)
        return loss.detach()

    def finish(self) -> None:
        pass


class _DenseDescent:
    """The same steps without a graph and on one flat vector: small networks are all bookkeeping otherwise."""

    def __init__(self, problem: CriticProblem, optimizer: FlatOptimizer, settings: AdamSettings) -> None:
        assert problem.mlp is not None
        self._network, self._inputs = problem.mlp
        self._problem, self._optimizer, self._settings = problem, optimizer, settings
        self._linearizations: dict[int, DenseLinearization] = {}  # by the size of the minibatch

    def epoch(self, minibatches: list[th.Tensor]) -> list[th.Tensor]:
        order, sizes = th.cat(minibatches), [len(rows) for rows in minibatches]
        inputs: Iterable[th.Tensor] = (self._inputs[rows] for rows in minibatches)
        if isinstance(self._inputs, th.Tensor):
            # small enough to be put in order at once
            inputs = self._inputs[order].split(sizes)
        returns = self._problem.returns[order].to(self._optimizer.theta).unsqueeze(1)
        return [self._step(*batch) for batch in zip(minibatches, inputs, returns.split(sizes), strict=True)]

    @th.no_grad()
    def _step(self, rows: th.Tensor, inputs: th.Tensor, returns: th.Tensor) -> th.Tensor:
        at, units = self._linearize(inputs), self._problem.units
        error, total = at.outputs[0] - returns, units.total_of(rows)
        # the gradient of the mean of the squared errors
        at.write_vjp((units.weigh(error * (2.0 / total), rows),), self._optimizer.gradient)
        sum_gradients([self._optimizer.theta], units.group)
        clip([self._optimizer.theta], self._settings.max_grad_norm)
        self._optimizer.step()
        return units.mean(error.square_().flatten(), rows, total)

    def _linearize(self, inputs: th.Tensor) -> DenseLinearization:
        known = self._linearizations.get(len(inputs))
        if known is None:
            known = DenseLinearization(self._network, inputs, self._problem.parameters)
            self._linearizations[len(inputs)] = known
        else:
            known.move(inputs)
        return known

    def finish(self) -> None:
        self._optimizer.write_back()
