"""Learning with vine sampling beside single path with the same trunk: one JSON file a run, resumable.

    python benchmarks/vine_learning.py                    # runs what is missing, then report and picture
    python benchmarks/vine_learning.py --report           # of what is there

Hopper-v5 and Swimmer-v5: 50 policy iterations of each, the same environments, arguments and trunk (512 and 2,048 steps
an iteration); returns of deterministic episodes against iterations and against simulator steps, branches included.
CartPole-v1: vine alone, the final policy within 200k simulator steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _measure import argument_parser, new_figure, print_table, save_figure, set_up, versions
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer

N_ENVS = 8
TRUNK = "single path"
VINE = "vine"


class Task(NamedTuple):
    """One environment's settings, which every algorithm shares, and the vine's own."""

    n_steps: int
    vine: dict[str, Any]
    iterations: int | None = None
    simulator_steps: int | None = None
    algorithms: tuple[str, ...] = (TRUNK, VINE)
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never written to)


TASKS = {
    # tried on seeds 100-104 and 109
    "CartPole-v1": Task(
        64,
        dict(n_rollout_states=32, n_branch_actions="all", branch_length=50),
        simulator_steps=200_000,
        algorithms=(VINE,),
        arguments=dict(critic="gauss_newton", target_kl="lin_0.02"),
    ),
    # short branches that go on with the critic; tried on seeds 100 and 101
    "Hopper-v5": Task(64, dict(n_rollout_states=256, n_branch_actions=4, branch_length=10), iterations=50),
    # tried on seeds 100 and 101; the paper's experiment had branches of 50 steps
    "Swimmer-v5": Task(
        256,
        dict(n_rollout_states=512, n_branch_actions=4, branch_length=20),
        iterations=50,
        arguments=dict(critic="gauss_newton", target_kl=0.03),
    ),
}


def model_of(env_id: str, algorithm: str, seed: int) -> TRPOExt:
    task, vine = TASKS[env_id], {}
    if algorithm == VINE:
        vine = dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=task.vine)
    env = make_vec_env(env_id, n_envs=N_ENVS, seed=seed, wrapper_class=SnapshotWrapper)
    arguments = {"critic": "adam", "initial_std": None, **task.arguments, **vine}
    return TRPOExt("MlpPolicy", env, n_steps=task.n_steps, seed=seed, device="cpu", **arguments)


def most_steps(task: Task) -> int:
    """What an iteration may cost: the trunk, and branches that all run to their full length."""
    n_actions = task.vine["n_branch_actions"]
    n_branches = task.vine["n_rollout_states"] * (2 if n_actions == "all" else n_actions)
    return N_ENVS * task.n_steps + n_branches * task.vine["branch_length"]


def learn(env_id: str, algorithm: str, seed: int, iterations: int | None, n_final: int = 20) -> dict[str, Any]:
    """One run; with a number of iterations, an evaluation after every second one.

    :param iterations: None: as many as the task says
    :param n_final: episodes with the final policy
    """
    task, model = TASKS[env_id], model_of(env_id, algorithm, seed)
    evaluation_env = make_vec_env(env_id, n_envs=4, seed=10_000 + seed)
    curve: list[tuple[int, int, float]] = []
    started = time.perf_counter()
    if task.simulator_steps is not None:
        model.learn(500 if iterations else task.simulator_steps - most_steps(task))
    while task.simulator_steps is None and model._n_updates < (iterations or task.iterations or 0):
        model.learn(1, reset_num_timesteps=False)
        if model._n_updates % 2 == 0:
            returns = evaluate_policy(model, evaluation_env, n_eval_episodes=4)[0]
            curve.append((model._n_updates, model.num_timesteps, float(returns)))
    seconds = time.perf_counter() - started
    final = evaluate_policy(model, make_vec_env(env_id, n_envs=4, seed=20_000 + seed), n_eval_episodes=n_final)[0]
    return {
        "env": env_id,
        "algorithm": algorithm,
        "seed": seed,
        "final": float(final),
        "simulator_steps": model.num_timesteps,
        "seconds": seconds,
        "curve": curve,
        "outcomes": model.outcome_counts,
        "versions": versions(),
    }


def path_of(out: Path, env_id: str, algorithm: str, seed: int) -> Path:
    return out / "vine_learning" / f"{env_id}-{algorithm.replace(' ', '_')}-{seed}.json"


def run_missing(out: Path, environments: list[str], seeds: list[int], iterations: int | None) -> None:
    for env_id, seed in itertools.product(environments, seeds):
        for algorithm in TASKS[env_id].algorithms:
            path = path_of(out, env_id, algorithm, seed)
            if path.exists():
                continue
            result = learn(env_id, algorithm, seed, iterations, 4 if iterations else 20)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result) + "\n")
            print(f"{env_id:12} {algorithm:12} {seed}  final {result['final']:8.1f}  {result['seconds']:5.0f} s", flush=True)


def results_of(out: Path, env_id: str, algorithm: str) -> list[dict[str, Any]]:
    pattern = path_of(out, env_id, algorithm, 0).name.replace("-0.json", "-*.json")
    return [json.loads(path.read_text()) for path in sorted((out / "vine_learning").glob(pattern))]


def at_steps(result: dict[str, Any], steps: float) -> float:
    """The area under a run's curve, as a mean return, up to so many simulator steps."""
    returns = [value for _, cost, value in result["curve"] if cost <= steps]
    return float(np.mean(returns)) if returns else float("nan")


def report(out: Path, environments: list[str]) -> None:
    rows = []
    for env_id in environments:
        for algorithm in TASKS[env_id].algorithms:
            results = results_of(out, env_id, algorithm)
            if not results:
                continue
            areas = [np.mean([value for _, _, value in result["curve"]]) if result["curve"] else np.nan for result in results]
            cheapest = min(r["simulator_steps"] for a in TASKS[env_id].algorithms for r in results_of(out, env_id, a))
            same_cost = [at_steps(result, cheapest) for result in results]
            finals = [result["final"] for result in results]
            steps = np.mean([result["simulator_steps"] for result in results])
            rows.append(
                (
                    f"{env_id}, {algorithm}",
                    len(results),
                    f"{np.mean(areas):.1f} ± {np.std(areas):.1f}",
                    f"{np.nanmean(same_cost):.1f}" if np.isfinite(same_cost).any() else "none",
                    f"{np.mean(finals):.1f} (least {min(finals):.1f})",
                    f"{steps:.0f}",
                )
            )
    header = ("", "seeds", "area: mean return", f"the same, up to {TRUNK}'s steps", "final policy", "simulator steps")
    print_table("Learning: deterministic episodes, mean ± standard deviation over seeds", header, rows)


def draw(out: Path, environments: list[str]) -> None:
    compared = [env_id for env_id in environments if len(TASKS[env_id].algorithms) > 1]
    if not compared:
        return
    drawing, axes = new_figure(11, 3.6 * len(compared), len(compared), 2)
    for row, env_id in zip(axes, compared, strict=True):
        for algorithm in TASKS[env_id].algorithms:
            curves = [np.array(result["curve"]) for result in results_of(out, env_id, algorithm)]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            for ax, column in zip(row, (0, 1), strict=True):
                (line,) = ax.plot(mean[:, column], mean[:, 2], label=f"{algorithm}, {len(curves)} seeds")
                for curve in curves:
                    ax.plot(curve[:, column], curve[:, 2], color=line.get_color(), alpha=0.25, lw=0.7)
        for ax, label in zip(row, ("policy iterations", "simulator steps, branches included"), strict=True):
            ax.set(title=env_id, xlabel=label, ylabel="return, deterministic")
            ax.grid(alpha=0.3)
            ax.legend()
        row[1].set_xscale("log")
    save_figure(drawing, out, "vine_learning")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--envs", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments: argparse.Namespace = parser.parse_args()
    set_up()
    seeds, iterations = arguments.seeds, None
    if arguments.quick:
        seeds, iterations = [0], 2
    if not arguments.report:
        run_missing(arguments.out, arguments.envs, seeds, iterations)
    report(arguments.out, arguments.envs)
    draw(arguments.out, arguments.envs)


if __name__ == "__main__":
    main()
