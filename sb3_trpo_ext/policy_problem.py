"""One update's problem on one batch of a given policy: maximise L(θ) subject to mean KL(π_old ‖ π_θ) ≤ δ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch import nn

from sb3_trpo_ext.distributions import Parameters, ParametricFamily, family_of, require_kl
from sb3_trpo_ext.masks import allowed_outputs
from sb3_trpo_ext.numerics.averages import Group, Rows, StateAverage, Units
from sb3_trpo_ext.numerics.conjugate_gradient import Matvec
from sb3_trpo_ext.numerics.curvature import (
    GeneralLinearization,
    Linearization,
    gauss_newton_product,
    hessian_product,
)
from sb3_trpo_ext.numerics.dense import DenseLinearization
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.objectives import Objective, ObjectivePart
from sb3_trpo_ext.observations import Indexed
from sb3_trpo_ext.old_policy import OldPolicy
from sb3_trpo_ext.standard_policies import MlpActor
from sb3_trpo_ext.steps import Evaluation

FisherChoice = Literal["auto", "gauss_newton", "hessian", "empirical", "identity"]
KLReduction = Literal["sum", "mean"]
Linearize = Callable[[Rows, FlatParameters], Linearization]
"""The Jacobian of some outputs on these states in some parameters, at their present values."""


class MinibatchMeans(NamedTuple):
    """What a loss is made of, as averages over a minibatch, with a graph if autograd is on."""

    objective: th.Tensor
    """An unbiased estimate of the surrogate L(θ)."""
    kl: th.Tensor
    """KL(π_old ‖ π_θ)."""
    log_prob: th.Tensor
    """ln π_θ(a|s) of the actions that were taken."""


Minibatch = Callable[[], MinibatchMeans | None]
"""The means at the present θ, or None where it has no policy."""


class PolicyProblem:
    """The trust-region problem of a policy on B states, as :class:`TrustRegionProblem` wants it.

    :param distribution_of: rows ↦ π_θ(·|s) on these states, through the algorithm's one hook
    :param states: B, or the units that the batch consists of
    :param objectives: whose sum is the surrogate, each averaged over its own states
    :param actions: (B,) or (B, D), at which the empirical Fisher takes its scores
    :param module: whose parameters may be policy parameters
    :param fisher: which matrix; ``"auto"`` is Gauss-Newton where the family has an entry, else the Hessian;
        ``"identity"`` is I, whatever the policy
    :param kl_reduction: ``"mean"`` divides KL and F by the number of dimensions, as sb3_contrib does
    :param sub_sampling_factor: F averages over every k-th unit; L and the KL keep them all
    :param chunk_size: states in one pass
    :param mlp: the standard actor and its flat inputs (B, in), if the policy has one
    :param linearize: the Jacobian of the distribution's parameters, if there is a better way than autograd
    :param masks: which choices each state allows, (B, Σ choices), of which the actor's own outputs know nothing
    """

    def __init__(
        self,
        distribution_of: Callable[[Rows], Distribution],
        states: int | Units,
        objectives: Sequence[Objective],
        actions: th.Tensor,
        module: nn.Module,
        *,
        fisher: FisherChoice = "auto",
        kl_reduction: KLReduction = "sum",
        sub_sampling_factor: int = 1,
        chunk_size: int = 2**14,
        mlp: tuple[MlpActor, Indexed] | None = None,
        linearize: Linearize | None = None,
        masks: th.Tensor | None = None,
    ) -> None:
        self._distribution_of = distribution_of
        self._units = units = Units.of(states)
        self._average = StateAverage(units, chunk_size)
        zero = th.zeros((), device=actions.device)
        self._parts = [ObjectivePart([objective for objective in objectives if objective.states is None], self._average, zero)]
        self._parts += [
            ObjectivePart([objective], StateAverage(units.apart(len(objective.states)), chunk_size), zero, objective.states)
            for objective in objectives
            if objective.states is not None
        ]
        thinned, self._thinned_rows = units.every(sub_sampling_factor)
        self._fisher_average = StateAverage(thinned, chunk_size)
        self._actions = actions
        self._mlp, self._masks, self._linearize = mlp, masks, linearize
        first = slice(0, units.length)
        self._family = family_of(self._without_graph(first))
        if not isinstance(self._family, ParametricFamily):
            require_kl(self._without_graph(first))
        self._old = OldPolicy(self._family, distribution_of, module, units)
        self._divisor = self._family.averaged_dimensions(self._old.at_present(first)) if kl_reduction == "mean" else 1
        self.fisher = self._resolve(fisher)
        self.parameters = self._policy_parameters(module)
        self._objective_old, self.entropy = self._sum_of_averages(self._take_old).tolist()

    @property
    def group(self) -> Group:
        """Who else has states of the batch."""
        return self._units.group

    def gradient(self) -> tuple[float, th.Tensor]:
        """L(θ_old) and ∇L(θ_old)."""

        def gradient_of_sum(part: ObjectivePart, rows: slice) -> th.Tensor:
            if not part.objectives:
                return self.parameters.flatten(None for _ in self.parameters.tensors)
            with th.enable_grad():
                total = part.weighted(self._distribution_of(part.in_batch(rows)), rows).sum()
            return self.parameters.gradient(total)

        return self._objective_old, self._sum_of_averages(gradient_of_sum)

    @th.no_grad()
    def evaluate(self) -> Evaluation:
        """L(θ) and the mean KL(π_old ‖ π_θ), from one forward pass over the batch and over objectives' own states."""

        def totals(part: ObjectivePart, rows: slice) -> th.Tensor:
            # before anything else, because a policy refills one Distribution object at every call
            old = None if part.states is not None else self._old.on_chunk(rows)
            try:
                distribution = self._distribution_of(part.in_batch(rows))
            except ValueError:
                # torch's distributions refuse parameters that are NaN: this θ has no policy, for nobody in the group
                return th.full((2,), math.nan, dtype=th.float64, device=self._actions.device)
            terms = part.weighted(distribution, rows).sum(dtype=th.float64)
            if part.states is not None:
                return th.stack([terms, th.zeros_like(terms)])
            kl = self._units.weigh(self._family.kl(old, distribution), rows).sum(dtype=th.float64)
            return th.stack([terms, kl / self._divisor])

        return Evaluation(*self._sum_of_averages(totals).tolist())

    def start_again(self) -> float:
        """Start from a policy that is not the one that acted any more, its running statistics having moved; its KL."""
        self._objective_old, kl = self.evaluate()
        return kl

    def minibatches(self, batch_size: int) -> list[Minibatch]:
        """A random partition of the states.

        Objectives with states of their own have those shared out among as many parts.
        """
        device = self._actions.device
        partition = [rows.to(device) for rows in self._units.partition(batch_size)]
        counts = [part.average.units.count for part in self._parts[1:]]
        shares = [th.randperm(count, device="cpu").to(device).tensor_split(len(partition)) for count in counts]
        old = self._old.on_minibatches(partition)
        return [
            self._minibatch(rows, old[i], [share[i] for share in shares], len(partition)) for i, rows in enumerate(partition)
        ]

    def _minibatch(self, rows: th.Tensor, kept: Any, shares: list[th.Tensor], of: int) -> Minibatch:
        # now, when everybody asks: means() may end before its sums where there is no policy
        total, mean = self._units.total_of(rows), self._units.mean

        def means() -> MinibatchMeans | None:
            old = self._old.on_rows(rows) if kept is None else kept
            try:
                distribution = self._distribution_of(rows)
            except ValueError:
                # torch's distributions refuse parameters that are NaN
                return None
            objective = self._parts[0].mean(distribution, rows, total)
            kl = mean(self._family.kl(old, distribution), rows, total) / self._divisor
            log_prob = mean(distribution.log_prob(self._actions[rows]), rows, total)
            # last, because a policy refills one Distribution object at every call
            for part, share in zip(self._parts[1:], shares, strict=True):
                if len(share) > 0:
                    terms = part.terms(self._distribution_of(part.in_batch(share)), share)
                    objective = objective + of / part.average.units.total * terms.sum()
            return MinibatchMeans(objective, kl, log_prob)

        return means

    def fisher_product(self) -> Matvec:
        """v ↦ Fv, the average over every ``sub_sampling_factor``-th state, linearised at the present θ."""
        if self.fisher == "identity":
            return lambda v: v
        linearize = {"gauss_newton": self._gauss_newton, "hessian": self._hessian, "empirical": self._empirical}[self.fisher]
        product = self._fisher_average.keep_if_whole(lambda rows: linearize(self._thinned_rows(rows)))
        return lambda v: self._fisher_average(lambda rows: product(rows)(v))

    def _gauss_newton(self, rows: Rows) -> Matvec:
        family, linearization = self._family, self._linearization(rows)
        assert isinstance(family, ParametricFamily)

        def metric(tangents: Parameters) -> Parameters:
            products = family.metric(linearization.outputs, tangents)
            return tuple(self._units.weigh(part / self._divisor, rows) for part in products)

        return lambda v: gauss_newton_product(linearization, metric, v)

    def _linearization(self, rows: Rows) -> Linearization:
        """The Jacobian in θ of the distribution's parameters."""
        if self._mlp is not None:
            actor, inputs = self._mlp
            linear: Linearization = DenseLinearization(actor.network, inputs[rows], self.parameters, free=actor.log_std)
        elif self._linearize is not None:
            linear = self._linearize(rows, self.parameters)
        else:
            return GeneralLinearization(lambda: self._outputs(rows), self.parameters)
        if self._masks is not None:
            linear.outputs = (allowed_outputs(linear.outputs[0], self._masks[rows], th.where),)
        return linear

    def _hessian(self, rows: Rows) -> Matvec:
        old = self._old.at_present(rows)

        def kl() -> th.Tensor:
            return self._units.weigh(self._family.kl(old, self._distribution_of(rows)), rows).sum() / self._divisor

        return hessian_product(kl, self.parameters)

    def _empirical(self, rows: Rows) -> Matvec:
        """Σ ∇log π ∇log πᵀ: a Gauss-Newton product with the log-probabilities as outputs and M = I."""
        scores = GeneralLinearization(lambda: (self._distribution_of(rows).log_prob(self._actions[rows]),), self.parameters)

        def weigh(tangents: Parameters) -> Parameters:
            return tuple(self._units.weigh(part, rows) for part in tangents)

        return lambda v: gauss_newton_product(scores, weigh, v) / self._divisor

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
        with th.enable_grad():
            return FlatParameters.reached_by_any(map(self._outputs, self._average.chunks), module, self.group)

    def _outputs(self, rows: Rows) -> Parameters:
        """Tensors through which π_θ on these states depends on θ, with a graph if autograd is on."""
        if isinstance(self._family, ParametricFamily):
            return self._family.parameters(self._distribution_of(rows))
        return (self._family.kl(self._old.at_present(rows), self._distribution_of(rows)),)

    @th.no_grad()
    def _without_graph(self, rows: Rows) -> Distribution:
        return self._distribution_of(rows)

    def _entropy(self, distribution: Distribution, rows: slice) -> th.Tensor:
        """Per state; where there is no closed form, estimated at the action that was taken."""
        try:
            entropy = distribution.entropy()
        except NotImplementedError:
            entropy = None
        return -distribution.log_prob(self._actions[rows]) if entropy is None else entropy

    @th.no_grad()
    def _take_old(self, part: ObjectivePart, rows: slice) -> th.Tensor:
        """Keep what is needed of π_old on these states; their summed terms of L and, of the batch, entropy."""
        old = self._distribution_of(part.in_batch(rows))
        for objective in part.objectives:
            objective.set_old(old, rows)
        terms = part.weighted(old, rows).sum(dtype=th.float64)
        if part.states is not None:
            return th.stack([terms, th.zeros_like(terms)])
        self._old.keep(rows, old)
        return th.stack([terms, self._units.weigh(self._entropy(old, rows), rows).sum(dtype=th.float64)])

    def _sum_of_averages(self, sum_over: Callable[[ObjectivePart, slice], th.Tensor]) -> th.Tensor:
        """Each part's average over its own states, added up."""
        averages = [part.average(lambda rows, part=part: sum_over(part, rows)) for part in self._parts]  # type: ignore[misc]
        return th.stack(averages).sum(dim=0)
