"""One learning run: its training, its evaluations, and the CSV file that is left of it."""

from __future__ import annotations

import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from _measure import PACKAGES, versions
from _settings import ALGORITHMS, BUDGETS, RANDOM, Setting, comparable, resolved, setting_of, with_later_keywords
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

import sb3_trpo_ext

EVALUATIONS = 20
EPISODES, FINAL_EPISODES, RANDOM_EPISODES = 10, 20, 100
EVALUATION_ENVS = 10
EVALUATION_SEED = 10_000


# -- evaluation ------------------------------------------------------------------------------------------


class Clock:
    """Wall and process time of training, stopped while evaluating."""

    def __init__(self) -> None:
        self._elapsed = np.zeros(2)
        self._started: np.ndarray | None = None

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> tuple[float, float]:
        """Both times so far, in seconds."""
        assert self._started is not None, "the clock is not running"
        self._elapsed += self._now() - self._started
        self._started = None
        return float(self._elapsed[0]), float(self._elapsed[1])


def evaluation_env(env_id: str, normalize: dict[str, Any] | None) -> VecEnv:
    """Environments of their own, with statistics that only ever come from training."""
    # without a seed, one would be drawn from the global generator, which training uses
    env = make_vec_env(env_id, n_envs=EVALUATION_ENVS, seed=EVALUATION_SEED)
    return env if normalize is None else VecNormalize(env, **{**normalize, "norm_reward": False}, training=False)


class Evaluation(BaseCallback):
    """Deterministic returns of the policy, ``EVALUATIONS`` times at even distances, off the clock.

    The policy is evaluated after updates, before the next rollout, on the same episodes' seeds each time.
    """

    def __init__(self, env: VecEnv, n_timesteps: int, seed: int) -> None:
        super().__init__()
        self.clock = Clock()
        self.rows: list[dict[str, float]] = []
        self._env, self._seed = env, EVALUATION_SEED + seed
        self._due = np.linspace(0, n_timesteps, EVALUATIONS + 1)[:-1].tolist()

    def _on_training_start(self) -> None:
        self.clock.start()

    def _on_rollout_start(self) -> None:
        if self._due and self.num_timesteps >= self._due[0]:
            self.evaluate(EPISODES)
            while self._due and self.num_timesteps >= self._due[0]:
                del self._due[0]
            self.clock.start()

    def _on_step(self) -> bool:
        return True

    def evaluate(self, episodes: int) -> None:
        """Stop the clock, and add a row."""
        wall, cpu = self.clock.stop()
        if isinstance(self._env, VecNormalize):
            sync_envs_normalization(self.training_env, self._env)
        self._env.seed(self._seed)
        returns = returns_of(self.model, self._env, episodes)
        self.rows.append({"timesteps": self.num_timesteps, "wall_seconds": wall, "cpu_seconds": cpu, **returns})


def returns_of(model: Any, env: VecEnv, episodes: int) -> dict[str, float]:
    """Undiscounted, unnormalised returns of deterministic episodes: mean, standard deviation, number."""
    returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, return_episode_rewards=True)
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "episodes": episodes}


# -- a run -----------------------------------------------------------------------------------------------


COLUMNS = ("timesteps", "wall_seconds", "cpu_seconds", "mean", "std", "episodes")


class Run(NamedTuple):
    """One file: what was run, and its evaluations; the last is that of the final policy.

    :param about: algorithm, env, seed, arguments, versions and the like
    :param rows: ``COLUMNS``; seconds are those of training
    """

    about: dict[str, Any]
    rows: pd.DataFrame

    @property
    def final(self) -> float:
        """Mean return of the final policy."""
        return float(self.rows["mean"].iloc[-1])


def learn(algorithm: str, env_id: str, seed: int, n_timesteps: int, setting: Setting) -> Run:
    """Train, with evaluations on the way and at the end."""
    env = make_vec_env(env_id, n_envs=setting.n_envs, seed=seed)
    if setting.normalize is not None:
        env = VecNormalize(env, **setting.normalize)
    arguments = ExperimentManager._preprocess_schedules(dict(setting.arguments))
    model: BaseAlgorithm = ALGORITHMS[algorithm](env=env, seed=seed, device="cpu", **arguments)
    evaluation = Evaluation(evaluation_env(env_id, setting.normalize), n_timesteps, seed)
    model.learn(n_timesteps, callback=evaluation)
    evaluation.evaluate(FINAL_EPISODES)
    about = {
        "outcomes": getattr(model, "outcome_counts", None),
        "setting": setting._asdict(),
        "resolved": resolved(algorithm, setting),
    }
    return Run(about, pd.DataFrame(evaluation.rows))


def act_at_random(env_id: str, seed: int) -> Run:
    """Returns of uniformly random actions, from which scores are normalised."""
    env = evaluation_env(env_id, None)
    env.seed(EVALUATION_SEED + seed)
    env.action_space.seed(seed)
    returns = returns_of(_Random(env), env, RANDOM_EPISODES)
    return Run({}, pd.DataFrame([{"timesteps": 0, "wall_seconds": 0.0, "cpu_seconds": 0.0, **returns}]))


class _Random:
    """A policy as ``evaluate_policy`` takes it."""

    def __init__(self, env: VecEnv) -> None:
        self._env = env

    def predict(self, observation: np.ndarray, state: Any = None, **_: Any) -> tuple[np.ndarray, Any]:
        return np.array([self._env.action_space.sample() for _ in range(len(observation))]), state


def one(
    algorithm: str, env_id: str, seed: int, n_timesteps: int, zoo_file: Path | None = None, machine: str | None = None
) -> Run:
    """A run, with what it was run with.

    :param machine: stands behind the name of the processor
    """
    about = {"algorithm": algorithm, "env": env_id, "seed": seed, "timesteps": n_timesteps, "sources": sources()}
    if algorithm == RANDOM:
        run = act_at_random(env_id, seed)
    else:
        run = learn(algorithm, env_id, seed, n_timesteps, setting_of(algorithm, env_id, zoo_file))
    return Run({**about, **run.about, "versions": versions_on(machine)}, run.rows)


def versions_on(machine: str | None) -> dict[str, Any]:
    """The versions, with these words behind the name of the processor."""
    on = versions()
    if machine is not None:
        on["cpu"] += f", {machine}"
    return on


def sources() -> str | None:
    """The git tree of the library as it is now, which outlives rewritten commits; None outside a checkout.

    Read before a run: a commit may fall into it. Where files are not as committed, "+changed" is put behind it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(sb3_trpo_ext.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    tree = git("rev-parse", "--short=12", "HEAD:./")
    return f"{tree}{'+changed' if git('status', '--porcelain', '.') else ''}" if tree else None


# -- files -----------------------------------------------------------------------------------------------


def path_of(folder: Path, algorithm: str, env_id: str, seed: int) -> Path:
    return folder / algorithm / env_id / f"{seed}.csv"


def write(run: Run, path: Path) -> None:
    """A line of JSON behind "# ", then the rows; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f"# {json.dumps(run.about)}\n{run.rows.round(3).to_csv(index=False, lineterminator=chr(10))}")
    unfinished.replace(path)


def read(path: Path) -> Run:
    """:raises ValueError: for a file that ``write`` has not written"""
    about, _, rows = path.read_text().partition("\n")
    try:
        run = Run(json.loads(about.removeprefix("# ")), pd.read_csv(io.StringIO(rows)))
    except ValueError as error:
        raise ValueError(f"{path}: expected a line of JSON and a table of evaluations, got {about[:60]!r}...") from error
    return as_read(run, path)


def as_read(run: Run, path: Path | str) -> Run:
    """A run of a file, looked at, with today's keywords among its arguments.

    :raises ValueError: for one that is not whole
    """
    if run.rows.empty or not set(COLUMNS) <= set(run.rows):
        raise ValueError(f"{path}: expected evaluations with {', '.join(COLUMNS)}, got {len(run.rows)} of {[*run.rows]}")
    # of a run that bears another name, whose constructor was called
    constructed = run.about.get("base", run.about.get("algorithm"))
    if constructed in ALGORITHMS and "resolved" in run.about:
        run.about["resolved"] = with_later_keywords(constructed, run.about["resolved"])
    planned = 0 if run.about.get("algorithm") == RANDOM else run.about.get("timesteps", 0)
    if run.rows["timesteps"].iloc[-1] < planned:
        raise ValueError(f"{path}: expected evaluations up to {planned} steps, got {run.rows['timesteps'].iloc[-1]}: cut off")
    return run


def made_with(run: Run) -> dict[str, Any]:
    """What runs that are put together must share; rl_zoo3's version is in it as the settings that come from there."""
    packages = {package: run.about.get("versions", {}).get(package) for package in PACKAGES if package != "rl_zoo3"}
    return {"setting": comparable(run.about), "timesteps": run.about.get("timesteps"), "packages": packages}


def outdated(run: Run, zoo_file: Path | None = None) -> list[str]:
    """In which of its setting, with its constructor's defaults, and its budget a run differs from what it would be now."""
    algorithm, env_id = run.about["algorithm"], run.about["env"]
    about: dict[str, Any] = {"env": env_id, "timesteps": BUDGETS[env_id]}
    if algorithm != RANDOM:
        setting = setting_of(algorithm, env_id, zoo_file)
        about |= {"setting": setting._asdict(), "resolved": resolved(algorithm, setting)}
    changed = {
        "setting": comparable(run.about) != comparable(about),
        "timesteps": run.about.get("timesteps") != about["timesteps"],
    }
    return [key for key, differs in changed.items() if differs]


def read_all(folder: Path) -> list[Run]:
    """Every run below a folder."""
    return [read(path) for path in sorted(folder.glob("*/*/*.csv"))]
