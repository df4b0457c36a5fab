"""Which of several choices move the return on MuJoCo: a fractional factorial design, one process a run, resumable.

    python benchmarks/screening.py run --jobs 2
    python benchmarks/screening.py report

Seven choices with two levels each in 16 runs (2^(7-3), resolution IV: no main effect is confounded with another
or with what two choices do together, but the latter are with one another). Every run has a seed of its own, none of
which is reported as a benchmark result. A main effect is the mean over the runs with the one level less the mean
over those with the other, so that all runs bear on each choice.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _measure import argument_parser, print_table, set_up
from _runs import Run, learn, path_of, read, sources, versions, write
from _settings import BUDGETS, Setting

DIMENSIONS = {"HalfCheetah-v5": 6, "Hopper-v5": 3, "Walker2d-v5": 6}
"""Of actions: radius and damping are in true KL, which adds them up."""
FIRST_SEED = 110
QUICK_STEPS = 2048

CHOICES = {
    "damping": ("0.1 per dimension", "0.02"),
    "gae_lambda": ("0.95", "0.975"),
    "gamma": ("0.99", "0.995"),
    "n_steps": ("2 x 1024", "2 x 512"),
    "log_std_init": ("0", "-0.5"),
    "critic": ("64x64, 2 steps", "128x128, 4 steps"),
    "radius": ("0.02 per dimension, falling", "0.04"),
}
"""Levels by name, the low one first."""


def design() -> np.ndarray:
    """Levels of the runs, (16, 7), 0 or 1: a full design in four choices, and three products of signs."""
    signs = np.array([*itertools.product((-1, 1), repeat=4)])
    a, b, c, d = signs.T
    return (np.column_stack([signs, a * b * c, b * c * d, a * c * d]) + 1) // 2


def setting(levels: np.ndarray, n_dimensions: int) -> Setting:
    """What a run is made of.

    :param levels: of ``CHOICES``, (7,)
    """
    high = dict(zip(CHOICES, map(bool, levels), strict=True))
    gamma = 0.995 if high["gamma"] else 0.99
    width = 128 if high["critic"] else 64
    arguments: dict[str, Any] = {
        "policy": "MlpPolicy",
        "n_steps": 512 if high["n_steps"] else 1024,
        "gamma": gamma,
        "gae_lambda": 0.975 if high["gae_lambda"] else 0.95,
        "target_kl": f"lin_{(0.04 if high['radius'] else 0.02) * n_dimensions:g}",
        "cg_damping": (0.02 if high["damping"] else 0.1) * n_dimensions,
        "critic": "gauss_newton",
        "critic_steps": 4 if high["critic"] else 2,
        "policy_kwargs": {
            "log_std_init": -0.5 if high["log_std_init"] else 0.0,
            "net_arch": {"pi": [64, 64], "vf": [width, width]},
        },
    }
    return Setting(arguments, 2, {"gamma": gamma})


def run_here(arguments: argparse.Namespace) -> None:
    """The one run that the arguments name, in this process."""
    (env_id,), (row,) = arguments.envs, arguments.rows
    levels, n_timesteps = design()[row], QUICK_STEPS if arguments.quick else BUDGETS[env_id]
    seed = FIRST_SEED + row
    about = {"env": env_id, "seed": seed, "timesteps": n_timesteps, "levels": levels.tolist(), "sources": sources()}
    run = learn("trpo_ext_zoo", env_id, seed, n_timesteps, setting(levels, DIMENSIONS[env_id]))
    whole = Run({**about, **run.about, "versions": versions()}, run.rows)
    write(whole, path_of(arguments.folder, "runs", env_id, row))


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is missing, ``jobs`` processes at a time."""

    def run_apart(row: int, env_id: str) -> None:
        path = path_of(arguments.folder, "runs", env_id, row)
        if path.exists() and not arguments.quick:
            return
        command = [sys.executable, "-W", "ignore", __file__, "one", "--out", str(arguments.out)]
        command += ["--envs", env_id, "--rows", str(row), *(["--quick"] if arguments.quick else [])]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        run = read(path)
        print(f"{env_id:16} {row:3}  return {run.final:8.1f}  {run.rows['wall_seconds'].iloc[-1]:5.0f} s", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda spec: run_apart(*spec), itertools.product(arguments.rows, arguments.envs)))


class Effects(NamedTuple):
    """Of each choice, (choices,) both; standard errors are NaN where there are no more runs than figures."""

    estimates: np.ndarray
    errors: np.ndarray

    def cell(self, choice: int) -> str:
        error = self.errors[choice]
        return f"{100 * self.estimates[choice]:+.0f}" + ("" if np.isnan(error) else f" ± {100 * error:.0f}") + " %"


def effects(levels: np.ndarray, scores: np.ndarray) -> Effects:
    """Main effects by least squares, with their standard errors.

    :param levels: (runs, choices), 0 or 1
    :param scores: (runs,)
    """
    columns = np.column_stack([np.ones(len(levels)), levels - 0.5])
    coefficients, *_ = np.linalg.lstsq(columns, scores, rcond=None)
    freedom, residuals = len(scores) - columns.shape[1], scores - columns @ coefficients
    variance = residuals @ residuals / freedom if freedom > 0 else np.nan
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(columns.T @ columns)))
    return Effects(coefficients[1:], errors[1:])


def report(arguments: argparse.Namespace) -> None:
    """Main effects as a share of an environment's mean return: by itself, and of all runs together."""
    for title, score_of in (("final policy", lambda run: run.final), ("mean over training", mean_of_curve)):
        samples = {env_id: scores_of(arguments, env_id, score_of) for env_id in arguments.envs}
        for env_id, (_, scores) in samples.items():
            print(f"{env_id}, {title}: {len(scores)} runs, mean {scores.mean():.0f} ± {scores.std(ddof=1):.0f}")
        shares = [(levels, scores / scores.mean()) for levels, scores in samples.values()]
        together = effects(np.vstack([levels for levels, _ in shares]), np.concatenate([share for _, share in shares]))
        columns = [*(effects(*share) for share in shares), together]
        rows = [
            (f"{name}: {high} against {low}", *(column.cell(i) for column in columns))
            for i, (name, (low, high)) in enumerate(CHOICES.items())
        ]
        print_table(f"Main effects on the return, {title}", ("", *arguments.envs, "together"), rows)
        print()


def scores_of(arguments: argparse.Namespace, env_id: str, score_of: Callable[[Run], float]) -> tuple[np.ndarray, np.ndarray]:
    """Levels (runs, choices) and scores (runs,) of the rows that were run."""
    paths = [path_of(arguments.folder, "runs", env_id, row) for row in range(len(design()))]
    there = [row for row, path in enumerate(paths) if path.exists()]
    return design()[there], np.array([score_of(read(paths[row])) for row in there])


def mean_of_curve(run: Run) -> float:
    return float(run.rows["mean"].mean())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "report", "one"], help="'one' is what 'run' starts")
    parser.add_argument("--envs", nargs="+", choices=[*DIMENSIONS], default=[*DIMENSIONS])
    parser.add_argument("--rows", nargs="+", type=int, default=[*range(len(design()))], help="of the design")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments = parser.parse_args()
    if arguments.quick and arguments.command is None:
        arguments.envs, arguments.rows = ["Hopper-v5"], [0, 15]
    arguments.folder = Path(arguments.out) / "tuning" / ("screening-quick" if arguments.quick else "screening")
    set_up()
    if arguments.command == "one":
        run_here(arguments)
        return
    if arguments.command != "report":
        run_all(arguments)
    if arguments.command != "run":
        report(arguments)


if __name__ == "__main__":
    main()
