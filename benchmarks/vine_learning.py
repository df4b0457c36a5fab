"""Learning with vine sampling beside single path with the same trunk: one JSON file a run, resumable.

    python benchmarks/vine_learning.py                    # runs what is missing, then report and picture
    python benchmarks/vine_learning.py --report           # of what is there; --tasks: only some

Hopper-v5 and Swimmer-v5: 50 policy iterations of each, the same environments, arguments and trunk (512 and 2,048 steps
an iteration); returns of deterministic episodes against iterations and against simulator steps, branches included.
CartPole-v1: vine alone, the final policy within 200k simulator steps.
The buffer's defaults: Hopper-v5 with TRPOExt's default arguments and two lengths of the trunk; VineRolloutBuffer as it is
made without arguments, with the defaults that it had before, and single path, each until it has taken 200k simulator steps.
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
VINE_BEFORE = "vine, defaults before"
DEFAULTS_BEFORE: dict[str, Any] = dict(n_rollout_states=128, n_branch_actions=4, branch_length=100)
"""What ``VineRolloutBuffer`` had before its branches were short and N in proportion to the trunk."""


class Task(NamedTuple):
    """One environment's settings, which every algorithm shares, and the vine's own.

    :param iterations: how many to learn, with an evaluation after every second one
    :param simulator_steps: how many to learn
    :param evaluations: with ``simulator_steps``: learn in so many parts, with an evaluation after each; 0: learn at once,
        and stop early enough for the last iteration to end within them
    """

    n_steps: int
    vine: dict[str, Any]
    iterations: int | None = None
    simulator_steps: int | None = None
    evaluations: int = 0
    algorithms: tuple[str, ...] = (TRUNK, VINE)
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    env_id: str | None = None


def of_the_defaults(n_steps: int) -> Task:
    return Task(
        n_steps,
        {},
        simulator_steps=200_000,
        evaluations=10,
        algorithms=(TRUNK, VINE_BEFORE, VINE),
        arguments=dict(critic="auto", initial_std=0.5),
        env_id="Hopper-v5",
    )


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
    "defaults-512": of_the_defaults(64),
    "defaults-2048": of_the_defaults(256),
}
"""By environment, or by what is compared and the steps of the trunk."""


def model_of(name: str, algorithm: str, seed: int) -> TRPOExt:
    task, vine = TASKS[name], {}
    if algorithm != TRUNK:
        branches = task.vine if algorithm == VINE else DEFAULTS_BEFORE
        vine = dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=branches)
    env = make_vec_env(task.env_id or name, n_envs=N_ENVS, seed=seed, wrapper_class=SnapshotWrapper)
    arguments = {"critic": "adam", "initial_std": None, **task.arguments, **vine}
    return TRPOExt("MlpPolicy", env, n_steps=task.n_steps, seed=seed, device="cpu", **arguments)


def most_steps(task: Task) -> int:
    """What an iteration may cost: the trunk, and branches that all run to their full length."""
    n_actions = task.vine["n_branch_actions"]
    n_branches = task.vine["n_rollout_states"] * (2 if n_actions == "all" else n_actions)
    return N_ENVS * task.n_steps + n_branches * task.vine["branch_length"]


def learn(name: str, algorithm: str, seed: int, iterations: int | None, n_final: int = 20) -> dict[str, Any]:
    """One run, as its task says.

    :param iterations: None: as many as the task says
    :param n_final: episodes with the final policy
    """
    task, model = TASKS[name], model_of(name, algorithm, seed)
    env_id = task.env_id or name
    evaluation_env = make_vec_env(env_id, n_envs=4, seed=10_000 + seed)
    curve: list[tuple[int, int, float]] = []

    def evaluate() -> None:
        returns = evaluate_policy(model, evaluation_env, n_eval_episodes=4)[0]
        curve.append((model._n_updates, model.num_timesteps, float(returns)))

    started = time.perf_counter()
    if task.simulator_steps is None:
        while model._n_updates < (iterations or task.iterations or 0):
            model.learn(1, reset_num_timesteps=False)
            if model._n_updates % 2 == 0:
                evaluate()
    elif not task.evaluations:
        model.learn(500 if iterations else task.simulator_steps - most_steps(task))
    else:
        for end in np.linspace(0, 500 if iterations else task.simulator_steps, 1 + task.evaluations)[1:].astype(int).tolist():
            if model.num_timesteps < end:
                model.learn(end - model.num_timesteps, reset_num_timesteps=False)
                evaluate()
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


def path_of(out: Path, name: str, algorithm: str, seed: int) -> Path:
    return out / "vine_learning" / f"{name}-{algorithm.replace(',', '').replace(' ', '_')}-{seed}.json"


def run_missing(out: Path, tasks: list[str], seeds: list[int], iterations: int | None) -> None:
    for name, seed in itertools.product(tasks, seeds):
        for algorithm in TASKS[name].algorithms:
            path = path_of(out, name, algorithm, seed)
            if path.exists():
                continue
            result = learn(name, algorithm, seed, iterations, 4 if iterations else 20)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result) + "\n")
            print(f"{name:13} {algorithm:20} {seed}  final {result['final']:8.1f}  {result['seconds']:5.0f} s", flush=True)


def results_of(out: Path, name: str, algorithm: str) -> list[dict[str, Any]]:
    pattern = path_of(out, name, algorithm, 0).name.replace("-0.json", "-*.json")
    return [json.loads(path.read_text()) for path in sorted((out / "vine_learning").glob(pattern))]


def at_steps(result: dict[str, Any], steps: float) -> float:
    """The area under a run's curve, as a mean return, up to so many simulator steps."""
    returns = [value for _, cost, value in result["curve"] if cost <= steps]
    return float(np.mean(returns)) if returns else float("nan")


def report(out: Path, tasks: list[str]) -> None:
    rows = []
    for name in tasks:
        for algorithm in TASKS[name].algorithms:
            results = results_of(out, name, algorithm)
            if not results:
                continue
            areas = [np.mean([value for _, _, value in result["curve"]]) if result["curve"] else np.nan for result in results]
            cheapest = min(r["simulator_steps"] for a in TASKS[name].algorithms for r in results_of(out, name, a))
            same_cost = [at_steps(result, cheapest) for result in results]
            finals = [result["final"] for result in results]
            steps = np.mean([result["simulator_steps"] for result in results])
            rows.append(
                (
                    f"{name}, {algorithm}",
                    len(results),
                    f"{np.mean(areas):.1f} ± {np.std(areas):.1f}",
                    f"{np.nanmean(same_cost):.1f}" if np.isfinite(same_cost).any() else "none",
                    f"{np.mean(finals):.1f} (least {min(finals):.1f})",
                    f"{steps:.0f}",
                )
            )
    header = ("", "seeds", "area: mean return", f"the same, up to {TRUNK}'s steps", "final policy", "simulator steps")
    print_table("Learning: deterministic episodes, mean ± standard deviation over seeds", header, rows)


def draw(out: Path, tasks: list[str]) -> None:
    compared = [name for name in tasks if TASKS[name].iterations is not None]
    if not compared:
        return
    drawing, axes = new_figure(11, 3.6 * len(compared), len(compared), 2)
    for row, name in zip(axes, compared, strict=True):
        for algorithm in TASKS[name].algorithms:
            curves = [np.array(result["curve"]) for result in results_of(out, name, algorithm)]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            for ax, column in zip(row, (0, 1), strict=True):
                (line,) = ax.plot(mean[:, column], mean[:, 2], label=f"{algorithm}, {len(curves)} seeds")
                for curve in curves:
                    ax.plot(curve[:, column], curve[:, 2], color=line.get_color(), alpha=0.25, lw=0.7)
        for ax, label in zip(row, ("policy iterations", "simulator steps, branches included"), strict=True):
            ax.set(title=name, xlabel=label, ylabel="return, deterministic")
            ax.grid(alpha=0.3)
            ax.legend()
        row[1].set_xscale("log")
    save_figure(drawing, out, "vine_learning")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tasks", "--envs", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments: argparse.Namespace = parser.parse_args()
    set_up()
    seeds, iterations = arguments.seeds, None
    if arguments.quick:
        seeds, iterations = [0], 2
    if not arguments.report:
        run_missing(arguments.out, arguments.tasks, seeds, iterations)
    report(arguments.out, arguments.tasks)
    draw(arguments.out, arguments.tasks)


if __name__ == "__main__":
    main()
