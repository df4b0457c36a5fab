"""Natural Policy Gradient (Kakade 2001) as an SB3 algorithm: TRPO without the search."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv

from sb3_trpo_ext.algorithms.natural_gradient import NaturalGradientExt
from sb3_trpo_ext.checks import require_real, with_keywords_of
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.steps import StepReport
from sb3_trpo_ext.trust_region import TrustRegionReport, natural_gradient_step


class NPGExt(NaturalGradientExt):
    """Natural Policy Gradient, https://papers.nips.cc/paper/2073-a-natural-policy-gradient.

    θ ← θ + α (F + λI)⁻¹g with α = sqrt(2δ / gᵀ(F + λI)⁻¹g), which maximises gᵀs subject to ½ sᵀ(F + λI)s ≤ δ (TRPO
    paper, section 7): the first step that TRPO would try, taken without trying. Texts that bound sᵀFs itself, as
    lectures often do, have α = sqrt(δ / gᵀF⁻¹g) without the 2: their δ is twice this one. With
    ``fisher="empirical"`` F is the average of ∇log π ∇log πᵀ over the samples, as in sample-based NPG; with
    ``fisher="identity"`` this is the plain policy gradient, α = sqrt(2 ``step_radius``) / ‖g‖.

    The KL of the step is logged, not tested, up to ten times δ: beyond that F says nothing of the KL. Such a step is
    tried with half the conjugate gradient steps, and so on, as with little ``cg_damping`` the last of them lead far; if
    the KL is still beyond ten times δ after the first, the outcome is ``beyond_radius`` and the policy stays as it was. The
    same happens where a step leads to NaN or infinity.
    All other keywords are those of :class:`~sb3_trpo_ext.TRPOExt`, with the same defaults.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, or a class)
    :param env: The environment to learn from (if registered in Gymnasium, can be str)
    :param step_size: a fixed α; None: α from ``target_kl`` (or ``step_radius``) as above
    :param _init_setup_model: whether to build the network on creation
    :raises ValueError: for a value that cannot work
    """

    @with_keywords_of(NaturalGradientExt)
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        step_size: float | None = None,
        _init_setup_model: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(policy, env, **arguments)
        self.step_size = step_size
        self._constructed(_init_setup_model)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.step_size is not None:
            require_real("step_size", self.step_size, 0.0, open_below=True)

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]:
        choices = super().keywords_without_effect()
        if self.step_size is not None:
            return {**choices, f"step_size={self.step_size!r}": ("target_kl", "step_radius", "adaptive_radius")}
        if self.fisher == "identity":
            choices["fisher='identity'"] += ("target_kl",)
        return choices

    @property
    def _is_bounded(self) -> bool:
        """Whether δ has a part in the step."""
        return self.step_size is None and self.fisher != "identity"

    def _update_policy(self, problem: PolicyProblem) -> TrustRegionReport:
        settings = self._step_settings(step_size=self.step_size)
        return natural_gradient_step(problem, settings if self._is_bounded else replace(settings, target_kl=math.inf))

    def _adapt(self, report: StepReport) -> None:
        if self.step_size is None:
            super()._adapt(report)

    def _describe_length(self) -> str:
        length = super()._describe_length()
        if self.step_size is None:
            return length
        return f"step size {self.step_size:g}" + (f", {length}" if self.fisher != "identity" else "")

    def _describe(self) -> str:
        size = f"{self.target_kl} nats of " if self._is_bounded else ""
        return f"{'Plain' if self.fisher == 'identity' else 'Natural'} gradient: {size}{super()._describe()}"
