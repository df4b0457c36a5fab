"""Learning runs, gathered: who is compared with whom, what was run, and how long it took to get there."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from _runs import Run, made_with
from _scores import Interval, interval, time_to_reach
from _settings import CLASSIC, MUJOCO, RANDOM

LEAST_SEEDS = 3
"""Below, a table shows the returns and claims nothing."""
NEVER = 1e3
"""A ratio of times that stands for "not reached": finite, so that a bootstrap can go on."""
SHARES = (1.0, 0.95)
"""Of the way from the random policy to the reference's final return, at which times are compared."""


class Pair(NamedTuple):
    """Whom we compare with whom."""

    title: str
    ours: str
    reference: str


ZOO = Pair("the Zoo files' settings", "trpo_ext_zoo", "sb3_contrib_zoo")
DEFAULT = Pair("default arguments", "trpo_ext_default", "sb3_contrib_default")
DEFAULT_NORM = Pair("default arguments, normalised observations", "trpo_ext_default_norm", "sb3_contrib_default_norm")
PAIRS = (
    ZOO,
    DEFAULT,
    DEFAULT_NORM,
    Pair("default arguments, initial spread as theirs", "trpo_ext_std_1", DEFAULT.reference),
    Pair(
        "default arguments, initial spread as theirs, normalised observations", "trpo_ext_std_1_norm", DEFAULT_NORM.reference
    ),
)
GROUPS = {"MuJoCo": [*MUJOCO], "Classic control and Box2D": [*CLASSIC]}
SEEDS = {pair: 10 if pair is ZOO else 5 for pair in PAIRS}
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


class Timed(NamedTuple):
    """The runs of both sides whose times can be compared.

    :param cpu: the processor they were run on
    :param seeds: by algorithm, ours first
    """

    cpu: str
    seeds: dict[str, list[int]]

    @property
    def fewest(self) -> int:
        return min(map(len, self.seeds.values()))


class Results:
    """Runs by algorithm, environment and seed.

    :param seeds: that are shown; the random policy's is always there
    :raises ValueError: where runs of one algorithm on one environment differ in more than their seed
    """

    def __init__(self, runs: Iterable[Run], seeds: Sequence[int]) -> None:
        self._runs: defaultdict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
        self._there: set[tuple[str, str, int]] = set()
        for run in runs:
            algorithm, env_id, seed = (run.about[key] for key in ("algorithm", "env", "seed"))
            self._there.add((algorithm, env_id, seed))
            if seed in seeds or algorithm == RANDOM:
                self._runs[algorithm, env_id][seed] = run
        for (algorithm, env_id), found in self._runs.items():
            _require_alike(f"{algorithm} on {env_id}", found)

    def seeds(self, algorithm: str, *env_ids: str, cpu: str | None = None) -> list[int]:
        """Those that were run on all of these environments.

        :param cpu: on a processor of this name; None for any
        """
        return sorted(
            set.intersection(
                *(
                    {seed for seed, run in self._runs[algorithm, env_id].items() if cpu in (None, cpu_of(run))}
                    for env_id in env_ids
                )
            )
        )

    def runs(self, algorithm: str, env_id: str) -> dict[int, Run]:
        """By seed."""
        return dict(sorted(self._runs[algorithm, env_id].items()))

    def timed(self, pair: Pair, *env_ids: str) -> Timed | None:
        """On the processor where most seeds of both sides were run on all of these environments; None: nowhere."""
        return next(iter(self.timed_each(pair, *env_ids)), None)

    def timed_each(self, pair: Pair, *env_ids: str) -> list[Timed]:
        """On each processor where seeds of both sides were run on all of these environments, most seeds first."""
        runs = [run for name in (pair.ours, pair.reference) for env_id in env_ids for run in self._runs[name, env_id].values()]
        found = [
            Timed(cpu, {name: self.seeds(name, *env_ids, cpu=cpu) for name in (pair.ours, pair.reference)})
            for cpu in sorted({cpu_of(run) for run in runs})
        ]
        return sorted((timed for timed in found if timed.fewest > 0), key=lambda timed: -timed.fewest)

    def environments(self, pair: Pair, env_ids: Iterable[str], least: int = LEAST_SEEDS) -> list[str]:
        """Those of which there are so many runs on both sides."""
        return [env_id for env_id in env_ids if self.fewest(pair, env_id) >= least]

    def scored(self, pair: Pair, env_ids: Iterable[str]) -> list[str]:
        """Those of ``environments`` where the reference is clearly above the random policy, by two standard errors.

        Elsewhere a score has no meaning: what it is divided by may be 0.
        """

        def learned(env_id: str) -> bool:
            finals = self.finals(pair.reference, [env_id])
            return bool(finals.mean() - 2.0 * finals.std(ddof=1) / np.sqrt(len(finals)) > self.random([env_id])[0])

        return [env_id for env_id in self.environments(pair, env_ids) if learned(env_id)]

    def summed(self, pair: Pair, env_ids: Iterable[str]) -> list[str]:
        """Those over which scores are put together; none where too few seeds were run on all of them."""
        scored = self.scored(pair, env_ids)
        return scored if scored and self.fewest(pair, *scored) >= LEAST_SEEDS else []

    def together(self, pair: Pair, env_id: str, env_ids: Iterable[str]) -> list[str]:
        """On which environments a seed must have been run for its times on this one to be shown."""
        summed = self.summed(pair, env_ids)
        return summed if env_id in summed else [env_id]

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
            n_lacking = sum((name, env_id, seed) not in self._there for seed in range(SEEDS[pair]))
            if n_lacking:
                lacking.append(f"{name} {n_lacking} of {SEEDS[pair]}")
        return ", ".join(lacking)


def cpu_of(run: Run) -> str:
    """The processor that a run was made on, by name."""
    return str(run.about.get("versions", {}).get("cpu", "unknown"))


def _require_alike(name: str, runs: Mapping[int, Run]) -> None:
    """:raises ValueError: naming what differs, and the seeds of each way of running, if there are several"""
    made = {seed: {**made_with(run), "steps": run.rows["timesteps"].tolist()} for seed, run in sorted(runs.items())}
    keys = [
        key
        for key in next(iter(made.values()), {})
        if len({json.dumps(how[key], sort_keys=True) for how in made.values()}) > 1
    ]
    if not keys:
        return
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for seed, how in made.items():
        kinds[json.dumps({key: how[key] for key in keys}, sort_keys=True)].append(seed)
    found = "\n".join(f"seeds {', '.join(map(str, seeds))}: {kind}" for kind, seeds in kinds.items())
    raise ValueError(f"runs of {name} must share setting, versions and steps of evaluation; move others away, got\n{found}")


# -- times ------------------------------------------------------------------------------------------------


def time_ratio(ours: Curves, reference: Curves, clock: str, start: float = 0.0, share: float = 1.0) -> float:
    """Our time to the reference's final return, over the reference's own, both on mean curves; 1 where neither takes any.

    :param share: how much of the way from ``start`` to that return is to be gone
    """
    means = [curves.returns.mean(axis=0) for curves in (ours, reference)]
    # of the mean curve: the mean of the last column may be a rounding error above it, and the reference never get there
    final = float(means[1][-1])
    level = final if share == 1.0 else start + share * (final - start)
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


def median_time_ratio(
    results: Results, pair: Pair, env_ids: Sequence[str], timed: Timed, clock: str, share: float = 1.0
) -> Interval:
    """The median over environments of the runs of ``timed``; whole curves are resampled, by their row numbers."""
    curves = {name: [results.curves(name, env_id, seeds) for env_id in env_ids] for name, seeds in timed.seeds.items()}
    starts = results.random(env_ids)

    def ratio(column: int, ours: np.ndarray, reference: np.ndarray) -> float:
        sides = (drawn(curves[pair.ours][column], ours), drawn(curves[pair.reference][column], reference))
        return time_ratio(*sides, clock, float(starts[column]), share)

    def median(ours: np.ndarray, reference: np.ndarray) -> float:
        return float(np.median([ratio(i, ours[:, i], reference[:, i]) for i in range(len(env_ids))]))

    rows = [np.tile(np.arange(len(curves[name][0].returns))[:, None], len(env_ids)) for name in (pair.ours, pair.reference)]
    return interval(median, *rows)
