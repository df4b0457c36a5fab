"""Environment steps per second: learning end to end, and rollouts alone.

    python benchmarks/throughput.py [--quick] [--out DIR]

TRPOExt and sb3_contrib.TRPO take turns in one process, each with its own default arguments but for
the initial spread of the actions (SB3's on both sides) and MlpPolicy, in the same environments from
the same seeds. Rollouts are measured with the policy left as it was initialised, and against the same
vectorised environment stepped without any policy, with actions drawn beforehand from the distribution
of such a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from _measure import (
    OURS,
    REFERENCE,
    Comparison,
    Stopwatch,
    argument_parser,
    draw_ratios,
    initial_std_of_sb3,
    interleave,
    new_figure,
    print_comparisons,
    save_figure,
    seconds,
    set_up,
    write_json,
)
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import TRPOExt

BARE = "bare"


@dataclass(frozen=True)
class Case:
    """An environment to learn in, for so many iterations a turn, and the speed-up to reach."""

    env_id: str
    n_envs: int
    iterations: int
    bar: float

    def __str__(self) -> str:
        return f"{self.env_id}, n_envs={self.n_envs}"


END_TO_END = (
    Case("HalfCheetah-v5", 1, 3, 3.0),
    Case("CartPole-v1", 1, 3, 3.0),
    Case("HalfCheetah-v5", 8, 1, 1.8),
)
ROLLOUT = Case("HalfCheetah-v5", 1, 3, 3.5)
SHARE_OF_BARE = 0.6
DEFAULT_N_STEPS = 2048
QUICK_N_STEPS = 256


def make_model(algorithm: type[TRPO] | type[TRPOExt], case: Case, seed: int, quick: bool) -> Any:
    # both have the same default n_steps
    arguments: dict[str, Any] = {"n_steps": QUICK_N_STEPS} if quick else {}
    arguments |= initial_std_of_sb3(algorithm)
    env = make_vec_env(case.env_id, case.n_envs, seed=seed)
    return algorithm("MlpPolicy", env, seed=seed, device="cpu", **arguments)


def steps_of(case: Case, quick: bool) -> int:
    return case.iterations * case.n_envs * (QUICK_N_STEPS if quick else DEFAULT_N_STEPS)


def learning_speed(algorithm: type[TRPO] | type[TRPOExt], case: Case, seed: int, quick: bool) -> float:
    """Steps per second of ``learn()``, from a new model."""
    model = make_model(algorithm, case, seed, quick)
    steps = steps_of(case, quick)
    speed = steps / seconds(lambda: model.learn(steps))
    model.env.close()
    return speed


def rollout_speed(algorithm: type[TRPO] | type[TRPOExt], case: Case, seed: int, quick: bool) -> float:
    """Steps per second of ``collect_rollouts()``."""
    model = make_model(algorithm, case, seed, quick)
    stopwatch = Stopwatch()
    model.collect_rollouts = stopwatch.timed("rollout", model.collect_rollouts)
    model.train = lambda: None
    model.learn(steps_of(case, quick))
    model.env.close()
    return steps_of(case, quick) / stopwatch.seconds["rollout"]


def bare_speed(case: Case, seed: int, quick: bool) -> float:
    """Steps per second of the environment alone.

    How long MuJoCo takes depends on the contacts, so the actions are what a new policy takes:
    standard normal, clipped.
    """
    env = make_vec_env(case.env_id, case.n_envs, seed=seed)
    space: Any = env.action_space
    n_steps = steps_of(case, quick) // case.n_envs
    noise = np.random.default_rng(seed).standard_normal((n_steps, case.n_envs, *space.shape), dtype=np.float32)
    actions = np.clip(noise, space.low, space.high)
    env.reset()

    def step_through() -> None:
        for action in actions:
            env.step(action)

    speed = n_steps * case.n_envs / seconds(step_through)
    env.close()
    return speed


def compare_learning(case: Case, repeats: int, quick: bool) -> Comparison:
    speeds = interleave(
        {
            REFERENCE: lambda repeat: learning_speed(TRPO, case, repeat, quick),
            OURS: lambda repeat: learning_speed(TRPOExt, case, repeat, quick),
        },
        repeats,
    )
    return Comparison(f"learn(), {case}", "steps/s", speeds[OURS], speeds[REFERENCE], case.bar, more_is_better=True)


def compare_rollouts(case: Case, repeats: int, quick: bool) -> tuple[list[Comparison], list[Comparison]]:
    """Against sb3_contrib, and both against the environment alone."""
    speeds = interleave(
        {
            REFERENCE: lambda repeat: rollout_speed(TRPO, case, repeat, quick),
            OURS: lambda repeat: rollout_speed(TRPOExt, case, repeat, quick),
            BARE: lambda repeat: bare_speed(case, repeat, quick),
        },
        repeats,
    )
    name, unit = f"rollout, {case}", "steps/s"
    against_reference = Comparison(name, unit, speeds[OURS], speeds[REFERENCE], case.bar, more_is_better=True)
    shares = [
        Comparison(f"{who} {name}", unit, speeds[who], speeds[BARE], bar, more_is_better=True, against="bare DummyVecEnv")
        for who, bar in ((OURS, SHARE_OF_BARE), (REFERENCE, None))
    ]
    return [against_reference], shares


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="turns of each (7; 2 with --quick)")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 7)
    set_up()
    rollouts, shares = compare_rollouts(ROLLOUT, arguments.repeats, arguments.quick)
    print_comparisons("Rollout alone", rollouts)
    print_comparisons("Rollout as a share of the environment's own speed", shares, measured="rollout")
    learning = [compare_learning(case, arguments.repeats, arguments.quick) for case in END_TO_END]
    print_comparisons("End to end", learning)
    content = {"end_to_end": learning, "rollout": rollouts, "share_of_bare": shares}
    write_json(
        arguments.out,
        "throughput",
        arguments,
        {key: [comparison.as_json() for comparison in comparisons] for key, comparisons in content.items()},
    )
    drawing, axes = new_figure(10, 5, rows=2)
    draw_ratios(axes[0, 0], [*learning, *rollouts], f"Steps per second, times {REFERENCE}'s")
    draw_ratios(axes[1, 0], shares, "Rollout as a share of the bare environment's speed")
    save_figure(drawing, arguments.out, "throughput")


if __name__ == "__main__":
    main()
