"""Runs that are killed and started again, against the same run in one go: bit for bit, wall-clock columns apart.

    python benchmarks/kill_and_resume.py [--quick] [--kills 30] [--case NAME ...] [--out DIR]

A process trains with ``Checkpoints``; it is killed (SIGKILL) at a random moment of a rollout, of its branches, of an
update or of the writing of a checkpoint, and started again, until it has been killed so many times and has come to its
end. What is compared: parameters, optimizer, statistics, simulators, random generators, and the rows of progress.csv,
TensorBoard, Monitor files and evaluations.npz.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _measure import argument_parser, print_table, set_up, write_json
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_trpo_ext import Checkpoints, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.checkpoints import folder as folders
from sb3_trpo_ext.checkpoints.plain_data import dumps
from sb3_trpo_ext.sampling.lanes import Lanes

PHASES = ("between", "rollout", "branches", "update", "writing")
EVERY = 2
_WALL_CLOCK = ("time/fps", "time/time_elapsed")


# -- the runs --------------------------------------------------------------------------------------------


def cartpole(out: Path) -> TRPOExt:
    env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=SnapshotWrapper, monitor_dir=str(out / "monitor"))
    return TRPOExt("MlpPolicy", env, n_steps=128, seed=0, device="cpu")


def hopper(out: Path) -> TRPOExt:
    env = make_vec_env("Hopper-v5", 2, seed=0, wrapper_class=SnapshotWrapper, monitor_dir=str(out / "monitor"))
    return TRPOExt("MlpPolicy", VecNormalize(env), n_steps=128, critic="adam", seed=0, device="cpu")


def vine_run(out: Path) -> TRPOExt:
    env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=SnapshotWrapper, monitor_dir=str(out / "monitor"))
    branches = {"n_rollout_states": 16, "n_branch_actions": "all", "branch_length": 20}
    buffer = {"rollout_buffer_class": VineRolloutBuffer, "rollout_buffer_kwargs": branches}
    return TRPOExt("MlpPolicy", env, n_steps=64, seed=0, device="cpu", **buffer)  # type: ignore[arg-type]


CASES: dict[str, Callable[[Path], TRPOExt]] = {"CartPole-v1": cartpole, "Hopper-v5, VecNormalize": hopper, "vine": vine_run}


def evaluation(model: TRPOExt) -> VecEnv:
    """Not wrapped, as few people would."""
    assert model.env is not None
    env = make_vec_env("Hopper-v5" if isinstance(model.env, VecNormalize) else "CartPole-v1", 1, seed=100)
    return VecNormalize(env, training=False, norm_reward=False) if isinstance(model.env, VecNormalize) else env


def train(case: str, out: Path, iterations: int) -> None:
    """The script: the first start and the tenth are the same."""
    model = CASES[case](out)
    model.set_logger(configure(str(out / "log"), ["csv", "tensorboard"]))
    evaluate = EvalCallback(evaluation(model), eval_freq=300, n_eval_episodes=1, log_path=str(out), verbose=0)
    checkpoints = Checkpoints(out / "checkpoints", every=EVERY)
    assert model.env is not None
    per_iteration = model.n_steps * model.n_envs + (16 * 2 * 20 if case == "vine" else 0)
    model.learn(iterations * per_iteration, [evaluate, checkpoints])


# -- who kills whom ----------------------------------------------------------------------------------------


class Board:
    """What a process shows its killer: the phase it is in, and how often and how long it has been in each."""

    _FORMAT = struct.Struct("B" + "d" * 2 * len(PHASES))

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._FORMAT.size)
        self.clear()

    def clear(self) -> None:
        self._write([0, *[0.0] * 2 * len(PHASES)])

    def _write(self, values: list[Any]) -> None:
        self._memory[:] = self._FORMAT.pack(*values)

    def read(self) -> tuple[str, dict[str, float], dict[str, float]]:
        phase, *figures = self._FORMAT.unpack(self._memory[:])
        return PHASES[phase], dict(zip(PHASES, figures[::2], strict=True)), dict(zip(PHASES, figures[1::2], strict=True))

    @contextmanager
    def showing(self, phase: str) -> Iterator[None]:
        values = list(self._FORMAT.unpack(self._memory[:]))
        before, index = values[0], PHASES.index(phase)
        values[0] = index
        values[1 + 2 * index] += 1
        self._write(values)
        started = time.perf_counter()
        yield
        values = list(self._FORMAT.unpack(self._memory[:]))
        values[0] = before
        values[2 + 2 * index] += time.perf_counter() - started
        self._write(values)

    def shows(self, owner: Any, method: str, phase: str) -> None:
        original = getattr(owner, method)

        def shown(*args: Any, **kwargs: Any) -> Any:
            with self.showing(phase):
                return original(*args, **kwargs)

        setattr(owner, method, shown)


def start(case: str, out: Path, iterations: int, board: Board) -> int:
    """A process that trains; its number."""
    board.clear()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        board.shows(TRPOExt, "collect_rollouts", "rollout")
        board.shows(Lanes, "run", "branches")
        board.shows(TRPOExt, "train", "update")
        board.shows(folders.Folder, "write", "writing")
        os.fsync = _slowly(os.fsync)
        train(case, out, iterations)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _slowly(sync: Callable[[int], None]) -> Callable[[int], None]:
    """A slow disk, so that kills meet the writing."""

    def slow(descriptor: int) -> None:
        time.sleep(0.01)
        sync(descriptor)
        time.sleep(0.01)

    return slow


def has_ended(process: int) -> bool:
    ended, status = os.waitpid(process, os.WNOHANG)
    if ended and status != 0:
        raise RuntimeError(f"the training failed, status {status}")
    return ended != 0


def kill_in(process: int, board: Board, phase: str, entry: int, fraction: float, usual: dict[str, float]) -> str | None:
    """Kill a process once it has been in a phase so many times, so far into it; the phase it died in, if it did."""
    while True:
        if has_ended(process):
            return None
        now, entries, _ = board.read()
        if now == phase and entries[phase] >= entry:
            time.sleep(fraction * usual[phase])
            os.kill(process, signal.SIGKILL)
            if os.waitpid(process, 0)[1] == 0:
                return None  # it was faster
            return board.read()[0]
        time.sleep(0.0002)


# -- the comparison ------------------------------------------------------------------------------------------


def outcome(out: Path) -> dict[str, bytes]:
    """All that must be equal, by name."""
    folder = folders.Folder(out / "checkpoints")
    parts = folder.read(folder.positions()[0])["parts"]
    for episode in parts["algorithm"]["ep_info_buffer"]:
        del episode["t"]
    compared = {name: dumps(parts[name]) for name in ("policy", "algorithm", "environments", "callbacks", "generators")}
    compared["progress"] = repr(parts["progress"]["iterations"]).encode()
    table = pd.read_csv(out / "log" / "progress.csv").drop(columns=[*_WALL_CLOCK], errors="ignore")
    own_clock = [name for name in table if name.endswith("_seconds")]
    table = table.drop(columns=own_clock)
    compared["progress.csv"] = table[sorted(table)].to_csv().encode()
    for path in sorted((out / "monitor").glob("*.monitor.csv")):
        rows = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()[1:]]
        compared[path.name] = "\n".join(rows).encode()
    with np.load(out / "evaluations.npz") as evaluations:
        compared["evaluations.npz"] = b"".join(evaluations[name].tobytes() for name in sorted(evaluations))
    events = sorted(scalar for path in (out / "log").glob("events*") for scalar in scalars(path))
    compared["TensorBoard"] = repr(events).encode()
    return compared


def scalars(path: Path) -> list[tuple[str, int, float]]:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if name not in _WALL_CLOCK and not name.endswith("_seconds")]
    return [(name, event.step, event.value) for name in names for event in events.Scalars(name)]


def killed(case: str, root: Path, iterations: int, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many times; how it went."""
    board, rng, died_in = Board(), random.Random(seed), Counter[str]()
    warm_up = CASES[case](root / "warm-up")  # loads what torch loads late, which processes then have from the start
    assert warm_up.env is not None
    warm_up.env.close()
    reference = root / "reference"
    process = start(case, reference, iterations, board)
    while not has_ended(process):
        time.sleep(0.01)
    _, entries, seconds = board.read()
    usual = {phase: seconds[phase] / max(entries[phase], 1) for phase in PHASES}
    expected, different, runs = outcome(reference), Counter[str](), 0
    phases = [phase for phase in PHASES[1:] if entries[phase]]
    while True:
        out = root / f"run {runs}"
        done = sum(died_in.values()) >= kills
        phase = phases[sum(died_in.values()) % len(phases)]
        process = start(case, out, iterations, board)
        entry = 10**9 if done else rng.randint(1, 2 + iterations // 8)
        where = kill_in(process, board, phase, entry, rng.random(), usual)
        if where is not None:
            died_in[where] += 1
            continue
        runs += 1
        found = outcome(out)
        different.update(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if done:
            return {"kills": sum(died_in.values()), "died in": dict(died_in), "runs": runs, "different": dict(different)}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {phase}" for phase, count in counts.items())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of each run")
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_up()
    kills, iterations = (3, 8) if arguments.quick else (arguments.kills, 24)
    results = {}
    for case in arguments.case:
        root = Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
        results[case] = killed(case, root, iterations, kills, arguments.seed)
        shutil.rmtree(root)
    header = ("run", "kills", "died in", "complete runs compared", "different in")
    rows = [
        (
            case,
            r["kills"],
            ", ".join(f"{n} {phase}" for phase, n in r["died in"].items()),
            r["runs"],
            r["different"] or "nothing",
        )
        for case, r in results.items()
    ]
    print_table("Killed and resumed", header, rows)
    write_json(arguments.out, "kill_and_resume", arguments, {"results": results})
    if any(result["different"] for result in results.values()):
        sys.exit("runs that were killed and resumed differ from those that were not")


if __name__ == "__main__":
    main()
