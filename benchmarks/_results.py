"""Learning runs, gathered: who is compared with whom, what was run, and how long it took to get there."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from _runs import CLASSIC, MUJOCO, RANDOM, Run
from _scores import Interval, interval, time_to_reach

LEAST_SEEDS = 3
"""Below, a table shows the returns and claims nothing."""
NEVER = 1e3
"""A ratio of times that stands for "not reached": finite, so that a bootstrap can go on."""


class Pair(NamedTuple):
    """Whom we compare with whom."""

    title: str
    ours: str
    reference: str


PAIRS = (
    Pair("the Zoo files' settings", "trpo_ext_zoo", "sb3_contrib_zoo"),
    Pair("default arguments", "trpo_ext_default", "sb3_contrib_default"),
    Pair("default arguments, normalised observations", "trpo_ext_default_norm", "sb3_contrib_default_norm"),
)
GROUPS = {"MuJoCo": [*MUJOCO], "Classic control and Box2D": [*CLASSIC]}
SEEDS = {PAIRS[0]: 10, PAIRS[1]: 5, PAIRS[2]: 5}
"""How many seeds are to be run of each."""


class Curves(NamedTuple):
    """Runs of one algorithm on one environment.

    :param timesteps: (points,)
    :param seconds: of training, by "wall" and "cpu", (runs, points) each
    :param returns: (runs, points)
    """

    timesteps: np.ndarray
    seconds: dict[str, np.ndarray]
    returns: np.ndarray


class Results:
    """Runs by algorithm, environment and seed.

    :param seeds: that are shown; the random policy's is always there
    :raises ValueError: where runs of one algorithm on one environment differ in more than their seed
    """

    def __init__(self, runs: Iterable[Run], seeds: Sequence[int]) -> None:
        self._runs: defaultdict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
        for run in runs:
            if run.about["seed"] in seeds or run.about["algorithm"] == RANDOM:
                self._runs[run.about["algorithm"], run.about["env"]][run.about["seed"]] = run
        for (algorithm, env_id), found in self._runs.items():
            _require_alike(f"{algorithm} on {env_id}", found)

    def seeds(self, algorithm: str, *env_ids: str) -> list[int]:
        """Those that were run on all of these environments."""
        return sorted(set.intersection(*(set(self._runs[algorithm, env_id]) for env_id in env_ids)))

    def environments(self, pair: Pair, env_ids: Iterable[str], least: int = LEAST_SEEDS) -> list[str]:
        """Those of which there are so many runs on both sides."""
        return [env_id for env_id in env_ids if self.fewest(pair, env_id) >= least]

    def scored(self, pair: Pair, env_ids: Iterable[str]) -> list[str]:
        """Those of ``environments`` where the reference is above the random policy: elsewhere a score has no meaning."""
        return [
            env_id
            for env_id in self.environments(pair, env_ids)
            if self.finals(pair.reference, [env_id]).mean() > self.random([env_id])[0]
        ]

    def fewest(self, pair: Pair, *env_ids: str) -> int:
        """Seeds that were run on all of these environments, of the side with fewer."""
        return min(len(self.seeds(name, *env_ids)) for name in (pair.ours, pair.reference))

    def finals(self, algorithm: str, env_ids: Sequence[str]) -> np.ndarray:
        """Returns of the final policies, (runs, environments), of seeds that were run on all of them."""
        seeds = self.seeds(algorithm, *env_ids)
        return np.array([[self._runs[algorithm, env_id][seed].final for env_id in env_ids] for seed in seeds])

    def random(self, env_ids: Sequence[str]) -> np.ndarray:
        """Mean return of the random policy, (environments,).

        :raises ValueError: where it was not run
        """
        missing = [env_id for env_id in env_ids if 0 not in self._runs[RANDOM, env_id]]
        if missing:
            raise ValueError(f"expected a run of the random policy on {', '.join(missing)}: learning.py run --envs ...")
        return np.array([self._runs[RANDOM, env_id][0].final for env_id in env_ids])

    def curves(self, algorithm: str, env_id: str, seeds: Sequence[int] | None = None) -> Curves:
        runs = self._runs[algorithm, env_id]
        rows = [runs[seed].rows for seed in (sorted(runs) if seeds is None else seeds)]
        columns = {name: np.array([run[name] for run in rows]) for name in rows[0]}
        seconds = {name: columns[f"{name}_seconds"] for name in ("wall", "cpu")}
        return Curves(columns["timesteps"][0], seconds, columns["mean"])

    def missing(self, pair: Pair, env_id: str) -> str:
        """How many runs are still to be made, in words; empty if none."""
        lacking = []
        for name in (pair.reference, pair.ours):
            seeds = sorted(set(range(SEEDS[pair])) - set(self.seeds(name, env_id)))
            if seeds:
                lacking.append(f"{name} {len(seeds)} of {SEEDS[pair]}")
        return ", ".join(lacking)


def _require_alike(name: str, runs: Mapping[int, Run]) -> None:
    """:raises ValueError: naming the seeds of each way of running, if there are several"""
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for seed, run in sorted(runs.items()):
        kinds[json.dumps([run.about.get("setting"), run.rows["timesteps"].tolist()])].append(seed)
    if len(kinds) > 1:
        found = "\n".join(f"seeds {', '.join(map(str, seeds))}: {kind}" for kind, seeds in kinds.items())
        raise ValueError(f"runs of {name} must share setting and steps of evaluation; move others away, got\n{found}")


# -- times ------------------------------------------------------------------------------------------------


def time_ratio(ours: Curves, reference: Curves, clock: str) -> float:
    """Our time to the reference's final return, over the reference's own, both on mean curves; 1 where neither takes any."""
    means = [curves.returns.mean(axis=0) for curves in (ours, reference)]
    # of the mean curve: the mean of the last column may be a rounding error above it, and the reference never get there
    level = float(means[1][-1])
    times = [
        time_to_reach(level, curves.seconds[clock].mean(axis=0), mean)
        for curves, mean in zip((ours, reference), means, strict=True)
    ]
    if times[1] == 0.0:
        return 1.0 if times[0] == 0.0 else NEVER
    return min(times[0] / times[1], NEVER)


def drawn(curves: Curves, rows: np.ndarray) -> Curves:
    """The curves of these runs."""
    seconds = {clock: times[rows] for clock, times in curves.seconds.items()}
    return Curves(curves.timesteps, seconds, curves.returns[rows])


def median_time_ratio(results: Results, pair: Pair, env_ids: Sequence[str], clock: str) -> Interval:
    """The median over environments; whole curves are resampled, by their row numbers."""
    curves = {
        name: [results.curves(name, env_id, results.seeds(name, *env_ids)) for env_id in env_ids]
        for name in (pair.ours, pair.reference)
    }

    def ratio(column: int, ours: np.ndarray, reference: np.ndarray) -> float:
        sides = (drawn(curves[pair.ours][column], ours), drawn(curves[pair.reference][column], reference))
        return time_ratio(*sides, clock)

    def median(ours: np.ndarray, reference: np.ndarray) -> float:
        return float(np.median([ratio(i, ours[:, i], reference[:, i]) for i in range(len(env_ids))]))

    rows = [np.tile(np.arange(len(curves[name][0].returns))[:, None], len(env_ids)) for name in (pair.ours, pair.reference)]
    return interval(median, *rows, effort=0.2)
