"""What the benchmark programs share: taking turns, ratios with their spread, tables, JSON, pictures."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import sb3_trpo_ext

REFERENCE = "sb3_contrib"
OURS = "sb3_trpo_ext"

PACKAGES = ("stable_baselines3", "sb3_contrib", "rl_zoo3", "torch", "numpy", "gymnasium", "mujoco")


# -- programs ------------------------------------------------------------------------------------------


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every program takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, only to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and PNG files")
    return parser


def set_up() -> None:
    """One thread, no warnings of the libraries about unusual arguments."""
    th.set_num_threads(1)
    warnings.simplefilter("ignore")


def initial_std_of_sb3(algorithm: type[OnPolicyAlgorithm]) -> dict[str, Any]:
    """The argument with which the actions of a new policy of ours start with the same spread as SB3's."""
    return {"initial_std": None} if issubclass(algorithm, sb3_trpo_ext.TRPOExt) else {}


# -- measuring -----------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleave(turns: dict[str, Callable[[int], float]], repeats: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Measure in turns, A B A B …, so that a change of the machine's speed meets all alike.

    :param turns: by name, number of the repeat ↦ one figure
    :param warm_up: take one turn each that does not count
    """
    if warm_up:
        for turn in turns.values():
            turn(0)
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats):
        for name, turn in turns.items():
            gc.collect()
            figures[name].append(turn(repeat))
    return figures


class Stopwatch:
    """Adds up the time spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time added to ``name``."""

        def timed_function(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed_function


class Spread(NamedTuple):
    """The middle and the ends of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        figures = list(figures)
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Comparison:
    """One quantity of ours against a reference, measured in the same turns.

    :param name: what was measured
    :param unit: of the figures
    :param ours: one figure a repeat
    :param reference: one figure a repeat
    :param bar: the least median ratio, None if there is nothing to reach
    :param more_is_better: whether the ratio is ours / reference, as for speeds, or the other way round
    :param against: who the reference is
    """

    name: str
    unit: str
    ours: list[float]
    reference: list[float]
    bar: float | None = None
    more_is_better: bool = False
    against: str = REFERENCE

    @property
    def ratio(self) -> Spread:
        """How many times better ours is; each ratio is taken within one repeat."""
        pairs = zip(self.ours, self.reference, strict=True)
        return Spread.of(ours / other if self.more_is_better else other / ours for ours, other in pairs)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "met" if self.ratio.median >= self.bar else "missed"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio._asdict(), "verdict": self.verdict}


# -- printing and writing --------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column to the left and the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"\n{title}\n\n{markdown_table(header, rows)}", flush=True)


def print_comparisons(title: str, comparisons: Sequence[Comparison], measured: str = OURS) -> None:
    """Medians of both sides, the ratio with its spread, and the bar.

    :param measured: what the side that is compared with the reference is called
    """
    rows = [
        (
            f"{comparison.name}, {comparison.unit}",
            figure(comparison.reference),
            figure(comparison.ours),
            comparison.ratio,
            "" if comparison.bar is None else f">= {comparison.bar:.2f}",
            comparison.verdict,
        )
        for comparison in comparisons
    ]
    others = {comparison.against for comparison in comparisons}
    header = ("", others.pop() if len(others) == 1 else "reference", measured, "ratio (min-max)", "bar", "")
    print_table(title, header, rows)


def figure(figures: Iterable[float]) -> str:
    """The median, to four digits."""
    return f"{statistics.median(figures):.4g}"


def versions() -> dict[str, Any]:
    """What the figures were measured with and on."""
    return {
        "python": platform.python_version(),
        OURS: sb3_trpo_ext.__version__,
        **{package: metadata.version(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "threads": th.get_num_threads(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_json(out: Path, name: str, arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    """``NAME.json``: figures, arguments and versions."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    document = {"arguments": settings, "versions": versions(), **content}
    path = out / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{path}")


# -- pictures --------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure without pyplot, and its axes (rows, columns)."""
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots(rows, columns, squeeze=False)


def save_figure(drawing: Figure, out: Path, name: str) -> Path:
    """``NAME.png``, and where it is."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    drawing.savefig(path, dpi=130)
    print(path)
    return path


def draw_ratios(ax: Axes, comparisons: Sequence[Comparison], title: str) -> None:
    """A bar for each ratio with its spread, a mark at what was to be reached."""
    for row, comparison in enumerate(comparisons):
        median, low, high = comparison.ratio
        ax.barh(row, median, xerr=[[median - low], [high - median]], color="tab:blue", alpha=0.8, capsize=3, height=0.6)
        if comparison.bar is not None:
            label = None if ax.get_legend_handles_labels()[1] else "bar"
            ax.plot([comparison.bar] * 2, [row - 0.4, row + 0.4], color="tab:red", lw=2, label=label)
    ax.axvline(1.0, color="grey", lw=0.8, ls=":")
    ax.set_yticks(range(len(comparisons)), [comparison.name for comparison in comparisons])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("ratio: median, least and greatest of the repeats")
    ax.set_title(title)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()


# -- data without an environment -------------------------------------------------------------------------


class SpacesOnly(gym.Env):
    """Observation and action spaces for a model whose rollout buffer is filled by hand."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


@th.no_grad()
def fill_rollout_buffer(model: OnPolicyAlgorithm, seed: int = 0, rows: int = 64) -> None:
    """Random observations and rewards of one environment; the policy's own actions and values.

    :param rows: states in one pass, few so that the heap stays small
    """
    rng, buffer = np.random.default_rng(seed), model.rollout_buffer
    th.manual_seed(seed)
    buffer.reset()
    for start in range(0, buffer.buffer_size, rows):
        part = slice(start, min(start + rows, buffer.buffer_size))
        observations = _random_observations(rng, buffer.observations[part, 0])
        actions, values, log_probs = model.policy(th.as_tensor(observations))
        buffer.observations[part, 0] = observations
        buffer.actions[part, 0] = actions.numpy().reshape(len(observations), -1)
        buffer.values[part, 0] = values.numpy().flatten()
        buffer.log_probs[part, 0] = log_probs.numpy()
    buffer.rewards[:] = rng.standard_normal(buffer.rewards.shape)
    buffer.episode_starts[:] = rng.random(buffer.episode_starts.shape) < 0.005
    buffer.compute_returns_and_advantage(last_values=th.zeros(1), dones=np.zeros(1))
    buffer.pos, buffer.full = buffer.buffer_size, True
    model.set_logger(Logger(None, []))


def _random_observations(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    if like.dtype == np.uint8:
        return rng.integers(0, 256, like.shape, dtype=np.uint8)
    # entries of very different sizes, as a robot's are: with all alike, conjugate gradient would stop early
    scales = np.logspace(-1.0, 1.0, like.shape[1])
    return (scales * rng.standard_normal(like.shape)).astype(like.dtype)
