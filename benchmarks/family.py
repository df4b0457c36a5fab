"""The family side by side: NPGExt, KLPPOExt, TRPOExt and SB3's PPO, with their Zoo files' settings or default arguments.

    python benchmarks/family.py run
    python benchmarks/family.py report

The runs are those of ``learning.py``: 100k steps, one process and one file a run, resumable. A run's score is the mean
return of 20 deterministic episodes with the last policy. Without either word both are done.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import learning
from _measure import argument_parser, print_table, set_up, write_json
from _runs import path_of, read


class Row(NamedTuple):
    """One algorithm on one environment.

    :param bar: what the mean of every seed's last policy is to reach; None: shown for comparison
    """

    env_id: str
    algorithm: str
    bar: float | None = None


TABLE = (
    Row("CartPole-v1", "npg_ext_zoo", 475.0),
    Row("CartPole-v1", "kl_ppo_ext_zoo", 475.0),
    Row("CartPole-v1", "sb3_ppo_zoo"),
    Row("CartPole-v1", "trpo_ext_zoo"),
    Row("CartPole-v1", "kl_ppo_ext_4x256", 475.0),
    Row("CartPole-v1", "sb3_ppo_4x256"),
    Row("Pendulum-v1", "kl_ppo_ext_zoo", -250.0),
    Row("Pendulum-v1", "sb3_ppo_zoo"),
    Row("Pendulum-v1", "npg_ext_zoo"),
    Row("Pendulum-v1", "trpo_ext_zoo"),
)
QUICK = (Row("CartPole-v1", "npg_ext_zoo"), Row("CartPole-v1", "kl_ppo_ext_zoo"))


def run(arguments: argparse.Namespace, table: tuple[Row, ...]) -> bool:
    """Run what is missing of each row; whether all of it came to its end."""
    settings = {**vars(arguments), "conf_file": None, "machine": None}
    return all([learning.run_all(argparse.Namespace(**settings, envs=[row.env_id], algos=[row.algorithm])) for row in table])


def report(arguments: argparse.Namespace, table: tuple[Row, ...]) -> None:
    """Every seed's last policy, and whether all of them reach the bar."""
    lines, results = [], []
    for row in table:
        paths = [path_of(arguments.folder, row.algorithm, row.env_id, seed) for seed in arguments.seeds]
        scores = [read(path).final if path.exists() else None for path in paths]
        there = [score for score in scores if score is not None]
        verdict = "" if row.bar is None or len(there) < len(scores) else "met" if min(there) >= row.bar else "missed"
        shown = ["not run" if score is None else f"{score:.1f}" for score in scores]
        mean = f"{sum(there) / len(there):.1f}" if there else ""
        lines.append((f"{row.env_id}, {row.algorithm}", *shown, mean, "" if row.bar is None else f">= {row.bar:g}", verdict))
        results.append({**row._asdict(), "scores": dict(zip(arguments.seeds, scores, strict=True)), "verdict": verdict})
    header = ("last policy, 20 episodes", *(f"seed {seed}" for seed in arguments.seeds), "mean", "every seed", "")
    print_table("The family at 100k steps", header, lines)
    write_json(arguments.out, "family", argparse.Namespace(seeds=arguments.seeds), {"rows": results})


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "report"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(5)])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments = parser.parse_args()
    arguments.folder = arguments.out / ("learning-quick" if arguments.quick else "learning")
    table = TABLE
    if arguments.quick:
        table, arguments.seeds = QUICK, [0]
    set_up()
    complete = arguments.command == "report" or run(arguments, table)
    if arguments.command != "run":
        report(arguments, table)
    if not complete:
        sys.exit("some runs failed")


if __name__ == "__main__":
    main()
