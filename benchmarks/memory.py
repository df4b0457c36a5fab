"""Peak memory of one update with CnnPolicy on Atari-sized observations, against sb3_contrib.TRPO.

    python benchmarks/memory.py [--quick] [--out DIR]

Each figure comes from a process of its own: the rollout buffer is filled with random frames, the
kernel's high-water mark is reset, and ``train()`` is called once. What counts is how far the
resident set rose above where it was before the call. The C library keeps some of what was freed, in
a way that hides how memory depends on the chunk, so chunk sizes are compared with an allocator that
gives every large block back at once ("live"). Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _measure import (
    OURS,
    REFERENCE,
    Comparison,
    SpacesOnly,
    Spread,
    argument_parser,
    figure,
    fill_rollout_buffer,
    interleave,
    new_figure,
    print_comparisons,
    print_table,
    save_figure,
    seconds,
    set_up,
    write_json,
)
from gymnasium import spaces
from matplotlib.axes import Axes
from sb3_contrib import TRPO

from sb3_trpo_ext import TRPOExt

FRAMES = (84, 84, 4)
LIBRARIES: dict[str, Any] = {REFERENCE: TRPO, OURS: TRPOExt}
BAR = 1.0
STRETCH = 2.0


@dataclass(frozen=True)
class Variant:
    """One way to update: the library, its arguments, and whether freed memory is given back at once."""

    name: str
    library: str
    arguments: dict[str, Any]
    live: bool = False


VARIANTS = (
    Variant(REFERENCE, REFERENCE, {}),
    Variant(f"{OURS}, defaults", OURS, {}),
    Variant(f'{OURS}, critic="gauss_newton"', OURS, {"critic": "gauss_newton"}),
    Variant(f"{REFERENCE}, live", REFERENCE, {}, live=True),
    Variant(f"{OURS}, live, defaults", OURS, {}, live=True),
    *(Variant(f"{OURS}, live, chunk_size={n}", OURS, {"chunk_size": n}, live=True) for n in (128, 256, 512, 1024)),
)
QUICK = (*VARIANTS[:3], *VARIANTS[5:7])
LARGE_BLOCK = 2**20


class Usage(NamedTuple):
    """Of one update: MB above the start, and seconds."""

    megabytes: float
    seconds: float


# -- in the process that is measured ---------------------------------------------------------------------


def make_model(variant: Variant, n_states: int, cg_steps: int) -> Any:
    """A model with a full rollout buffer."""
    env = SpacesOnly(spaces.Box(0, 255, FRAMES, np.uint8), spaces.Discrete(6))
    algorithm = LIBRARIES[variant.library]
    model = algorithm("CnnPolicy", env, n_steps=n_states, seed=0, device="cpu", cg_max_steps=cg_steps, **variant.arguments)
    fill_rollout_buffer(model)
    return model


def measure_here(variant: Variant, n_states: int, cg_steps: int) -> Usage:
    """What one update takes in this process."""
    # first uses import and allocate things that have nothing to do with the batch
    make_model(variant, 32, 2).train()
    model = make_model(variant, n_states, cg_steps)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_status("VmRSS")
    duration = seconds(model.train)
    return Usage(memory_status("VmHWM") - before, duration)


def memory_status(field: str) -> float:
    """A field of this process's status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024.0
    raise RuntimeError(f"no {field} in /proc/self/status")


# -- in the process that compares --------------------------------------------------------------------------


def measure(variant: Variant, n_states: int, cg_steps: int) -> Usage:
    """What one update takes in a new process."""
    command = [sys.executable, __file__, "--variant", variant.name, "--states", str(n_states), "--cg-steps", str(cg_steps)]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK)} if variant.live else {})}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return Usage(*json.loads(output.splitlines()[-1]))


def measure_all(variants: Sequence[Variant], n_states: int, cg_steps: int, repeats: int) -> dict[str, list[Usage]]:
    """The variants in turns."""
    usages: dict[str, list[Usage]] = {variant.name: [] for variant in variants}

    def turn_of(variant: Variant) -> Callable[[int], float]:
        def turn(repeat: int) -> float:
            usage = measure(variant, n_states, cg_steps)
            usages[variant.name].append(usage)
            return usage.megabytes

        return turn

    # each process warms up by itself
    interleave({variant.name: turn_of(variant) for variant in variants}, repeats, warm_up=False)
    return usages


def compare(usages: dict[str, list[Usage]], n_states: int) -> list[Comparison]:
    """Ours as users meet it; the live ones show how memory depends on the chunk."""
    return [
        Comparison(
            f"train(), {n_states:,} frames, {variant.name}",
            "MB",
            megabytes(usages[variant.name]),
            megabytes(usages[REFERENCE]),
            BAR,
        )
        for variant in VARIANTS
        if variant.library == OURS and not variant.live
    ]


def megabytes(usages: list[Usage]) -> list[float]:
    return [usage.megabytes for usage in usages]


def print_usages(usages: dict[str, list[Usage]], n_states: int) -> None:
    # both libraries read the whole batch out of the buffer, which makes a copy
    copied = n_states * np.prod(FRAMES) / 2**20
    rows = [
        (
            variant.name,
            Spread.of(megabytes(usages[variant.name])),
            figure(value - copied for value in megabytes(usages[variant.name])),
            figure(usage.seconds for usage in usages[variant.name]),
        )
        for variant in VARIANTS
        if variant.name in usages
    ]
    header = ("", "peak above start, MB (min-max)", f"less the batch's {copied:.0f} MB of frames", "seconds")
    print_table(f"One update on {n_states:,} frames", header, rows)


def draw(ax: Axes, usages: dict[str, list[Usage]], n_states: int) -> None:
    shown = [variant for variant in VARIANTS if variant.name in usages]
    for row, variant in enumerate(shown):
        median, low, high = Spread.of(megabytes(usages[variant.name]))
        color = "tab:gray" if variant.library == REFERENCE else "tab:blue"
        ax.barh(row, median, xerr=[[median - low], [high - median]], color=color, capsize=3, height=0.6)
    ax.set_yticks(range(len(shown)), [variant.name for variant in shown])
    ax.invert_yaxis()
    reference = Spread.of(megabytes(usages[REFERENCE])).median
    for ratio, label in ((BAR, "goal"), (STRETCH, "further goal")):
        ax.axvline(reference / ratio, color="tab:red", ls="-" if ratio == BAR else ":", label=label)
    ax.set(xlabel="MB above the start", title=f"Peak memory of one update, CnnPolicy, {n_states:,} frames 84x84x4")
    ax.legend(loc="lower right")


def arguments_of_program() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--states", type=int, help="frames in the batch (4096; 256 with --quick)")
    parser.add_argument("--cg-steps", type=int, help="cg_max_steps of both (15; 2 with --quick): time, hardly memory")
    parser.add_argument("--repeats", type=int, help="processes of each variant (3; 1 with --quick)")
    parser.add_argument("--variant", choices=[variant.name for variant in VARIANTS], help="measure this one, here")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.states = arguments.states or (256 if quick else 4096)
    arguments.cg_steps = arguments.cg_steps or (2 if quick else 15)
    arguments.repeats = arguments.repeats or (1 if quick else 3)
    return arguments


def main() -> None:
    arguments = arguments_of_program()
    set_up()
    if arguments.variant is not None:
        chosen = next(variant for variant in VARIANTS if variant.name == arguments.variant)
        print(json.dumps(measure_here(chosen, arguments.states, arguments.cg_steps)))
        return
    usages = measure_all(QUICK if arguments.quick else VARIANTS, arguments.states, arguments.cg_steps, arguments.repeats)
    comparisons = compare(usages, arguments.states)
    print_usages(usages, arguments.states)
    print_comparisons(f"Peak memory (further goal: {STRETCH:.2f})", comparisons)
    content = {
        "usages": {name: [usage._asdict() for usage in figures] for name, figures in usages.items()},
        "comparisons": [comparison.as_json() for comparison in comparisons],
    }
    write_json(arguments.out, "memory", arguments, content)
    drawing, axes = new_figure(10, 5)
    draw(axes[0, 0], usages, arguments.states)
    save_figure(drawing, arguments.out, "memory")


if __name__ == "__main__":
    main()
