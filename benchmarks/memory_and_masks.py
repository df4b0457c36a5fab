"""Masked and recurrent policies beside sb3_contrib's: environment steps per second, and what is learned.

    python benchmarks/memory_and_masks.py [--quick] [--out DIR] [--part PART ...]

- ``speed``, ``learning``: TRPOExt and MaskablePPO take turns in one process, each with its own default arguments and
  MlpPolicy, in the same environments from the same seeds.
- ``memory_speed``: the same with MlpLstmPolicy as it comes and RecurrentPPO, both with ``n_steps=512``.
- ``memory_update``: seconds of one update of a recurrent policy, by the steps in its rollout.
- ``cartpole``: CartPole-v1 without velocities; the return of deterministic episodes, with memory and without.
- ``pendulum``: Pendulum-v1 without the velocity, beside RecurrentPPO.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from _measure import (
    OURS,
    Comparison,
    Spread,
    argument_parser,
    interleave,
    print_comparisons,
    print_table,
    seconds,
    set_up,
    write_json,
)
from gymnasium.wrappers import TransformObservation
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy as evaluate_recurrent_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPOExt

MASKABLE_PPO = "MaskablePPO"


@dataclass(frozen=True)
class Case:
    """A masked environment, for so many steps."""

    name: str
    make: Callable[[], gym.Env]
    n_steps: int
    n_envs: int = 1
    bar: float | None = None

    def __str__(self) -> str:
        return f"{self.name}, n_envs={self.n_envs}"


def cart_pole() -> gym.Env:
    """Of which each state near an edge allows only the way back."""

    def masks(env: gym.Env) -> np.ndarray:
        position = env.get_wrapper_attr("state")[0]
        return np.array([position > -1.0, position < 1.0])

    return ActionMasker(gym.make("CartPole-v1"), masks)


SPEED = (
    Case("CartPole-v1", cart_pole, 6144, 1, 4.0),
    Case("CartPole-v1", cart_pole, 16384, 8, 4.0),
    Case("InvalidActionEnvDiscrete(80, 60)", lambda: InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60), 6144, 1),
)
STEPS = 8192
GAMMA = 0.4
"""As in sb3_contrib's own tests: what is done does not matter to what follows."""

LEARNING = (
    Case("Discrete(80), 60 invalid", SPEED[-1].make, STEPS),
    Case(
        "MultiDiscrete([10, 10, 10]), 20 invalid", lambda: InvalidActionEnvMultiDiscrete([10] * 3, n_invalid_actions=20), STEPS
    ),
    Case("MultiBinary(10), 5 invalid", lambda: InvalidActionEnvMultiBinary(10, n_invalid_actions=5), STEPS),
)


def trained(algorithm: type[Any], case: Case, seed: int, quick: bool, **arguments: Any) -> tuple[Any, float]:
    """A model, and the seconds that ``learn()`` took."""
    np.random.seed(seed)  # from which these environments draw
    env = make_vec_env(case.make, case.n_envs, seed=seed)
    if quick:
        arguments |= dict(n_steps=256)
    model = algorithm("MlpPolicy", env, seed=seed, device="cpu", **arguments)
    steps = 512 * case.n_envs if quick else case.n_steps
    return model, seconds(lambda: model.learn(steps))


def speed(algorithm: type[Any], case: Case, seed: int, quick: bool) -> float:
    """Steps per second of ``learn()``, from a new model."""
    model, duration = trained(algorithm, case, seed, quick)
    model.env.close()
    return model.num_timesteps / duration


def compare_speed(case: Case, repeats: int, quick: bool) -> Comparison:
    speeds = interleave(
        {
            MASKABLE_PPO: lambda repeat: speed(MaskablePPO, case, repeat, quick),
            OURS: lambda repeat: speed(TRPOExt, case, repeat, quick),
        },
        repeats,
    )
    return Comparison(
        f"learn(), {case}", "steps/s", speeds[OURS], speeds[MASKABLE_PPO], case.bar, more_is_better=True, against=MASKABLE_PPO
    )


def mean_return(algorithm: type[Any], case: Case, seed: int, quick: bool, **arguments: Any) -> float:
    """Of 20 deterministic episodes after learning."""
    model, _ = trained(algorithm, case, seed, quick, **arguments)
    return float(evaluate_policy(model, model.env, n_eval_episodes=2 if quick else 20, warn=False)[0])


def returns(case: Case, seeds: int, quick: bool) -> dict[str, list[float]]:
    turns = {
        MASKABLE_PPO: lambda seed: mean_return(MaskablePPO, case, seed, quick, gamma=GAMMA),
        OURS: lambda seed: mean_return(TRPOExt, case, seed, quick, gamma=GAMMA),
    }
    return interleave(turns, seeds, warm_up=False)


# -- memory ----------------------------------------------------------------------------------------------

HIDDEN = {"CartPole-v1": [0, 2], "Pendulum-v1": [0, 1]}
"""What is left to see: positions and angles."""

SPEED_BAR, RETURN_BAR, RETURN_WITHOUT_MEMORY = 5.0, 475.0, 200.0
SMALL = {"lstm_hidden_size": 64}
EPISODES = 20
CARTPOLE_TITLE = f"CartPole-v1 without velocities: at least {RETURN_BAR:g}, without memory below {RETURN_WITHOUT_MEMORY:g}"
PENDULUM_TITLE = "Pendulum-v1 without the velocity"


def without_velocities(env: gym.Env) -> gym.Env:
    seen = HIDDEN[env.spec.id]
    whole = env.observation_space
    part = gym.spaces.Box(whole.low[seen], whole.high[seen], dtype=np.float32)
    return TransformObservation(env, lambda observation: observation[seen], part)


def environments(env_id: str, n_envs: int, seed: int) -> Any:
    return make_vec_env(env_id, n_envs, seed=seed, wrapper_class=without_velocities)


# -- memory: speed --------------------------------------------------------------------------------------------


def compare_memory_speed(quick: bool) -> list[Comparison]:
    n_steps, repeats = (64, 1) if quick else (512, 3)
    comparisons = []
    for n_envs in (1, 8):
        n_timesteps = n_steps * n_envs * (2 if quick or n_envs > 1 else 4)

        def turn(algorithm: type[Any], n_envs: int = n_envs, n_timesteps: int = n_timesteps) -> Callable[[int], float]:
            def steps_per_second(repeat: int) -> float:
                env = environments("CartPole-v1", n_envs, repeat)
                model = algorithm("MlpLstmPolicy", env, n_steps=n_steps, seed=repeat, device="cpu")
                return n_timesteps / seconds(lambda: model.learn(n_timesteps))

            return steps_per_second

        found = interleave({"ours": turn(TRPOExt), "theirs": turn(RecurrentPPO)}, repeats, warm_up=not quick)
        name = f"CartPole-v1 without velocities, n_envs={n_envs}, n_steps={n_steps}"
        comparisons.append(
            Comparison(name, "steps/s", found["ours"], found["theirs"], SPEED_BAR, more_is_better=True, against="RecurrentPPO")
        )
    return comparisons


def update_seconds(quick: bool) -> dict[int, list[float]]:
    """Seconds of one update by ``n_steps``, on rollouts of one policy in one environment."""
    lengths = (64, 128) if quick else (256, 512, 1024, 2048)
    found = {}
    for n_steps in lengths:
        model = TRPOExt("MlpLstmPolicy", environments("Pendulum-v1", 4, 0), n_steps=n_steps, seed=0, device="cpu")
        model.learn(4 * n_steps)
        found[n_steps] = [seconds(model.train) for _ in range(1 if quick else 3)]
    return found


# -- memory: learning -------------------------------------------------------------------------------------------


def learned(make: Callable[[Any], Any], env_id: str, seed: int, n_timesteps: int) -> float:
    """The return of deterministic episodes after learning, observations normalised."""
    env = VecNormalize(environments(env_id, 8, seed))
    model = make(env).learn(n_timesteps)
    unseen = VecNormalize(environments(env_id, 4, 1000 + seed), training=False, norm_reward=False)
    unseen.obs_rms = env.obs_rms
    return float(evaluate_recurrent_policy(model, unseen, n_eval_episodes=EPISODES, deterministic=True)[0])


def cartpole(quick: bool) -> dict[str, list[float]]:
    n_timesteps, seeds = (1024, 1) if quick else (100_000, 5)
    memory, none = {"policy_kwargs": SMALL}, {}
    return {
        policy: [
            learned(
                lambda env, seed=seed, policy=policy, arguments=arguments: TRPOExt(
                    policy, env, n_steps=64 if quick else 256, seed=seed, device="cpu", **arguments
                ),
                "CartPole-v1",
                seed,
                n_timesteps,
            )
            for seed in range(seeds)
        ]
        for policy, arguments in (("MlpLstmPolicy", memory), ("MlpPolicy", none))
    }


def pendulum(quick: bool) -> dict[str, list[float]]:
    n_timesteps, seeds = (1024, 1) if quick else (100_000, 3)
    makers: dict[str, Callable[..., Any]] = {
        "TRPOExt": lambda env, seed: TRPOExt(
            "MlpLstmPolicy",
            env,
            n_steps=64 if quick else 512,
            gamma=0.9,
            target_kl=0.02,
            seed=seed,
            device="cpu",
            policy_kwargs=SMALL,
        ),
        "RecurrentPPO": lambda env, seed: RecurrentPPO(
            "MlpLstmPolicy", env, n_steps=64 if quick else 512, gamma=0.9, seed=seed, device="cpu", policy_kwargs=SMALL
        ),
    }
    return {
        name: [
            learned(lambda env, make=make, seed=seed: make(env, seed), "Pendulum-v1", seed, n_timesteps)
            for seed in range(seeds)
        ]
        for name, make in makers.items()
    }


def print_returns(title: str, returns: dict[str, list[float]]) -> None:
    rows = [(name, ", ".join(f"{value:.0f}" for value in found), Spread.of(found)) for name, found in returns.items()]
    print_table(title, ("", "returns by seed", "median (min-max)"), rows)


PARTS = ("speed", "learning", "memory_speed", "memory_update", "cartpole", "pendulum")


def of_masks(arguments: argparse.Namespace) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if "speed" in arguments.part:
        speeds = [compare_speed(case, arguments.repeats, arguments.quick) for case in SPEED]
        print_comparisons("Learning with masks, end to end", speeds)
        content["speed"] = [comparison.as_json() for comparison in speeds]
    if "learning" in arguments.part:
        found = {case.name: returns(case, arguments.repeats, arguments.quick) for case in LEARNING}
        rows = [(name, Spread.of(by[MASKABLE_PPO]), Spread.of(by[OURS])) for name, by in found.items()]
        print_table(f"Return of {STEPS} steps: median (min-max) of seeds", ("", MASKABLE_PPO, OURS), rows)
        content["learning"] = found
    return content


def of_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if "memory_speed" in arguments.part:
        speeds = compare_memory_speed(arguments.quick)
        print_comparisons("Learning with memory, end to end", speeds)
        content["memory_speed"] = [comparison.as_json() for comparison in speeds]
    if "memory_update" in arguments.part:
        found = update_seconds(arguments.quick)
        rows = [(n, Spread.of(times), f"{1e6 * min(times) / (4 * n):.0f}") for n, times in found.items()]
        print_table("Seconds of one update, 4 environments", ("n_steps", "seconds", "least us/step"), rows)
        content["memory_update"] = found
    for name, learn, title in (("cartpole", cartpole, CARTPOLE_TITLE), ("pendulum", pendulum, PENDULUM_TITLE)):
        if name in arguments.part:
            content[name] = learn(arguments.quick)
            print_returns(title, content[name])
    return content


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="turns of masked policies (5; 1 with --quick), seeds of learning")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 5)
    set_up()
    write_json(arguments.out, "memory_and_masks", arguments, of_masks(arguments) | of_memory(arguments))


if __name__ == "__main__":
    main()
