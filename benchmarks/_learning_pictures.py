"""Learning curves and performance profiles, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from _measure import new_figure, save_figure
from _results import LEAST_SEEDS, Curves, Pair, Results
from _scores import Statistic, interval, performance_profile
from matplotlib.axes import Axes

LEVELS = np.linspace(0.0, 4.0, 81)
OURS, THEIRS = ("TRPOExt", "tab:blue"), ("sb3_contrib.TRPO", "tab:orange")
STYLES = {
    "trpo_ext_zoo": (*OURS, "", "-"),
    "sb3_contrib_zoo": (*THEIRS, "", "-"),
    "trpo_ext_default": (*OURS, ", defaults", ":"),
    "sb3_contrib_default": (*THEIRS, ", defaults", ":"),
    "trpo_ext_default_norm": (*OURS, ", defaults, normalised", "--"),
    "sb3_contrib_default_norm": (*THEIRS, ", defaults, normalised", "--"),
}
"""Library, its one colour, with which settings, and their line."""


def style_of(name: str) -> dict[str, str]:
    library, color, settings, line = STYLES[name]
    return {"color": color, "ls": line, "label": library + settings}


def mean_with_interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs and the 95% interval of its bootstrap, (points,) each, of (runs, points)."""
    rows = np.random.default_rng(0).integers(0, len(returns), (2000, len(returns)))
    low, high = np.percentile(returns[rows].mean(axis=1), [2.5, 97.5], axis=0)
    return returns.mean(axis=0), low, high


def draw_curve(ax: Axes, x: np.ndarray, curves: Curves, name: str) -> None:
    mean, low, high = mean_with_interval(curves.returns)
    style = style_of(name)
    ax.plot(x, mean, lw=1.5, **{**style, "label": f"{style['label']} ({len(curves.returns)} seeds)"})
    if len(curves.returns) >= LEAST_SEEDS:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)


def draw_curves(results: Results, pairs: Sequence[Pair], env_ids: Sequence[str], folder: Path, name: str) -> Path | None:
    """Return against steps above, and against wall-clock time below, of the runs on one processor.

    One column for each environment that was run; the picture, or None if there is none.
    """
    names = [(pair, algorithm) for pair in pairs for algorithm in (pair.reference, pair.ours)]
    shown = [env_id for env_id in env_ids if any(results.seeds(algorithm, env_id) for _, algorithm in names)]
    if not shown:
        return None
    drawing, axes = new_figure(3.4 * len(shown), 6.4, 2, len(shown))
    for column, env_id in enumerate(shown):
        for pair, algorithm in names:
            if results.seeds(algorithm, env_id):
                curves = results.curves(algorithm, env_id)
                draw_curve(axes[0, column], curves.timesteps, curves, algorithm)
            timed = results.timed(pair, *results.together(pair, env_id, env_ids))
            if timed is not None:
                curves = results.curves(algorithm, env_id, timed.seeds[algorithm])
                draw_curve(axes[1, column], curves.seconds["wall"].mean(axis=0), curves, algorithm)
                axes[1, column].set(title=f"on {timed.cpu}")
        axes[0, column].set(title=env_id, xlabel="timesteps")
        axes[1, column].set(xlabel="seconds of training")
        for ax in axes[:, column]:
            ax.grid(alpha=0.3)
            if ax.lines:
                ax.legend(fontsize="small", loc="lower right")
            else:
                ax.text(0.5, 0.5, "no common processor", ha="center", va="center", transform=ax.transAxes)
    for ax in axes[:, 0]:
        ax.set_ylabel("return, mean and 95% interval")
    return save_figure(drawing, folder, name)


def on_itself(statistic: Statistic, reference: np.ndarray) -> np.ndarray | float:
    """A statistic of scores against a reference, of the reference's own scores."""
    return statistic(reference, reference)


def draw_profile(ax: Axes, name: str, profile_of: Statistic, *samples: np.ndarray) -> None:
    profile = interval(profile_of, *samples, effort=0.1)
    ax.plot(LEVELS, profile.estimate, **style_of(name))
    ax.fill_between(LEVELS, profile.low, profile.high, color=STYLES[name][1], alpha=0.2, lw=0)


def draw_profiles(
    results: Results, pairs: Sequence[Pair], groups: Mapping[str, Sequence[str]], folder: Path, name: str
) -> Path | None:
    """Share of runs above a normalised score, for every pair and group with runs; the picture, or None if there is none."""
    shown = [(pair, group, env_ids) for group in groups for pair in pairs if (env_ids := results.summed(pair, groups[group]))]
    if not shown:
        return None
    drawing, axes = new_figure(5.0 * len(shown), 4.0, 1, len(shown))
    for ax, (pair, group, env_ids) in zip(axes[0], shown, strict=True):
        reference, random = results.finals(pair.reference, env_ids), results.random(env_ids)
        profile_of = partial(performance_profile, random=random, levels=LEVELS)
        draw_profile(ax, pair.reference, partial(on_itself, profile_of), reference)
        draw_profile(ax, pair.ours, profile_of, results.finals(pair.ours, env_ids), reference)
        ax.set(title=f"{group}: {', '.join(env_ids)}" if len(env_ids) < 3 else group, xlabel="normalised score")
        ax.set_ylabel("share of runs above it")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    return save_figure(drawing, folder, name)
