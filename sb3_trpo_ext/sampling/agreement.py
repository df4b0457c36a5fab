"""Whether the policy that acts is the one that the step improves."""

from __future__ import annotations

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.masks import call_masked, takes_masks
from sb3_trpo_ext.originals import differs_from_sb3
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.buffers import adds_like_sb3
from sb3_trpo_ext.sampling.single_path import transitions_of
from sb3_trpo_ext.standard_policies import evaluates_by_itself

_TOLERANCE = 0.01
"""In nats; rounding is far below it."""


@th.no_grad()
def disagreement(agent: Agent, buffer: RolloutBuffer, algorithm: str) -> str | None:
    """What to tell a user whose policy takes its actions, or evaluates them, with another distribution than it learns.

    Written for PPO, a policy may make its distribution in ``forward`` and ``evaluate_actions`` alone, where PPO looks.

    :param buffer: full, with the log-probabilities that came with the actions
    :param algorithm: its name, for the message
    :return: None where the two are one
    """
    if (
        agent.own_distribution
        or agent.recurrence is not None
        or not evaluates_by_itself(agent.policy)
        or not adds_like_sb3(buffer)
    ):
        return None
    policy, gaps = agent.policy, {"forward": 0.0}
    for rows, states, actions, context in transitions_of(agent, buffer):
        learned = agent.distribution(states, context).log_prob(actions)
        others = {"forward": buffer.to_torch(buffer.log_probs.reshape(-1)[rows])}
        if differs_from_sb3(policy, ("evaluate_actions",)) and (context is None or takes_masks(policy.evaluate_actions)):
            masks = None if context is None else context.action_masks
            others["evaluate_actions"] = call_masked(policy, "evaluate_actions", masks, states, actions)[1]
        for name, log_probs in others.items():
            gaps[name] = max(gaps.get(name, 0.0), float((log_probs - learned).abs().max()))
    names = [f"{name}()" for name, gap in gaps.items() if gap > _TOLERANCE]
    if not names:
        return None
    return (
        f"{type(policy).__name__} has two distributions: {' and '.join(names)} gave the actions that were taken other "
        f"log-probabilities than get_distribution() did, by up to {max(gaps.values()):.3g} nats. The policy step improves "
        f"the one of get_distribution(): let it make the distribution as they do, or override "
        f"{algorithm}.action_distribution()"
    )
