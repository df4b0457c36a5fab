"""What TRPOExt and NPGExt share: the solve of (F + λI)x = g, and the radius to which its solution is scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_trpo_ext.algorithms.archives import SB3_CONTRIB_SETTINGS
from sb3_trpo_ext.algorithms.arguments import Derived, averaged_dimensions, uniform_curvature
from sb3_trpo_ext.algorithms.base import OnPolicyExt
from sb3_trpo_ext.checks import (
    positive_interval,
    require,
    require_choice,
    require_count,
    require_real,
    schedule_of,
    scheduled,
    with_keywords_of,
)
from sb3_trpo_ext.policy_problem import FisherChoice, KLReduction
from sb3_trpo_ext.steps import StepReport
from sb3_trpo_ext.trust_region import TrustRegionReport, TrustRegionSettings, adapted_radius

_ADAPTIVE_RANGE = 10.0


class NaturalGradientExt(OnPolicyExt):
    """An algorithm whose policy step is along (F + λI)⁻¹g. Arguments as in :class:`~sb3_trpo_ext.TRPOExt`."""

    foreign_settings: ClassVar[dict[str | None, dict[str, Any]]] = {
        "sb3_contrib.TRPO": SB3_CONTRIB_SETTINGS,
        "PPO": {"target_kl": None},
    }
    derived_from: ClassVar[dict[str, Derived]] = {
        **OnPolicyExt.derived_from,
        **dict.fromkeys(("target_kl", "cg_damping"), Derived(None, ("kl_reduction",))),
    }

    target_kl: float | Schedule
    cg_damping: float

    @with_keywords_of(OnPolicyExt)
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        target_kl: float | str | Schedule | None = None,
        cg_max_steps: int = 15,
        cg_damping: float | None = None,
        sub_sampling_factor: int = 1,
        fisher: FisherChoice = "auto",
        kl_reduction: KLReduction = "sum",
        step_radius: float = 0.01,
        adaptive_radius: bool = False,
        radius_bounds: Sequence[float] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(policy, env, **arguments)
        self.target_kl = target_kl  # type: ignore[assignment]  # a number or a schedule once the model is set up
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping  # type: ignore[assignment]
        self.sub_sampling_factor = sub_sampling_factor
        self.fisher = fisher
        self.kl_reduction = kl_reduction
        self.step_radius = step_radius
        self.adaptive_radius = adaptive_radius
        self.radius_bounds = None if radius_bounds is None else positive_interval("radius_bounds", radius_bounds)
        self.radius: float | None = None
        self._radius_began_at: float | None = None

    def _setup_model(self) -> None:
        d = averaged_dimensions(self.action_space) if self.kl_reduction == "sum" else 1
        self._derive("target_kl", 0.01 * d)
        self._look_for_masks()
        self._derive("cg_damping", 0.1 * d * (uniform_curvature(self.action_space) if self._is_masked else 1.0))
        self.target_kl = schedule_of("target_kl", self.target_kl)
        super()._setup_model()
        # an archive goes on from its radius, unless load() was given another one to start from
        if self.adaptive_radius and self._radius_began_at != self._first_radius:
            self.radius = self._radius_began_at = self._first_radius

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_choice("fisher", self.fisher, ("auto", "gauss_newton", "hessian", "empirical", "identity"))
        require_choice("kl_reduction", self.kl_reduction, ("sum", "mean"))
        require_real("target_kl", scheduled("target_kl", self.target_kl, 1.0), 0.0, open_below=True)
        both = self.adaptive_radius and callable(self.target_kl)
        require("adaptive_radius", self.adaptive_radius, not both, "False with a schedule of target_kl")
        require_real("cg_damping", self.cg_damping, 0.0)
        require_real("step_radius", self.step_radius, 0.0, open_below=True)
        for name in ("cg_max_steps", "sub_sampling_factor"):
            require_count(name, getattr(self, name))
        if self.radius_bounds is not None:
            least, greatest = self.radius_bounds = positive_interval("radius_bounds", self.radius_bounds)
            if self.adaptive_radius:
                first, bounds = self._first_radius, self.radius_bounds
                require("radius_bounds", bounds, least <= first <= greatest, f"around {first:g}, the radius to start from")

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]:
        other = ("cg_damping", "cg_max_steps", "sub_sampling_factor") if self.fisher == "identity" else ("step_radius",)
        choices = {**super().keywords_without_effect(), f"fisher={self.fisher!r}": other}
        return choices if self.adaptive_radius else {**choices, "adaptive_radius=False": ("radius_bounds",)}

    def _curvature_arguments(self) -> dict[str, Any]:
        return {
            "fisher": self.fisher,
            "kl_reduction": self.kl_reduction,
            "sub_sampling_factor": self.sub_sampling_factor,
        }

    @property
    def _first_radius(self) -> float:
        """From which an adaptive radius starts."""
        assert not callable(self.target_kl)
        return self.step_radius if self.fisher == "identity" else self.target_kl

    def _step_settings(self, **further: Any) -> TrustRegionSettings:
        """What the maths is to be told now: the radius may follow a schedule, or the steps before."""
        in_l2 = self.fisher == "identity"
        target_kl = scheduled("target_kl", self.target_kl, self._current_progress_remaining)
        step_radius: float | None = self.step_radius if in_l2 else None
        if self.adaptive_radius:
            if self.radius is None:  # switched on after the model was set up
                self.radius = self._radius_began_at = self._first_radius
            target_kl, step_radius = (target_kl, self.radius) if in_l2 else (self.radius, None)
        damping = 0.0 if in_l2 else self.cg_damping
        return TrustRegionSettings(
            target_kl, step_radius=step_radius, cg_damping=damping, cg_max_steps=self.cg_max_steps, **further
        )

    def _largest_kl(self) -> float:
        return self._step_settings().target_kl

    def _adapt(self, report: StepReport) -> None:
        if self.adaptive_radius:
            assert isinstance(report, TrustRegionReport) and self.radius is not None
            first = self._first_radius
            least, greatest = self.radius_bounds or (first / _ADAPTIVE_RANGE, first * _ADAPTIVE_RANGE)
            self.radius = adapted_radius(self.radius, report, (least, greatest))

    def _describe_length(self) -> str:
        return f"1/2 |s|^2 = {self.step_radius:g}" if self.fisher == "identity" else f"damping {self.cg_damping:g}"

    def _describe(self) -> str:
        return (
            f"KL(old || new), {self.kl_reduction} over {averaged_dimensions(self.action_space)} action dimension(s); "
            f"{self._describe_length()}; Fisher: {self.fisher}. {super()._describe()}"
        )
