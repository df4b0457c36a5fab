"""One update's problem on one batch of a given policy: maximise L(θ) subject to mean KL(π_old ‖ π_θ) ≤ δ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch import nn

from sb3_trpo_ext.distributions import Parameters, ParametricFamily, family_of
from sb3_trpo_ext.numerics.averages import StateAverage
from sb3_trpo_ext.numerics.conjugate_gradient import Matvec
from sb3_trpo_ext.numerics.curvature import (
    AutogradLinearization,
    Linearization,
    gauss_newton_product,
    hessian_product,
)
from sb3_trpo_ext.numerics.dense import DenseLinearization
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.objectives import Objective
from sb3_trpo_ext.standard_policies import MlpActor
from sb3_trpo_ext.trust_region import Evaluation

FisherChoice = Literal["auto", "gauss_newton", "hessian", "empirical"]
KLReduction = Literal["sum", "mean"]


class PolicyProblem:
    """The trust-region problem of a policy on B states, as :class:`TrustRegionProblem` wants it.

    :param distribution_of: rows ↦ π_θ(·|s) on these states, through the algorithm's one hook
    :param n_states: B
    :param objective: the surrogate
    :param actions: (B,) or (B, D), at which the empirical Fisher takes its scores
    :param module: whose parameters may be policy parameters
    :param fisher: which matrix; ``"auto"`` is Gauss-Newton where the family has an entry, else the Hessian
    :param kl_reduction: ``"mean"`` divides KL and F by the number of dimensions, as sb3_contrib does
    :param sub_sampling_factor: F averages over every k-th state; L and the KL keep them all
    :param chunk_size: states in one pass
    :param mlp: the standard actor and its flat inputs (B, in), if the policy has one
    """

    def __init__(
        self,
        distribution_of: Callable[[slice], Distribution],
        n_states: int,
        objective: Objective,
        actions: th.Tensor,
        module: nn.Module,
        *,
        fisher: FisherChoice = "auto",
        kl_reduction: KLReduction = "sum",
        sub_sampling_factor: int = 1,
        chunk_size: int = 2**14,
        mlp: tuple[MlpActor, th.Tensor] | None = None,
    ) -> None:
        self._distribution_of = distribution_of
        self._objective = objective
        self._average = StateAverage(n_states, chunk_size)
        self._fisher_average = StateAverage(-(-n_states // sub_sampling_factor), chunk_size)
        self._stride = sub_sampling_factor
        self._actions = actions
        self._mlp = mlp
        first = slice(0, 1)
        self._family = family_of(self._without_graph(first))
        self._divisor = 1
        if kl_reduction == "mean":
            self._divisor = self._family.averaged_dimensions(self._family.freeze(self._without_graph(first)))
        self.fisher = self._resolve(fisher)
        self.parameters = self._policy_parameters(module)
        self._old: dict[int, Any] = {}  # by the first row of each chunk
        self._objective_old, self.entropy = self._average(self._take_old).tolist()

    def gradient(self) -> tuple[float, th.Tensor]:
        """L(θ_old) and ∇L(θ_old)."""

        def gradient_of_sum(rows: slice) -> th.Tensor:
            with th.enable_grad():
                total = self._objective.terms(self._distribution_of(rows), rows).sum()
            return self.parameters.gradient(total)

        return self._objective_old, self._average(gradient_of_sum)

    @th.no_grad()
    def evaluate(self) -> Evaluation:
        """L(θ) and the mean KL(π_old ‖ π_θ), from one forward pass."""

        def totals(rows: slice) -> th.Tensor:
            distribution = self._distribution_of(rows)
            terms = self._objective.terms(distribution, rows).sum(dtype=th.float64)
            kl = self._family.kl(self._old[rows.start], distribution).sum(dtype=th.float64)
            return th.stack([terms, kl / self._divisor])

        try:
            objective, kl = self._average(totals).tolist()
        except ValueError:
            # torch's distributions refuse parameters that are NaN: this θ has no policy
            return Evaluation(math.nan, math.nan)
        return Evaluation(objective, kl)

    def fisher_product(self) -> Matvec:
        """v ↦ Fv, the average over every ``sub_sampling_factor``-th state, linearised at the present θ."""
        linearize = {"gauss_newton": self._gauss_newton, "hessian": self._hessian, "empirical": self._empirical}[self.fisher]
        product = self._fisher_average.keep_if_whole(
            lambda rows: linearize(slice(rows.start * self._stride, rows.stop * self._stride, self._stride))
        )
        return lambda v: self._fisher_average(lambda rows: product(rows)(v))

    def _gauss_newton(self, rows: slice) -> Matvec:
        family, linearization = self._family, self._linearization(rows)
        assert isinstance(family, ParametricFamily)

        def metric(tangents: Parameters) -> Parameters:
            return tuple(part / self._divisor for part in family.metric(linearization.outputs, tangents))

        return lambda v: gauss_newton_product(linearization, metric, v)

    def _linearization(self, rows: slice) -> Linearization:
        """The Jacobian in θ of the distribution's parameters."""
        if self._mlp is not None:
            actor, inputs = self._mlp
            return DenseLinearization(actor.network, inputs[rows], self.parameters, free=actor.log_std)
        return AutogradLinearization(self._outputs(rows), self.parameters)

    def _hessian(self, rows: slice) -> Matvec:
        old = self._family.freeze(self._without_graph(rows))
        with th.enable_grad():
            kl = self._family.kl(old, self._distribution_of(rows)).sum() / self._divisor
        return hessian_product(kl, self.parameters)

    def _empirical(self, rows: slice) -> Matvec:
        """Σ ∇log π ∇log πᵀ: a Gauss-Newton product with the log-probabilities as outputs and M = I."""
        with th.enable_grad():
            scores = AutogradLinearization([self._distribution_of(rows).log_prob(self._actions[rows])], self.parameters)
        return lambda v: gauss_newton_product(scores, lambda tangents: tangents, v) / self._divisor

    def _resolve(self, fisher: FisherChoice) -> str:
        has_metric = isinstance(self._family, ParametricFamily)
        if fisher == "auto":
            return "gauss_newton" if has_metric else "hessian"
        if fisher == "gauss_newton" and not has_metric:
            raise ValueError(
                "fisher='gauss_newton' needs a distribution whose KL Hessian is known; register a family for "
                "this one with register_distribution_family(), or use fisher='hessian'"
            )
        return fisher

    def _policy_parameters(self, module: nn.Module) -> FlatParameters:
        if self._mlp is not None:
            actor = set(self._mlp[0].parameters())
            return FlatParameters(p for p in module.parameters() if p in actor and p.requires_grad)
        # every state is asked: a policy may route states through different parameters
        return FlatParameters.reached_by_any((self._outputs(rows) for rows in self._average.chunks), module)

    def _outputs(self, rows: slice) -> Parameters:
        """Tensors with a graph through which π_θ on these states depends on θ."""
        with th.enable_grad():
            if isinstance(self._family, ParametricFamily):
                return self._family.parameters(self._distribution_of(rows))
            return (self._family.kl(self._family.freeze(self._without_graph(rows)), self._distribution_of(rows)),)

    @th.no_grad()
    def _without_graph(self, rows: slice) -> Distribution:
        return self._distribution_of(rows)

    def _entropy(self, distribution: Distribution, rows: slice) -> th.Tensor:
        """Per state; where there is no closed form, estimated at the action that was taken."""
        try:
            entropy = distribution.entropy()
        except NotImplementedError:
            entropy = None
        return -distribution.log_prob(self._actions[rows]) if entropy is None else entropy

    @th.no_grad()
    def _take_old(self, rows: slice) -> th.Tensor:
        """Keep what is needed of π_old on these states; their summed terms of L and entropy."""
        old = self._distribution_of(rows)
        self._old[rows.start] = self._family.freeze(old)
        self._objective.set_old(old, rows)
        entropy = self._entropy(old, rows)
        terms = self._objective.terms(old, rows)
        return th.stack([terms.sum(dtype=th.float64), entropy.sum(dtype=th.float64)])
