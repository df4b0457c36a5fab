"""How well each way of fitting V predicts returns, all of them on the same rollouts.

    python benchmarks/critic.py [--quick] [--envs HalfCheetah-v5 ...] [--out DIR]

One run of default arguments but SB3's initial spread, with normalised observations, makes the rollouts. Beside it every
way has a V of its own, fits it to each rollout with advantages of its own, as in training, and is asked about the next
rollout before it sees it: how much of the variance of the discounted returns it explains, at states after which the
episode goes on for more than ``LEAST_STEPS`` in the rollout. Rollouts with fewer than ``LEAST_STATES`` of them are passed
over. Medians over fifths of the others.

A constant error of V is not seen (normalised advantages hardly see it either), and nothing is said of what a policy would
have learned with it. Where a time limit cuts an episode, all take the running critic's V for what would have followed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import numpy as np
import torch as th
from _measure import argument_parser, print_table, set_up, write_json
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPOExt

LEAST_STEPS = 300
"""At γ = 0.99 what lies beyond weighs 0.05."""
LEAST_STATES = 50
PARTS = 5
WAYS: dict[str, dict[str, Any]] = {
    "adam": {"critic": "adam"},
    "gauss_newton": {"critic": "gauss_newton"},
    "gauss_newton, 1 step": {"critic": "gauss_newton", "critic_steps": 1},
    "gauss_newton, 6 steps": {"critic": "gauss_newton", "critic_steps": 6},
    "gauss_newton, 30 CG steps": {"critic": "gauss_newton", "critic_cg_steps": 30},
}


def model_of(env_id: str, seed: int, **arguments: Any) -> TRPOExt:
    env = VecNormalize(make_vec_env(env_id, seed=seed), norm_reward=False)
    return TRPOExt("MlpPolicy", env, initial_std=None, seed=seed, device="cpu", **arguments)


def returns_to_the_end(rewards: np.ndarray, starts: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Of one environment's rollout: discounted returns up to the episode's or the rollout's end, and steps to there.

    :param rewards: (steps,)
    :param starts: (steps,), whether an episode begins there
    """
    returns, steps = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        goes_on = t + 1 < len(rewards) and not starts[t + 1]
        returns[t] = rewards[t] + (gamma * returns[t + 1] if goes_on else 0.0)
        steps[t] = 1.0 + (steps[t + 1] if goes_on else 0.0)
    return returns, steps


class Beside(BaseCallback):
    """At the end of each of a model's rollouts, asks every way about it and lets it learn from it."""

    def __init__(self, ways: dict[str, TRPOExt]) -> None:
        super().__init__()
        self._ways = ways
        self.explained: defaultdict[str, list[float]] = defaultdict(list)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, TRPOExt)
        buffer = self.model.rollout_buffer
        returns, steps = returns_to_the_end(buffer.rewards[:, 0], buffer.episode_starts[:, 0], self.model.gamma)
        asked = steps > LEAST_STEPS
        for name, way in self._ways.items():
            values = self._learn(way)
            if asked.sum() >= LEAST_STATES:
                error = np.var(returns[asked] - values[asked]) / np.var(returns[asked])
                self.explained[name].append(float(1.0 - error))

    def _learn(self, way: TRPOExt) -> np.ndarray:
        """Fit a way's V to the model's rollout; V as it was before, (steps,)."""
        assert isinstance(self.model, TRPOExt)
        theirs, own = self.model.rollout_buffer, way.rollout_buffer
        with th.no_grad():
            values = way.predict_values(th.as_tensor(theirs.observations[:, 0]))
            last_value = way.predict_values(th.as_tensor(self.model._last_obs))
        own.reset()
        for array in ("observations", "actions", "rewards", "episode_starts", "log_probs"):
            getattr(own, array)[...] = getattr(theirs, array)
        own.values[...] = values.reshape(own.values.shape)
        own.pos, own.full = own.buffer_size, True
        own.compute_returns_and_advantage(last_value, np.asarray(self.model._last_episode_starts))
        samples = next(iter(own.get()))
        way._fit_critic(samples, way._policy_problem(samples).parameters)
        return values.numpy().ravel()


def explained_variance(env_id: str, seed: int, n_timesteps: int) -> dict[str, list[float]]:
    """By way: medians over each part of the run.

    :raises ValueError: where too few rollouts have states to ask about
    """
    beside = Beside({name: model_of(env_id, seed, **arguments) for name, arguments in WAYS.items()})
    model_of(env_id, seed).learn(n_timesteps, callback=beside)
    n_asked = min((len(figures) for figures in beside.explained.values()), default=0)
    if n_asked < PARTS:
        raise ValueError(
            f"{env_id}: expected {PARTS} rollouts or more with {LEAST_STATES} states whose episode goes on for "
            f"{LEAST_STEPS} steps, got {n_asked}"
        )
    return {
        name: [float(np.median(part)) for part in np.array_split(figures, PARTS)] for name, figures in beside.explained.items()
    }


def print_means(results: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Of seeds and parts.

    :param results: by environment, seed and way
    """
    rows = [
        (name, *(f"{np.mean([found[name] for found in by_seed.values()]):.3f}" for by_seed in results.values()))
        for name in WAYS
    ]
    print_table("Mean of all of these", ("critic", *results), rows)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "Hopper-v5", "Swimmer-v5"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[140, 141])
    parser.add_argument("--steps", type=int, default=100_000)
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.quick:
        arguments.envs, arguments.seeds, arguments.steps = ["Swimmer-v5"], [140], 5 * 2048
    set_up()
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for env_id in arguments.envs:
        for seed in arguments.seeds:
            try:
                found = explained_variance(env_id, seed, arguments.steps)
            except ValueError as error:
                print(error, flush=True)
                continue
            results.setdefault(env_id, {})[str(seed)] = found
            rows = [(name, *(f"{figure:.3f}" for figure in figures)) for name, figures in found.items()]
            header = ("critic", *(f"fifth {part + 1}" for part in range(PARTS)))
            print_table(f"{env_id}, seed {seed}: share of the variance of returns that V explains", header, rows)
    write_json(arguments.out, "critic", arguments, {"explained_variance": results})
    if results:
        print_means(results)


if __name__ == "__main__":
    main()
