"""Learning curves against sb3_contrib.TRPO: one process a run, one CSV file a run, resumable.

    python benchmarks/learning.py run --algos trpo_ext_zoo sb3_contrib_zoo --seeds 0 1 2
    python benchmarks/learning.py report

``run`` goes through seeds, then environments, then algorithms, and passes over what is there already, so that
it can be stopped at any time and what there is stays balanced. Every file says in its first line what it was
run with. A policy is evaluated on environments of its own, deterministically, with normalisation statistics
frozen, 20 times on the way (10 episodes) and at the end (20 episodes); times are those of training alone.
``report`` draws and prints whatever is there and says what is not. Without either word both are done.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _measure import argument_parser, set_up
from _runs import one, outdated, path_of, read, write
from _settings import ALGORITHMS, BUDGETS, MUJOCO, RANDOM

QUICK_STEPS = 2048
QUICK = {"algos": ["trpo_ext_zoo", "sb3_contrib_zoo"], "envs": ["Pendulum-v1"], "seeds": [0, 1]}


def run_all(arguments: argparse.Namespace) -> bool:
    """Run what is missing, ``jobs`` processes at a time; whether all of them came to their end."""
    runs = [(RANDOM, env_id, 0) for env_id in arguments.envs]
    runs += [
        (algorithm, env_id, seed)
        for seed, env_id, algorithm in itertools.product(arguments.seeds, arguments.envs, arguments.algos)
    ]
    missing = [run for run in runs if arguments.quick or not is_there(arguments, *run)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return all([*pool.map(lambda run: run_apart(arguments, *run), missing)])


def is_there(arguments: argparse.Namespace, algorithm: str, env_id: str, seed: int) -> bool:
    """Whether the run's file is there and whole; says so where it is of another setting than the run would be."""
    path = path_of(arguments.folder, algorithm, env_id, seed)
    if not path.exists():
        return False
    try:
        changed = outdated(read(path), arguments.conf_file)
    except ValueError as error:
        print(f"{error}; run again", flush=True)
        return False
    if changed:
        print(f"{path}: skipped: it was run with another setting ({', '.join(changed)})", flush=True)
    return True


def run_apart(arguments: argparse.Namespace, algorithm: str, env_id: str, seed: int) -> bool:
    """One run in a process of its own, with one thread."""
    name = f"{algorithm:24} {env_id:24} {seed:4}"
    command = [sys.executable, "-W", "ignore", __file__, "one", "--out", str(arguments.out)]
    command += ["--algos", algorithm, "--envs", env_id, "--seeds", str(seed)]
    command += ["--quick"] if arguments.quick else []
    command += ["--conf-file", str(arguments.conf_file)] if arguments.conf_file else []
    command += ["--machine", arguments.machine] if arguments.machine else []
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{name}  failed\n{done.stderr}", flush=True)
        return False
    run = read(path_of(arguments.folder, algorithm, env_id, seed))
    wall, cpu = run.rows[["wall_seconds", "cpu_seconds"]].iloc[-1]
    print(f"{name}  return {run.final:9.1f}  {wall:6.0f} s, {cpu:5.0f} s of CPU", flush=True)
    return True


def run_here(arguments: argparse.Namespace) -> None:
    """The one run that the arguments name, in this process."""
    (algorithm,), (env_id,), (seed,) = arguments.algos, arguments.envs, arguments.seeds
    n_timesteps = QUICK_STEPS if arguments.quick else BUDGETS[env_id]
    run = one(algorithm, env_id, seed, n_timesteps, arguments.conf_file, arguments.machine)
    write(run, path_of(arguments.folder, algorithm, env_id, seed))


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "report", "one"], help="'one' is what 'run' starts")
    parser.add_argument("--algos", nargs="+", choices=[*ALGORITHMS, RANDOM], default=["trpo_ext_zoo", "sb3_contrib_zoo"])
    parser.add_argument("--envs", nargs="+", choices=[*BUDGETS], default=[*MUJOCO])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(10)])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--conf-file", type=Path, help="the file of trpo_ext_zoo, if not zoo_configs/trpo_ext.yml")
    parser.add_argument(
        "--machine",
        metavar="WORDS",
        help="put behind the processor's name, where that does not tell machines of another speed apart:"
        " times are compared only between runs on the same",
    )
    parser.add_argument("--page", type=Path, help="of report: put the table into this file too, between its marks")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.conf_file is not None and not arguments.conf_file.exists():
        parser.error(f"--conf-file: there is no {arguments.conf_file}")
    if arguments.quick and arguments.command is None:
        vars(arguments).update(QUICK)
    arguments.folder = arguments.out / ("learning-quick" if arguments.quick else "learning")
    return arguments


def main() -> None:
    arguments = parse()
    set_up()
    if arguments.command == "one":
        run_here(arguments)
        return
    complete = arguments.command == "report" or run_all(arguments)
    if arguments.command != "run":
        from _learning_report import report

        report(arguments)
    if not complete:
        sys.exit("some runs failed")


if __name__ == "__main__":
    main()
