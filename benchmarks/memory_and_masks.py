"""Masked policies beside sb3_contrib's: environment steps per second, and what is learned from as many steps.

    python benchmarks/memory_and_masks.py [--quick] [--out DIR] [--part speed|learning]

TRPOExt and MaskablePPO take turns in one process, each with its own default arguments and MlpPolicy, in the same
environments from the same seeds.
"""

from __future__ import annotations

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
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env

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


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="turns of each (5; 1 with --quick), which are seeds of learning")
    parser.add_argument("--part", choices=("speed", "learning"), help="one of the two only")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 5)
    set_up()
    content: dict[str, Any] = {}
    if arguments.part != "learning":
        speeds = [compare_speed(case, arguments.repeats, arguments.quick) for case in SPEED]
        print_comparisons("Learning with masks, end to end", speeds)
        content["speed"] = [comparison.as_json() for comparison in speeds]
    if arguments.part != "speed":
        found = {case.name: returns(case, arguments.repeats, arguments.quick) for case in LEARNING}
        rows = [(name, Spread.of(by[MASKABLE_PPO]), Spread.of(by[OURS])) for name, by in found.items()]
        print_table(f"Return of {STEPS} steps: median (min-max) of seeds", ("", MASKABLE_PPO, OURS), rows)
        content["learning"] = found
    write_json(arguments.out, "memory_and_masks", arguments, content)


if __name__ == "__main__":
    main()
