"""Learning runs behind the choice of defaults: one process a run, one JSON file a run, resumable.

    python benchmarks/choices.py run --group critic --out benchmarks/results/choices
    python benchmarks/choices.py report --group critic --out benchmarks/results/choices

A run's score is the mean undiscounted return of 20 deterministic episodes with the last policy; the
mean of the last 100 training episodes is kept beside it. Seeds from 100 up: none of them is reported
as a benchmark result. The report compares each variant with the first of its group.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _measure import initial_std_of_sb3, print_table
from _scores import interval, probability_of_improvement, spread
from rliable import metrics

ENVIRONMENTS = {
    "HalfCheetah-v5": 200_000,
    "Hopper-v5": 200_000,
    "Pendulum-v1": 200_000,
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "LunarLander-v3": 200_000,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {"critic": "adam"},
    "gauss_newton": {"critic": "gauss_newton"},
    "sb3_contrib": {"library": "sb3_contrib"},
    **{f"gauss_newton_{steps}": {"critic": "gauss_newton", "critic_steps": steps} for steps in (1, 2, 5)},
    **{f"thinned_{factor}": {"critic": "adam", "sub_sampling_factor": factor} for factor in (5, 10)},
    **{
        f"kl_{kl:g}_damping_{damping:g}": {"target_kl": kl, "cg_damping": damping}
        for kl in (0.01, 0.02, 0.03, 0.05, 0.08)
        for damping in (0.1, 0.3, 0.5)
    },
}

GROUPS = {
    "defaults": ["sb3_contrib", "gauss_newton", "adam"],
    "critic": ["adam", "gauss_newton"],
    "critic_steps": ["gauss_newton_1", "gauss_newton_2", "gauss_newton", "gauss_newton_5"],
    "thinned": ["adam", "thinned_10"],
    "radius": [
        *("kl_0.01_damping_0.1", "kl_0.02_damping_0.1", "kl_0.03_damping_0.1", "kl_0.05_damping_0.1"),
        *("kl_0.03_damping_0.3", "kl_0.05_damping_0.3", "kl_0.05_damping_0.5", "kl_0.08_damping_0.5"),
        *("gauss_newton", "sb3_contrib"),
    ],
}


def learn(variant: str, env_id: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: train, evaluate, and say what came out."""
    import torch as th
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_trpo_ext import TRPOExt

    th.set_num_threads(1)
    arguments = dict(VARIANTS[variant])
    algorithm = TRPO if arguments.pop("library", None) == "sb3_contrib" else TRPOExt
    arguments |= initial_std_of_sb3(algorithm)
    model = algorithm("MlpPolicy", make_vec_env(env_id, seed=seed), seed=seed, device="cpu", **arguments)
    started = time.perf_counter()
    model.learn(steps)
    seconds = time.perf_counter() - started
    returns, _ = evaluate_policy(
        model, make_vec_env(env_id, seed=10_000 + seed), n_eval_episodes=20, return_episode_rewards=True
    )
    return {
        "variant": variant,
        "env": env_id,
        "seed": seed,
        "steps": steps,
        "score": float(np.mean(returns)),
        "training": float(np.mean([episode["r"] for episode in model.ep_info_buffer])),
        "seconds": seconds,
        "outcomes": getattr(model, "outcome_counts", None),
    }


def path_of(out: Path, variant: str, env_id: str, seed: int) -> Path:
    return out / f"{variant}-{env_id}-{seed}.json"


def run_all(group: str, out: Path, seeds: list[int], jobs: int, environments: list[str]) -> None:
    """Run what is missing, ``jobs`` processes at a time."""
    out.mkdir(parents=True, exist_ok=True)

    def run(seed: int, env_id: str, variant: str) -> None:
        path = path_of(out, variant, env_id, seed)
        if path.exists():
            return
        command = [sys.executable, "-W", "ignore", __file__, "one", variant, env_id, str(seed), "--out", str(out)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        result = json.loads(path.read_text())
        print(f"{variant:16} {env_id:15} {seed} score {result['score']:9.1f}  {result['seconds']:5.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda spec: run(*spec), itertools.product(seeds, environments, GROUPS[group])))


def scores_of(out: Path, variant: str, env_id: str, key: str) -> np.ndarray:
    """Of the runs there are, by seed, (runs,)."""
    paths = sorted(out.glob(f"{variant}-{env_id}-*.json"))
    return np.array([json.loads(path.read_text())[key] for path in paths])


def report(group: str, out: Path, key: str, environments: list[str]) -> None:
    """Mean and spread per environment and variant; each variant against the group's first."""
    first, *others = GROUPS[group]
    rows = []
    for env_id in environments:
        scores = {variant: scores_of(out, variant, env_id, key) for variant in GROUPS[group]}
        cells = [spread(x) if len(x) else "not run" for x in scores.values()]
        rows.append((env_id, *cells))
    print_table(f"Returns, {key}", ("", *GROUPS[group]), rows)
    for variant in others:
        compare(first, variant, out, key, environments)


def compare(first: str, variant: str, out: Path, key: str, environments: list[str]) -> None:
    """Probability of improvement and ratio of interquartile means, both sides resampled, 95% bootstrap intervals."""
    pairs = {env_id: [scores_of(out, name, env_id, key) for name in (variant, first)] for env_id in environments}
    complete = {env_id: pair for env_id, pair in pairs.items() if min(map(len, pair)) > 1}
    if not complete:
        return
    rows = []
    for env_id, pair in complete.items():
        columns = [scores[:, None] for scores in pair]
        rows.append((env_id, interval(probability_of_improvement, *columns), interval(ratio_of_means, *columns)))
    n = min(len(scores) for pair in complete.values() for scores in pair)
    pooled = [np.stack([pair[side][:n] for pair in complete.values()], axis=1) for side in (0, 1)]
    rows.append((f"pooled, {n} runs each", interval(probability_of_improvement, *pooled), ""))
    for i, env_id in enumerate(complete if len(complete) > 2 else []):
        chance = float(probability_of_improvement(*(np.delete(side, i, axis=1) for side in pooled)))
        rows.append((f"pooled without {env_id}", f"{chance:.2f}", ""))
    header = ("", "probability of improvement", "ratio of interquartile means")
    print_table(f"{variant} against {first}", header, rows)


def ratio_of_means(scores: np.ndarray, reference: np.ndarray) -> float:
    """Interquartile mean over interquartile mean; returns below zero are costs, and the ratio is the other way round."""
    ours, theirs = metrics.aggregate_iqm(scores), metrics.aggregate_iqm(reference)
    return float(theirs / ours if theirs < 0.0 else ours / theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("one")
    one.add_argument("variant", choices=VARIANTS)
    one.add_argument("env", choices=ENVIRONMENTS)
    one.add_argument("seed", type=int)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--group", choices=GROUPS, required=True)
        command.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
        command.add_argument("--jobs", type=int, default=2)
        command.add_argument("--envs", nargs="+", default=list(ENVIRONMENTS))
        command.add_argument("--key", choices=["score", "training"], default="score")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=Path("benchmarks/results/choices"))
    arguments = parser.parse_args()
    if arguments.command == "one":
        warnings.simplefilter("ignore")
        result = learn(arguments.variant, arguments.env, arguments.seed, ENVIRONMENTS[arguments.env])
        path_of(arguments.out, arguments.variant, arguments.env, arguments.seed).write_text(json.dumps(result) + "\n")
    elif arguments.command == "run":
        run_all(arguments.group, arguments.out, arguments.seeds, arguments.jobs, arguments.envs)
    else:
        report(arguments.group, arguments.out, arguments.key, arguments.envs)


if __name__ == "__main__":
    main()
