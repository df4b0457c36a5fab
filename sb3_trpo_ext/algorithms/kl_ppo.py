"""KL-penalised PPO (Schulman et al. 2017, section 4) as an SB3 algorithm: TRPO's Lagrangian."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_trpo_ext.algorithms.archives import FOREIGN
from sb3_trpo_ext.algorithms.arguments import CriticChoice
from sb3_trpo_ext.algorithms.base import OnPolicyExt
from sb3_trpo_ext.checks import require_choice, require_count, require_real, schedule_of, scheduled, with_keywords_of
from sb3_trpo_ext.kl_penalty import KLEstimator, KLPenaltyReport, KLPenaltySettings, adapted_beta, kl_penalty_step
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.steps import StepOutcome, StepReport
from sb3_trpo_ext.update import warn_of_unheld

_USED_BY_THE_POLICY = ("learning_rate", "batch_size", "max_grad_norm")


class KLPPOExt(OnPolicyExt):
    """Proximal Policy Optimization with a KL penalty, https://arxiv.org/abs/1707.06347, eq. 8.

    Maximise E[π_θ(a|s)/π_old(a|s) · A(s, a)] − β E[KL(π_old ‖ π_θ)] by minibatch Adam: the constraint of TRPO as a
    penalty, β being its multiplier.

    The keywords of SB3's ``PPO`` keep their names and defaults where they mean the same. There is nothing to clip,
    and no ``vf_coef``: the critic is fitted on its own after the policy, by ``critic`` as in
    :class:`~sb3_trpo_ext.TRPOExt`, and never moves it. Advantages are normalised over the rollout, not over the
    minibatch. ``target_kl`` is what β is adapted towards; SB3's early stop of that name is ``max_kl``.
    All other keywords are those of :class:`~sb3_trpo_ext.TRPOExt`.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, or a class)
    :param env: The environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: of Adam, policy and critic; can be a function of the remaining progress (from 1 to 0)
    :param n_steps: steps to run for each environment per update
    :param batch_size: minibatch size, policy and critic
    :param n_epochs: the policy's passes over a rollout
    :param beta: β, or where it starts
    :param target_kl: δ: β is doubled after an update with a mean KL above 1.5 δ, halved below δ / 1.5; can be a
        function of the remaining progress, or ``"lin_x"``; None: β stays as it is
    :param kl_estimator: of the penalty: ``"analytic"``, or ``"sample"``, E[−ln π_θ(a|s)] over the actions that were
        taken, which is the KL up to a constant. What is logged, tested and steers β is always the analytic one
    :param max_kl: end an update before the first minibatch whose mean KL is above this; None: never
    :param max_grad_norm: clip gradients, the policy's and the critic's, at this norm; 0: no clipping
    :param n_critic_updates: the critic's passes over a rollout: at PPO's learning rate ``n_epochs`` of them leave it so
        far behind the returns that a policy which has learned its task may lose it again
    :param _init_setup_model: whether to build the network on creation
    :raises ValueError: for a value that cannot work
    """

    foreign_settings: ClassVar[dict[str | None, dict[str, Any]]] = {by: {"target_kl": 0.01} for by in FOREIGN}

    no_keywords: ClassVar[dict[str, str]] = {
        "clip_range": "the KL penalty holds the policy back, nothing is clipped",
        "clip_range_vf": "the critic is fitted on its own, nothing is clipped",
        "vf_coef": "the critic is fitted on its own, after the policy",
    }
    """Of SB3's PPO, and why not here."""

    target_kl: float | Schedule | None

    @with_keywords_of(OnPolicyExt)
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        *,
        beta: float = 1.0,
        target_kl: float | str | Schedule | None = 0.01,
        kl_estimator: KLEstimator = "analytic",
        max_kl: float | None = None,
        max_grad_norm: float = 0.5,
        critic: CriticChoice = "adam",
        n_critic_updates: int = 30,
        _init_setup_model: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            max_grad_norm=max_grad_norm,
            critic=critic,
            n_critic_updates=n_critic_updates,
            **arguments,
        )
        self.n_epochs = n_epochs
        self.beta = beta
        self.target_kl = target_kl  # type: ignore[assignment]  # no string once the model is set up
        self.kl_estimator = kl_estimator
        self.max_kl = max_kl
        self._constructed(_init_setup_model)

    def _setup_model(self) -> None:
        if self.target_kl is not None:
            self.target_kl = schedule_of("target_kl", self.target_kl)
        super()._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_count("n_epochs", self.n_epochs)
        require_real("beta", self.beta, 0.0, open_below=self.target_kl is not None)
        require_choice("kl_estimator", self.kl_estimator, ("analytic", "sample"))
        if self.max_kl is not None:
            require_real("max_kl", self.max_kl, 0.0, open_below=True)
        if self.target_kl is not None:
            require_real("target_kl", self._target_kl(1.0), 0.0, open_below=True)

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]:
        choices = super().keywords_without_effect()
        return {choice: tuple(name for name in names if name not in _USED_BY_THE_POLICY) for choice, names in choices.items()}

    def _target_kl(self, progress_remaining: float) -> float | None:
        return None if self.target_kl is None else scheduled("target_kl", self.target_kl, progress_remaining)

    def _update_policy(self, problem: PolicyProblem) -> KLPenaltyReport:
        warn_of_unheld(problem.parameters, self.policy.optimizer, "the policy")
        settings = KLPenaltySettings(
            beta=self.beta,
            target_kl=self._target_kl(self._current_progress_remaining),
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            max_grad_norm=self.max_grad_norm,
            max_kl=self.max_kl,
            kl_estimator=self.kl_estimator,
        )
        return kl_penalty_step(problem, self.policy.optimizer, settings)

    def _largest_kl(self) -> float:
        target_kl = self._target_kl(self._current_progress_remaining)
        return math.inf if target_kl is None else target_kl

    def _adapt(self, report: StepReport) -> None:
        assert isinstance(report, KLPenaltyReport)
        # a schedule that has come to 0 is no target any more
        if report.target_kl is not None and report.target_kl > 0.0 and report.outcome is StepOutcome.ACCEPTED:
            self.beta = adapted_beta(self.beta, report.kl, report.target_kl)

    def _describe(self) -> str:
        towards = "fixed" if self.target_kl is None else f"adapted towards a KL(old || new) of {self.target_kl} nats"
        return f"KL penalty: beta {self.beta:g}, {towards}; penalty: {self.kl_estimator}. {super()._describe()}"
