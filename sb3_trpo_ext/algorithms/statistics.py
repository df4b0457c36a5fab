"""Running statistics of a policy's layers, as of BatchNorm: those of the rollout, as far as the KL permits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import nn

from sb3_trpo_ext.algorithms.collecting import Collecting
from sb3_trpo_ext.numerics.averages import chunks_of
from sb3_trpo_ext.numerics.checkpoint import Copies
from sb3_trpo_ext.numerics.running_statistics import (
    has_others_with_buffers,
    layers_with_statistics,
    take_batch_statistics,
)
from sb3_trpo_ext.observations import length, take
from sb3_trpo_ext.policy_problem import PolicyProblem

_SHARE_OF_KL = 0.25
_HALVINGS = 10


def refresh_running_statistics(
    algorithm: Collecting, samples: RolloutBufferSamples, problem: PolicyProblem, largest_kl: float
) -> None:
    """Running statistics become those of the batch, as far as this leaves room for a step.

    That is where KL(π_old ‖ π_θ) comes to a quarter of its bound, and the step to half of its length. Both are
    measured from the policy that acted, and the step is made in evaluation mode, in which the policy is left.

    :param problem: made before
    :param largest_kl: the bound
    """
    policy = algorithm.policy
    if next(policy.buffers(), None) is None:
        return
    acted = Copies(policy.buffers)
    run, chunks = _pass_through_policy(algorithm, samples)
    policy.set_training_mode(True)
    layers = layers_with_statistics(policy)
    if has_others_with_buffers(policy):
        _refresh_others(layers, run, chunks)
    policy.set_training_mode(False)
    before = Copies(lambda: [buffer for layer in layers for buffer in layer.buffers(recurse=False)])
    take_batch_statistics(layers, run, chunks)
    if not acted.differ():
        return
    for _ in range(_HALVINGS):
        if problem.start_again() <= _SHARE_OF_KL * largest_kl:
            return
        before.go_back(0.5)
    before.restore()
    problem.start_again()


def _refresh_others(layers: Sequence[nn.Module], run: Callable[[slice], Any], chunks: Sequence[slice]) -> None:
    """One pass in training mode, chunk by chunk, for what is not among these layers: what it does is known to it alone."""
    for layer in layers:
        layer.eval()
    for rows in chunks:
        if rows.stop - rows.start > 1:  # one state has no batch statistics
            run(rows)


def _pass_through_policy(
    algorithm: Collecting, samples: RolloutBufferSamples
) -> tuple[Callable[[slice], Any], Sequence[slice]]:
    """Rows ↦ a pass of these states through actor and critic without a graph, and the chunks to take them in."""
    observations, actions = samples.observations, algorithm.as_taken(samples.actions)

    @th.no_grad()
    def run(rows: slice) -> None:
        algorithm.policy.evaluate_actions(take(observations, rows), actions[rows])

    return run, chunks_of(length(observations), algorithm.states_per_pass(observations))
