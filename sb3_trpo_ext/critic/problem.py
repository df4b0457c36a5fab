"""What a critic fit minimises: the squared error of V on one batch, its values and its linearisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch as th
from torch import nn

from sb3_trpo_ext.numerics.averages import Rows, StateAverage, Units
from sb3_trpo_ext.numerics.conjugate_gradient import Matvec
from sb3_trpo_ext.numerics.curvature import (
    GeneralLinearization,
    Linearization,
    gauss_newton_product,
)
from sb3_trpo_ext.numerics.dense import DenseLinearization, DenseNetwork
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.observations import Indexed

_LEAST_SCALE = 1e-3


class FitOutcome(str, Enum):
    """What became of a critic fit."""

    FITTED = "fitted"
    UNCHANGED = "unchanged"
    """No step lowered the error, so that V is as it was: it fits as well as it can, or it does not depend on φ here."""
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
    :param units: what the batch consists of; None: states that count 1 each
    :param mlp: V as a dense network on fixed inputs (B, in), if that is what it is
    :param linearize: the Jacobian of V, if there is a better way than autograd
    :param head: the module that V is the output of, if known
    """

    def __init__(
        self,
        values_of: Callable[[Rows], th.Tensor],
        returns: th.Tensor,
        parameters: FlatParameters,
        *,
        chunk_size: int = 2**14,
        mlp: tuple[DenseNetwork, Indexed] | None = None,
        units: Units | None = None,
        linearize: Callable[[Rows, FlatParameters], Linearization] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        self.returns = returns
        self.units = units or Units(len(returns))
        self.parameters = parameters
        self._values_of = values_of
        self.mlp = mlp
        self._linearize = linearize
        self._average = StateAverage(self.units, chunk_size)
        self._head = head

    def values(self, rows: Rows) -> th.Tensor:
        """V(s) of these states, (rows,), with a graph if autograd is on."""
        if self.mlp is not None:
            network, inputs = self.mlp
            return network(inputs[rows]).flatten()
        return self._values_of(rows).flatten()

    def targets(self, rows: Rows, values: th.Tensor) -> th.Tensor:
        """R of these states in the shape and precision of their values; buffers keep float32 whatever V computes in."""
        return self.returns[rows].to(values).view_as(values)

    @th.no_grad()
    def loss(self) -> float:
        """Mean squared error over all states."""

        def squared_errors(rows: slice) -> th.Tensor:
            return self.units.weigh((self.returns[rows] - self.values(rows)).double().square(), rows).sum()

        return float(self._average(squared_errors))

    @th.no_grad()
    def sizes(self) -> tuple[float, float]:
        """Root mean squares of V and of R, over all states."""

        def squares(rows: slice) -> th.Tensor:
            both = self.values(rows).double(), self.returns[rows].double()
            return th.stack([self.units.weigh(part.square(), rows).sum() for part in both])

        of_values, of_returns = self._average(squares).sqrt().tolist()
        return of_values, of_returns

    @th.no_grad()
    def make_constant(self, largest_loss: float) -> bool:
        """Make V the mean of R by way of its output layer, or leave it.

        :param largest_loss: to leave it if the loss would be larger, or not finite
        :return: whether it was done: φ must have weight and bias of a linear output layer
        """
        head = self._head
        if type(head) is not nn.Linear or head.weight not in self.parameters or head.bias not in self.parameters:
            return False
        phi = self.parameters.read()
        head.weight.zero_()
        head.bias.fill_(self._average(lambda rows: self.units.weigh(self.returns[rows].double(), rows).sum()))
        if self.loss() <= largest_loss < math.inf:
            return True
        self.parameters.write(phi)
        return False

    def linearize(self) -> tuple[th.Tensor, Matvec, th.Tensor]:
        """(1/B) Jᵀ(R − V), which is −½ ∇loss; v ↦ (1/B) JᵀJv, J being the Jacobian of V in φ; and the scales of φ.

        The scale of a parameter, (P,), is the root mean square of the columns of J/√B that belong to its tensor:
        exact where V is a dense network, else estimated (``Linearization.block_squares``).
        """
        linearization = self._average.keep_if_whole(self._linearization)

        def pull_back_errors(rows: slice) -> th.Tensor:
            at = linearization(rows)
            return at.vjp((self.units.weigh(self.targets(rows, at.outputs[0]) - at.outputs[0], rows),))

        def weighted_product(v: th.Tensor, rows: slice) -> th.Tensor:
            return gauss_newton_product(linearization(rows), lambda jv: (self.units.weigh(jv[0], rows),), v)

        def curvature(v: th.Tensor) -> th.Tensor:
            return self._average(lambda rows: weighted_product(v, rows))

        weights = self.units.weights
        squares = self._average(lambda rows: linearization(rows).block_squares(None if weights is None else weights[rows]))
        sizes = th.tensor(self.parameters.sizes, device=squares.device)
        scales = (squares / sizes).sqrt().repeat_interleave(sizes)
        # where J is 0 there is nothing to scale
        least = _LEAST_SCALE * float(scales.max()) or 1.0
        return self._average(pull_back_errors), curvature, scales.clamp(min=least)

    def _linearization(self, rows: slice) -> Linearization:
        if self.mlp is not None:
            network, inputs = self.mlp
            return DenseLinearization(network, inputs[rows], self.parameters)
        if self._linearize is not None:
            return self._linearize(rows, self.parameters)
        return GeneralLinearization(lambda: (self.values(rows),), self.parameters)
