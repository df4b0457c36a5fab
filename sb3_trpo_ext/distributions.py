"""What each action distribution gives the maths: parameters, KL(old ‖ new), and the Hessian of that KL.

A distribution is looked up by its SB3 class, then by the torch class that it wraps. One without an
entry still works, through :class:`GenericFamily` and the Hessian-of-KL product; new entries are made
with :func:`register_distribution_family`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution, MultiCategoricalDistribution
from torch import distributions as td
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from torch.nn.functional import log_softmax, softmax

Parameters = tuple[th.Tensor, ...]


class DistributionFamily(ABC):
    """The maths of one family of action distributions."""

    @abstractmethod
    def freeze(self, distribution: Distribution) -> Any:
        """What :meth:`kl` needs to know of π_old; the distribution must have been made without a graph.

        Tensors may share memory with θ: whoever keeps them makes copies through :func:`map_tensors`.
        """

    @abstractmethod
    def kl(self, old: Any, new: Distribution) -> th.Tensor:
        """KL(old ‖ new) per state, (B,), summed over action dimensions."""

    @abstractmethod
    def averaged_dimensions(self, old: Any) -> int:
        """What ``kl_reduction="mean"`` divides by: the dimensions over which sb3_contrib averages."""


class ParametricFamily(DistributionFamily):
    """A family whose KL and its Hessian M are known in closed form."""

    @abstractmethod
    def parameters(self, distribution: Distribution) -> Parameters:
        """The parameters of the distribution, each (B, ·), with their graph."""

    @abstractmethod
    def kl_of(self, old: Parameters, new: Parameters) -> th.Tensor:
        """KL(old ‖ new) per state, (B,)."""

    @abstractmethod
    def metric(self, at: Parameters, tangents: Parameters) -> Parameters:
        """t ↦ Mt, M being the Hessian of KL(at ‖ new) in ``new`` at new = at; block-diagonal over states."""

    def freeze(self, distribution: Distribution) -> Parameters:
        return self.parameters(distribution)

    def kl(self, old: Parameters, new: Distribution) -> th.Tensor:
        return self.kl_of(old, self.parameters(new))

    def averaged_dimensions(self, old: Parameters) -> int:
        return 1


class GaussianFamily(ParametricFamily):
    """Diagonal Gaussians in (mean, log σ), each (B, D): Box, gSDE, and squashed ones.

    A KL does not change under a fixed bijection, so tanh squashing needs nothing more.
    """

    def parameters(self, distribution: Distribution) -> Parameters:
        normal = distribution.distribution
        assert isinstance(normal, Normal)
        return normal.loc, normal.scale.log()

    def kl_of(self, old: Parameters, new: Parameters) -> th.Tensor:
        (old_mean, old_log_std), (mean, log_std) = old, new
        spread = log_std - old_log_std
        shift = (mean - old_mean) * th.exp(-log_std)
        # log(σ/σ_old) + (σ_old² + Δμ²) / 2σ² − 1/2, written so that small differences do not cancel
        return (spread + 0.5 * (th.expm1(-2.0 * spread) + shift * shift)).sum(dim=1)

    def metric(self, at: Parameters, tangents: Parameters) -> Parameters:
        return tangents[0] * th.exp(-2.0 * at[1]), 2.0 * tangents[1]

    def averaged_dimensions(self, old: Parameters) -> int:
        return old[0].shape[1]


class CategoricalFamily(ParametricFamily):
    """One or several independent categoricals in their logits (B, Σ sizes): Discrete, MultiDiscrete.

    Logits may be normalised or not.

    :param sizes: the number of choices of each
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = [int(size) for size in sizes]

    def parameters(self, distribution: Distribution) -> Parameters:
        categoricals: Any = distribution.distribution
        if isinstance(categoricals, Categorical):
            return (categoricals.logits,)
        return (th.cat([categorical.logits for categorical in categoricals], dim=1),)

    def kl_of(self, old: Parameters, new: Parameters) -> th.Tensor:
        kl = th.zeros_like(new[0][:, 0])
        for old_logits, logits in zip(old[0].split(self.sizes, dim=1), new[0].split(self.sizes, dim=1), strict=True):
            old_log_probs = log_softmax(old_logits, dim=1)
            terms = old_log_probs.exp() * (old_log_probs - log_softmax(logits, dim=1))
            # a choice that is masked out (logit −∞) has no part in the KL
            kl = kl + terms.masked_fill(th.isneginf(old_log_probs), 0.0).sum(dim=1)
        return kl

    def metric(self, at: Parameters, tangents: Parameters) -> Parameters:
        blocks = []
        for logits, tangent in zip(at[0].split(self.sizes, dim=1), tangents[0].split(self.sizes, dim=1), strict=True):
            p = softmax(logits, dim=1)
            blocks.append(p * (tangent - (p * tangent).sum(dim=1, keepdim=True)))  # (diag p − ppᵀ) t
        return (blocks[0] if len(blocks) == 1 else th.cat(blocks, dim=1),)


class BernoulliFamily(ParametricFamily):
    """Independent Bernoullis in their logits (B, D): MultiBinary."""

    def parameters(self, distribution: Distribution) -> Parameters:
        bernoulli = distribution.distribution
        assert isinstance(bernoulli, Bernoulli)
        return (bernoulli.logits,)

    def kl_of(self, old: Parameters, new: Parameters) -> th.Tensor:
        old_logits, logits = old[0], new[0]
        # Σ_b p_old(b) (log p_old(b) − log p(b)), with log p(1) = −softplus(−l), log p(0) = −softplus(l)
        softplus = th.nn.functional.softplus
        p = th.sigmoid(old_logits)
        on = softplus(-logits) - softplus(-old_logits)
        off = softplus(logits) - softplus(old_logits)
        return (p * on + (1.0 - p) * off).sum(dim=1)

    def metric(self, at: Parameters, tangents: Parameters) -> Parameters:
        p = th.sigmoid(at[0])
        return (p * (1.0 - p) * tangents[0],)

    def averaged_dimensions(self, old: Parameters) -> int:
        return old[0].shape[1]


class GenericFamily(DistributionFamily):
    """Any distribution whose torch distribution has a registered KL; M unknown."""

    def freeze(self, distribution: Distribution) -> Any:
        # a policy refills one Distribution object at every call, with new distributions of torch
        return distribution.distribution

    def kl(self, old: Any, new: Distribution) -> th.Tensor:
        pairs = zip(_as_list(old), _as_list(new.distribution), strict=True)
        terms = [kl_divergence(p, q) for p, q in pairs]
        return th.stack([term.flatten(1).sum(dim=1) if term.ndim > 1 else term for term in terms]).sum(dim=0)

    def averaged_dimensions(self, old: Any) -> int:
        return 1 if isinstance(old, (list, tuple)) else math.prod(old.batch_shape[1:])


FamilyFactory = Callable[[Any], DistributionFamily]

_FAMILIES: dict[type, FamilyFactory] = {
    Normal: lambda _: GaussianFamily(),
    Categorical: lambda categorical: CategoricalFamily([categorical.logits.shape[-1]]),
    Bernoulli: lambda _: BernoulliFamily(),
    MultiCategoricalDistribution: lambda distribution: CategoricalFamily(distribution.action_dims),
}


def register_distribution_family(kind: type, factory: FamilyFactory) -> None:
    """Give a distribution class its own maths.

    :param kind: an SB3 ``Distribution`` class, or the class of torch distribution that it wraps;
        subclasses are covered too
    :param factory: makes the family, given the instance that was looked up
    """
    _FAMILIES[kind] = factory


def family_of(distribution: Distribution) -> DistributionFamily:
    """The entry for a distribution: by its own class, else by the wrapped one, else the generic one."""
    for instance in (distribution, distribution.distribution):
        for kind in type(instance).__mro__:
            if kind in _FAMILIES:
                return _FAMILIES[kind](instance)
    return GenericFamily()


def require_kl(distribution: Distribution) -> None:
    """Refuse a distribution, made without a graph, of which nobody knows the KL.

    :raises ValueError: if neither torch nor a registered family knows it
    """
    family = family_of(distribution)
    try:
        family.kl(family.freeze(distribution), distribution)
    except NotImplementedError as error:
        kinds = ", ".join(sorted({type(part).__name__ for part in _as_list(distribution.distribution)}))
        raise ValueError(
            f"expected an action distribution whose KL is known, got {type(distribution).__name__} of {kinds}, of which torch "
            "knows none; give it one with sb3_trpo_ext.distributions.register_distribution_family()"
        ) from error


def map_tensors(function: Callable[[th.Tensor], th.Tensor], frozen: Any) -> Any:
    """What a family froze, with a function applied to its tensors.

    Tensors are found in tuples, lists and dicts, and in distributions of SB3 and torch.

    :raises TypeError: if it holds anything else that cannot be copied
    """
    if isinstance(frozen, th.Tensor):
        return function(frozen)
    if isinstance(frozen, dict):
        return {key: map_tensors(function, part) for key, part in frozen.items()}
    if isinstance(frozen, (tuple, list)):
        parts = [map_tensors(function, part) for part in frozen]
        return type(frozen)(*parts) if hasattr(frozen, "_fields") else type(frozen)(parts)
    if isinstance(frozen, (Distribution, td.Distribution)):
        kept = copy.copy(frozen)
        kept.__dict__ = {name: map_tensors(function, part) for name, part in vars(frozen).items()}
        return kept
    try:
        return copy.deepcopy(frozen)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{type(frozen).__name__} cannot be copied: {error}") from error


def _as_list(distribution: Any) -> Sequence[Any]:
    return distribution if isinstance(distribution, (list, tuple)) else [distribution]
