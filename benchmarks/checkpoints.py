"""What checkpoints cost: the share of training time on HalfCheetah-v5 with default arguments, and their size.

    python benchmarks/checkpoints.py [--quick] [--every 10] [--out DIR]

Time is measured within one run: that spent saving over that of all iterations. The first checkpoint and the last,
which there are once a run, are told apart.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _measure import Stopwatch, argument_parser, print_table, set_up, write_json
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_trpo_ext import Checkpoints, SnapshotWrapper, TRPOExt

BAR = 0.02
CASES: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {"env": "HalfCheetah-v5", "n_envs": 1},
    "HalfCheetah-v5, 8 environments": {"env": "HalfCheetah-v5", "n_envs": 8},
    "CartPole-v1": {"env": "CartPole-v1", "n_envs": 1},
}


def measure(env: str, n_envs: int, every: int, iterations: int) -> dict[str, float]:
    """Seconds and bytes of one run."""
    with TemporaryDirectory() as folder:
        out = Path(folder)
        venv = make_vec_env(env, n_envs, seed=0, wrapper_class=SnapshotWrapper, monitor_dir=folder)
        model = TRPOExt("MlpPolicy", venv, seed=0, device="cpu")
        model.set_logger(configure(folder, ["csv", "tensorboard"]))
        stopwatch, checkpoints = Stopwatch(), Checkpoints(out / "checkpoints", every=every)
        checkpoints.save = stopwatch.timed("saving", checkpoints.save)  # type: ignore[method-assign]
        model.train = stopwatch.timed("update", model.train)  # type: ignore[method-assign]
        model.collect_rollouts = stopwatch.timed("rollout", model.collect_rollouts)  # type: ignore[method-assign]
        started = time.perf_counter()
        model.learn(iterations * model.n_steps * n_envs, checkpoints)
        seconds = time.perf_counter() - started
        size = max(path.stat().st_size for path in (out / "checkpoints").glob("*.checkpoint"))
        saves = iterations // every
        return {
            "milliseconds a checkpoint": 1e3 * stopwatch.seconds["saving"] / saves,
            "seconds of an iteration": (seconds - stopwatch.seconds["saving"]) / iterations,
            "share": stopwatch.seconds["saving"] / (seconds - stopwatch.seconds["saving"]),
            "kilobytes": size / 1e3,
        }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--every", type=int, default=10)
    arguments = parser.parse_args()
    set_up()
    every, rounds = (1, 2) if arguments.quick else (arguments.every, 3)
    results = {name: measure(**case, every=every, iterations=rounds * every) for name, case in CASES.items()}
    rows = [
        (
            name,
            f"{figures['milliseconds a checkpoint']:.1f}",
            f"{figures['seconds of an iteration']:.2f}",
            f"{100 * figures['share']:.2f} %",
            f"{figures['kilobytes']:.0f}",
            ("met" if figures["share"] <= BAR else "missed") if name == "HalfCheetah-v5" and every == 10 else "",
        )
        for name, figures in results.items()
    ]
    header = ("", "ms a checkpoint", "s an iteration", f"share at every={every}", "kB", f"bar: {BAR:.0%}")
    print_table("Checkpoints", header, rows)
    write_json(arguments.out, "checkpoints", arguments, {"results": results})


if __name__ == "__main__":
    main()
