"""What must not be learned from, and what is said of updates that change nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_trpo_ext.checks import warn_user
from sb3_trpo_ext.observations import leaves
from sb3_trpo_ext.sampling.actor import LARGEST_USABLE
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer
from sb3_trpo_ext.steps import StepOutcome

LARGEST_RETURN = 1e17
"""Beyond this, sums of squares over a batch overflow single precision."""

SPIKE = 1e10
"""A reward this many times as large as all others would leave nothing of them in single precision."""

_STANDSTILL = 10
"""So many updates without a step are no bad luck."""

_SCALE_REWARDS = (
    "look at the environment's rewards; if they are meant to be as large, scale them: VecNormalize(norm_reward=True)"
)
_REMEDIES = {
    "rewards": _SCALE_REWARDS,
    "branch returns": _SCALE_REWARDS,
    "advantages": _SCALE_REWARDS,
    "returns": _SCALE_REWARDS,
    "observations": "look at the environment's observations; if they are meant to be as large, scale them",
    "values": "the critic has diverged: go on from an earlier model, and scale rewards",
    "gradient": "look at the policy's distribution and at the scale of observations",
    "curvature": "look at the policy's distribution and at the scale of observations",
    "step": "lower target_kl, or raise cg_damping where there is one",
    "value loss": _SCALE_REWARDS,
}


@dataclass(frozen=True)
class Fault:
    """Why an update must not be made, or has been taken back.

    :param quantity: by name
    :param size: its largest magnitude, where it is the batch's
    :param limit: what that may be
    """

    quantity: str
    size: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        size = "" if self.size is None else f" (up to {self.size:.3g}, the limit is {self.limit:.3g})"
        return f"NaN, infinite or huge {self.quantity}{size}"


class Watch:
    """Judges rollouts by what they and the ones before are like, and warns of updates that change nothing.

    :ivar updates_before: how many updates there were before this ``learn()``
    """

    def __init__(self) -> None:
        self.updates_before = 0
        self._last_sizes: dict[str, float] = {}
        self._faults_in_a_row = 0
        self._without_step: Counter[str] = Counter()

    def get_state(self) -> dict[str, Any]:
        """Plain data: what later rollouts are judged by, and what has been warned of."""
        return {**vars(self), "_without_step": dict(self._without_step)}

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _without_step=Counter(state["_without_step"]))

    def fault_in(self, buffer: RolloutBuffer, samples: RolloutBufferSamples) -> Fault | None:
        """The first quantity of the rollout that holds NaN, infinite or huge entries, or a spike."""
        limits = {"observations": LARGEST_USABLE}
        for name, batch in _quantities(buffer, samples):
            size = _size(batch)
            limit = limits.get(name, LARGEST_RETURN)
            if name in ("rewards", "branch returns"):
                limit = min(limit, SPIKE * self._usual_size(name, batch, samples))
                self._last_sizes[name] = size if size <= LARGEST_RETURN else 0.0
            # not (… > …), so that NaN counts
            if not size <= limit:
                return Fault(name, size, limit)
        return None

    def _usual_size(self, name: str, batch: th.Tensor, samples: RolloutBufferSamples) -> float:
        """What a reward's size is measured by: the rewards of this rollout, the largest one of the rollout before, and
        V, which has learned from all before, and is part of the reward where an episode was cut off."""
        return max(1.0, float(batch.abs().median()), self._last_sizes.get(name, 0.0), _size(samples.old_values))

    def note(self, updates: int, outcome: StepOutcome | None, fault: Fault | None, progress_remaining: float) -> None:
        """Warn of an update that was skipped, and of a policy that stands still.

        Once, and again whenever their number has doubled, in another text, as Python shows the same one once.

        :param updates: how many there have been, this one included
        :param outcome: of the policy step, None if there was none
        :param progress_remaining: as schedules have it, 0 at the end of ``learn()``
        """
        self._faults_in_a_row = 0 if fault is None else self._faults_in_a_row + 1
        if outcome is StepOutcome.ACCEPTED:
            self._without_step.clear()
            return
        self._without_step["faults" if outcome is None else outcome.value] += 1
        standing = self._without_step.total()
        if fault is not None and _is_power_of_two(self._faults_in_a_row):
            warn_user(
                f"update skipped: {fault}; policy and critic keep their last good parameters: "
                f"{_REMEDIES[fault.quantity]} (update {updates}, {self._faults_in_a_row} in a row)"
            )
        elif outcome is StepOutcome.ZERO_RADIUS and updates == self.updates_before + 1 and progress_remaining <= 0.0:
            warn_user(
                "this learn() has made no step: it was one rollout long, and the schedule of target_kl goes by the progress "
                "that remains after a rollout, which is 0. Give target_kl a number, or learn() a larger total_timesteps"
            )
        elif standing % _STANDSTILL == 0 and _is_power_of_two(standing // _STANDSTILL):
            outcomes = ", ".join(f"{count} {name}" for name, count in self._without_step.most_common())
            warn_user(
                f"the policy has not moved for {standing} updates ({outcomes}), up to update {updates}: "
                "docs/diagnostics.md says what to do about each outcome"
            )


def require_trainable(policy: BasePolicy) -> None:
    """:raises ValueError: if training could change nothing, whatever it meets"""
    parameters = list(policy.parameters())
    if th.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            "a model cannot be trained under torch.inference_mode(), nor one that was made there: it has no gradients"
        )
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"nothing is trainable: all parameters of {type(policy).__name__} are frozen (requires_grad is False)"
        )


def _quantities(buffer: RolloutBuffer, samples: RolloutBufferSamples) -> Iterator[tuple[str, Any]]:
    """In an order in which the cause comes before what it spoils."""
    yield "observations", samples.observations
    yield "values", samples.old_values
    yield "rewards", th.as_tensor(buffer.rewards, device="cpu")
    yield "advantages", samples.advantages
    yield "returns", samples.returns
    branches = buffer.branches if isinstance(buffer, VineRolloutBuffer) else None
    if branches is not None:
        yield "branch returns", th.as_tensor(branches.q_values, device="cpu")


def _size(batch: Any) -> float:
    """The largest magnitude among the floating-point numbers of a batch, NaN if there is one."""
    # as Python's floats, because half precision would make limits infinite
    sizes = [leaf.abs().max().item() for leaf in leaves(batch) if leaf.is_floating_point()]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
