"""What is logged of an update, and counted and watched over many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import explained_variance

from sb3_trpo_ext.algorithms.faults import Watch, require_trainable
from sb3_trpo_ext.steps import StepOutcome, StepReport
from sb3_trpo_ext.trust_region import TrustRegionReport
from sb3_trpo_ext.update import UpdateReport

_LOGGED_ELSEWHERE = frozenset(("outcome", "objective", "kl", "cg_status"))


def record_policy_step(logger: Logger, report: StepReport) -> None:
    """The keys of sb3_contrib.TRPO, with their meaning, and what lets a person judge this kind of step.

    What a step does not have is not logged: None, and the success of a search where nothing is searched for.
    """
    logger.record("train/policy_objective", report.objective)
    logger.record("train/kl_divergence_loss", report.kl)
    if isinstance(report, TrustRegionReport) and report.backtracks is not None:
        logger.record("train/is_line_search_success", float(report.outcome is StepOutcome.ACCEPTED))
    for field in fields(report):
        value = getattr(report, field.name)
        if value is not None and field.name not in _LOGGED_ELSEWHERE:
            logger.record(f"trust_region/{field.name}", value)


def record_update(logger: Logger, report: UpdateReport) -> None:
    """The policy step, the critic fit and the entropy before both."""
    if report.fit is not None:
        logger.record("train/value_loss", report.fit.loss)
    record_policy_step(logger, report.step)
    logger.record("train/entropy", report.entropy)


def record_run(
    logger: Logger, policy: ActorCriticPolicy, outcome_counts: dict[str, int], seconds: dict[str, float], n_updates: int
) -> None:
    """What has come up so far, and where the last iteration's time went."""
    if hasattr(policy, "log_std"):
        logger.record("train/std", th.exp(policy.log_std).mean().item())
    for outcome, count in outcome_counts.items():
        logger.record(f"outcome/{outcome}", count)
    for part, elapsed in seconds.items():
        logger.record(f"time/{part}_seconds", elapsed)
    logger.record("train/n_updates", n_updates, exclude="tensorboard")


def record_explained_variance(logger: Logger, buffer: RolloutBuffer) -> None:
    # in double precision, as the squares of usable returns may overflow
    values, returns = (array.flatten().astype(np.float64) for array in (buffer.values, buffer.returns))
    logger.record("train/explained_variance", explained_variance(values, returns))


class WithRecords(OnPolicyAlgorithm):
    """An SB3 algorithm that counts and watches what comes of its updates, and times the parts of an iteration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outcome_counts: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def _setup_model(self) -> None:
        super()._setup_model()
        self._watch = Watch()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        require_trainable(self.policy)
        self._watch.updates_before = self._n_updates
        return super()._setup_learn(*args, **kwargs)

    def _count(self, outcome: str) -> None:
        self.outcome_counts[outcome] = self.outcome_counts.get(outcome, 0) + 1

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - started

    def _log_update(self) -> None:
        record_run(self.logger, self.policy, self.outcome_counts, self._seconds, self._n_updates)
        self._seconds.clear()
