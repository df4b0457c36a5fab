"""What an update asks of a policy with memory: Jacobians through its LSTMs, and the error of its V."""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_trpo_ext.critic import CriticProblem
from sb3_trpo_ext.numerics.averages import Rows, Units
from sb3_trpo_ext.numerics.curvature import Linearization
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.observations import take_samples
from sb3_trpo_ext.policy_problem import Linearize
from sb3_trpo_ext.recurrence import Recurrence
from sb3_trpo_ext.sampling.agent import Agent


def actor_linearization(agent: Agent, samples: Any, units: Units) -> Linearize | None:
    """By hand where the actor is dense layers on an LSTM; None for the other ways."""
    recurrence = None if agent.own_distribution else agent.recurrence
    actor = None if recurrence is None else recurrence.actor
    if recurrence is None or actor is None:
        return None

    def linearize(rows: Rows, parameters: FlatParameters) -> Linearization:
        part = take_samples(samples, rows, units)
        return recurrence.linearize_actor(actor, part.observations, part, parameters)

    return linearize


def recurrent_critic_problem(
    agent: Agent, recurrence: Recurrence, samples: Any, units: Units, policy_parameters: FlatParameters, chunk_size: int
) -> CriticProblem:
    """The error of V of a policy with memory, whose critic may have an LSTM of its own, none, or the actor's."""
    policy, chunks = agent.policy, units.chunks(chunk_size)

    def values_of(rows: Any) -> th.Tensor:
        part = take_samples(samples, rows, units)
        return agent.values(part.observations, part)

    mlp, linearize = None, None
    if not agent.own_values:
        parts = (take_samples(samples, rows, units) for rows in chunks)
        found = [recurrence.dense_critic(part.observations, part, policy_parameters) for part in parts]
        if found[0] is not None:
            mlp = found[0][0], th.cat([part[1] for part in found if part is not None])
        elif recurrence.lstm_critic is not None:
            network = recurrence.lstm_critic

            def linearize(rows: Rows, parameters: FlatParameters) -> Linearization:
                part = take_samples(samples, rows, units)
                return recurrence.linearize_critic(network, part.observations, part, parameters)

    if mlp is not None:
        parameters = mlp[0].parameters_in(policy)
    else:
        parameters = FlatParameters.reached_by_any(((values_of(rows),) for rows in chunks), policy)
    return CriticProblem(
        values_of,
        samples.returns,
        parameters,
        chunk_size=chunk_size,
        mlp=mlp,
        head=policy.value_net,
        units=units,
        linearize=linearize,
    )
