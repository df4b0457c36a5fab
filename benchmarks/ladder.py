"""From sb3_contrib.TRPO to TRPOExt one rung at a time: what each choice is worth, one process a run, resumable.

    python benchmarks/ladder.py run --seeds 200 201 202
    python benchmarks/ladder.py pack
    python benchmarks/ladder.py report

Rungs are those of ``_ladder_rungs.py``, default arguments with normalised observations; the rule that decides stands in
``benchmarks/results/tuning/ladder.md``. ``run`` goes through seeds, then environments, then rungs, and passes over what
is there, as a file of its own or packed, so that it can be stopped at any time. ``pack`` puts the files of a rung into
one, ``ladder/RUNG.csv.gz``, and removes them. ``report`` makes table and picture of whatever is there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _ladder_rungs import RUNGS, put_in_place
from _measure import argument_parser, set_up
from _packed import pack, unpack
from _runs import Run, learn, path_of, read, sources, versions_on, write
from _settings import BUDGETS, MUJOCO, RANDOM

QUICK_STEPS = 2048
QUICK = {"rungs": ["sb3_contrib", "as_theirs", "full"], "envs": ["Hopper-v5"], "seeds": [200]}


def packed_path(folder: Path, rung: str) -> Path:
    return folder / f"{rung}.csv.gz"


def runs_of(folder: Path, rung: str) -> list[Run]:
    """Packed or not; of a run that is there both ways, the file of its own."""
    packed = unpack(packed_path(folder, rung)) if packed_path(folder, rung).exists() else []
    single = [read(path) for path in sorted((folder / rung).glob("*/*.csv"))]
    return [*{(run.about["env"], run.about["seed"]): run for run in [*packed, *single]}.values()]


def run_all(arguments: argparse.Namespace) -> bool:
    """Run what is missing, ``jobs`` processes at a time; whether all of them came to their end."""
    there = {(run.about["algorithm"], run.about["env"], run.about["seed"]) for run in all_runs(arguments.folder)}
    wanted = [
        (rung, env_id, seed) for seed, env_id, rung in itertools.product(arguments.seeds, arguments.envs, arguments.rungs)
    ]
    missing = [run for run in wanted if arguments.quick or run not in there]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return all([*pool.map(lambda run: run_apart(arguments, *run), missing)])


def all_runs(folder: Path) -> list[Run]:
    return [run for rung in RUNGS for run in runs_of(folder, rung)]


def run_apart(arguments: argparse.Namespace, rung: str, env_id: str, seed: int) -> bool:
    """One run in a process of its own, with one thread."""
    name = f"{rung:20} {env_id:16} {seed:4}"
    command = [sys.executable, "-W", "ignore", __file__, "one", "--out", str(arguments.out)]
    command += ["--rungs", rung, "--envs", env_id, "--seeds", str(seed), *(["--quick"] if arguments.quick else [])]
    command += ["--machine", arguments.machine] if arguments.machine else []
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{name}  failed\n{done.stderr}", flush=True)
        return False
    run = read(path_of(arguments.folder, rung, env_id, seed))
    wall, cpu = run.rows[["wall_seconds", "cpu_seconds"]].iloc[-1]
    print(f"{name}  return {run.final:9.1f}  {wall:6.0f} s, {cpu:5.0f} s of CPU", flush=True)
    return True


def run_here(arguments: argparse.Namespace) -> None:
    """The one run that the arguments name, in this process."""
    (name,), (env_id,), (seed,) = arguments.rungs, arguments.envs, arguments.seeds
    n_timesteps, rung = QUICK_STEPS if arguments.quick else BUDGETS[env_id], RUNGS[name]
    about = {"algorithm": name, "base": rung.base, "env": env_id, "seed": seed, "timesteps": n_timesteps, "sources": sources()}
    with put_in_place(rung.theirs):
        run = learn(rung.base, env_id, seed, n_timesteps, rung.setting)
    run.about["setting"]["theirs"] = [*rung.theirs]
    whole = Run({**about, **run.about, "versions": versions_on(arguments.machine)}, run.rows)
    write(whole, path_of(arguments.folder, name, env_id, seed))


def pack_all(folder: Path) -> None:
    for rung in RUNGS:
        single = sorted((folder / rung).glob("*/*.csv"))
        if single:
            pack(runs_of(folder, rung), packed_path(folder, rung))
            for path in single:
                path.unlink()
            print(packed_path(folder, rung))


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "pack", "report", "one"], help="'one' is what 'run' starts")
    parser.add_argument("--rungs", nargs="+", choices=[*RUNGS], default=[*RUNGS])
    parser.add_argument("--envs", nargs="+", choices=[*MUJOCO], default=[*MUJOCO])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(200, 210)])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--machine", metavar="WORDS", help="put behind the processor's name")
    arguments = parser.parse_args()
    if arguments.quick and arguments.command is None:
        vars(arguments).update(QUICK)
    arguments.folder = arguments.out / ("ladder-quick" if arguments.quick else "ladder")
    return arguments


def main() -> None:
    arguments = parse()
    set_up()
    if arguments.command == "one":
        run_here(arguments)
        return
    complete = arguments.command in ("report", "pack") or run_all(arguments)
    if arguments.command in (None, "pack"):
        pack_all(arguments.folder)
    if arguments.command in (None, "report"):
        from _ladder_report import report

        random = (arguments.out / "learning" / RANDOM).glob("*/0.csv")
        report([*all_runs(arguments.folder), *map(read, random)], arguments.folder)
    if not complete:
        sys.exit("some runs failed")


if __name__ == "__main__":
    main()
