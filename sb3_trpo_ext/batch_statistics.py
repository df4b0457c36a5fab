"""Running statistics of a policy's layers, such as BatchNorm's, taken from the batch before a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import nn

from sb3_trpo_ext.numerics.averages import Units
from sb3_trpo_ext.numerics.checkpoint import Copies
from sb3_trpo_ext.numerics.running_statistics import has_others_with_buffers, layers_with_statistics, take_batch_statistics
from sb3_trpo_ext.observations import take, take_samples
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.agent import Agent

_SHARE_OF_STATISTICS = 0.25
"""Of the bound on the KL: what running statistics may move the policy by."""

_HALVINGS_OF_STATISTICS = 10

Pass = Callable[[slice], Any]


def refresh_running_statistics(
    agent: Agent, samples: RolloutBufferSamples, units: Units, problem: PolicyProblem, largest_kl: float
) -> None:
    """Set running statistics, as of BatchNorm, to those of the batch, as far as the bound on the KL allows.

    That is where KL(π_old ‖ π_θ) comes to a quarter of its bound, and the step to half of its length. Both are
    measured from the policy that acted, and the step is made in evaluation mode.

    :param largest_kl: the bound
    """
    policy = agent.policy
    if next(policy.buffers(), None) is None:
        return
    run, chunks = _pass_through(agent, samples, units)
    acted = Copies(policy.buffers)
    policy.set_training_mode(True)
    layers = layers_with_statistics(policy)
    _refresh_other_buffers(policy, layers, run, chunks)
    policy.set_training_mode(False)
    before = Copies(lambda: [buffer for layer in layers for buffer in layer.buffers(recurse=False)])
    take_batch_statistics(layers, run, chunks, units)
    if not acted.differ():
        return
    for _ in range(_HALVINGS_OF_STATISTICS):
        if problem.start_again() <= _SHARE_OF_STATISTICS * largest_kl:
            return
        before.go_back(0.5)
    before.restore()
    problem.start_again()


def _refresh_other_buffers(policy: nn.Module, layers: Sequence[nn.Module], run: Pass, chunks: Sequence[slice]) -> None:
    """One pass in training mode, chunk by chunk: what it does is known to the policy alone."""
    if not has_others_with_buffers(policy):
        return
    for layer in layers:
        layer.eval()
    for rows in chunks:
        if rows.stop - rows.start > 1:  # one state has no batch statistics
            run(rows)


def _pass_through(agent: Agent, samples: RolloutBufferSamples, units: Units) -> tuple[Pass, list[slice]]:
    """Rows ↦ a pass of these states through actor and critic without a graph, and the chunks to take them in."""
    observations, actions = samples.observations, agent.as_taken(samples.actions)

    @th.no_grad()
    def run(rows: slice) -> None:
        if agent.recurrence is not None:
            part = take_samples(samples, rows, units)
            agent.distribution(part.observations, part)
            agent.values(part.observations, part)
            return
        agent.policy.evaluate_actions(take(observations, rows), actions[rows])

    return run, units.chunks(agent.states_per_pass(observations))
