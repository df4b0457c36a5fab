"""What decides a run's future, listed once: each part gives plain data, and takes it back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_trpo_ext.checkpoints import logs
from sb3_trpo_ext.checkpoints.attributes import Attributes
from sb3_trpo_ext.checkpoints.callbacks import CallbackStates
from sb3_trpo_ext.checkpoints.environments import Environments
from sb3_trpo_ext.checkpoints.journal import Journal
from sb3_trpo_ext.sampling.snapshot.generators import set_state, state_of
from sb3_trpo_ext.sampling.snapshot.layers import with_inner_spaces

_LOOKED_AFTER_ELSEWHERE = ("start_time", "_total_timesteps")

_NOT_IN_ARCHIVES = {"_last_lstm_states"}
"""What a loaded model does without, as it begins new episodes, and a run that goes on needs."""


@dataclass
class Iterations:
    """How many iterations this call of ``learn()`` has done, those before an interruption included."""

    done: int = 0


class Run:
    """A call of ``learn()`` with all that has a state, made when its training is about to start.

    :param model: the algorithm
    :param iterations: the count that ``learn()`` keeps
    :param root: the callback that holds all others
    :param folder: of the checkpoints
    """

    def __init__(self, model: OnPolicyAlgorithm, iterations: Iterations, root: BaseCallback, folder: Path) -> None:
        assert model.env is not None
        self.model, self.iterations = model, iterations
        left_out = {*model._excluded_save_params(), *_LOOKED_AFTER_ELSEWHERE} - _NOT_IN_ARCHIVES
        self.attributes = Attributes(model, left_out)
        self.environments = Environments(model.env, must_be_wrapped=True)
        self.callbacks = CallbackStates(root, model.env)
        self.journal = Journal(folder / "logs.journal")
        self.anew: list[str] = []
        """Which environments went on with new episodes, and why."""
        self.seeds = _Seeds(model, self.all_environments())

    def all_environments(self) -> dict[Hashable, Environments]:
        """Those of training and those of callbacks, by a name that is the same in each run of the script."""
        of_callbacks: dict[Hashable, Environments] = {name: each for name, each in self.callbacks.environments.items()}
        return {"training": self.environments, **of_callbacks}

    def refusals(self) -> list[str]:
        """What cannot be carried, environments apart."""
        kind = type(self.model).__name__
        return [*(f"{kind}.{name} is not plain data" for name in self.attributes.not_carried()), *self.callbacks.refusals()]

    def refused_environments(self) -> list[str]:
        found = self.all_environments().items()
        return [cannot_be_restored(of, each.refusal) for of, each in found if each.refusal is not None]


def cannot_be_restored(of: Hashable, why: str) -> str:
    return f"the environments of {' '.join(of) if isinstance(of, tuple) else of} cannot be restored ({why})"


class _Seeds:
    """From which episodes have been played so far, so that none is played again."""

    def __init__(self, model: OnPolicyAlgorithm, environments: dict[Hashable, Environments]) -> None:
        of_environments = [seed for each in environments.values() for seed in each.seeds()]
        self.used: list[int] = sorted({*of_environments, *([] if model.seed is None else [model.seed])})

    def next_for(self, environments: Environments, entropy: tuple[int, ...]) -> int:
        seed = environments.seeds_from((*entropy, len(self.used)), self.used)
        self.used += range(seed, seed + environments.venv.num_envs)
        return seed


# -- the parts -------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """
    :param state: gives plain data
    :param put: takes it back
    """

    state: Callable[[Run], Any]
    put: Callable[[Run, Any], None]


def _policy(run: Run) -> Any:
    policy = run.model.policy
    return {"parameters": dict(policy.state_dict()), "optimizer": policy.optimizer.state_dict()}


def _put_policy(run: Run, state: Any) -> None:
    run.model.policy.load_state_dict(state["parameters"])
    run.model.policy.optimizer.load_state_dict(state["optimizer"])


def _progress(run: Run) -> Any:
    return {"iterations": run.iterations.done, "nanoseconds": time.time_ns() - int(run.model.start_time)}


def _put_progress(run: Run, state: Any) -> None:
    run.iterations.done = state["iterations"]
    run.model.start_time = time.time_ns() - state["nanoseconds"]


def _watch(run: Run) -> Any:
    model: Any = run.model
    return {"watch": model._watch.get_state(), "told of disagreement": model._has_told_of_disagreement}


def _put_watch(run: Run, state: Any) -> None:
    model: Any = run.model
    model._watch.set_state(state["watch"])
    model._has_told_of_disagreement = state["told of disagreement"]


def _environments(run: Run) -> Any:
    states = {name: environments.state() for name, environments in run.all_environments().items()}
    return {"states": states, "seeds": list(run.seeds.used)}


def _put_environments(run: Run, state: Any) -> None:
    """Where they stood or, if that cannot be, new episodes that have not been played before."""
    model = run.model
    run.seeds.used = list(state["seeds"])
    for name, environments in run.all_environments().items():
        of_these = state["states"].get(name)
        if of_these is None:
            continue  # a callback that was not there
        if environments.refusal is None and of_these["simulators"] is not None:
            environments.put(of_these)
            continue
        environments.put_statistics(of_these)
        run.anew.append(cannot_be_restored(name, environments.refusal or "the checkpoint was written without them"))
        seed = run.seeds.next_for(environments, (model.seed or 0, model.num_timesteps))
        if name == "training":
            model._last_obs = environments.begin_anew(seed)
            model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
        else:
            environments.venv.seed(seed)  # a callback resets them itself


def _callbacks(run: Run) -> Any:
    return run.callbacks.state()


def _put_callbacks(run: Run, state: Any) -> None:
    run.callbacks.put(state)


def _logger(run: Run) -> Any:
    logger = run.model.logger
    files = logs.log_files(logger) | _monitors(run)
    return {
        "pending": logs.pending(logger),
        "columns": {name: version for name, (_, version) in files.items()},
        "journal": run.journal.write(files),
        "tensorboard": logs.tensorboards(logger),
    }


def _put_logger(run: Run, state: Any) -> None:
    logger = run.model.logger
    contents = run.journal.contents(state["journal"])
    logs.put_pending(logger, state["pending"])
    logs.continue_text_files(logger, contents, state["columns"])
    logs.continue_tensorboards(logger, state["tensorboard"])
    for of, environments in run.all_environments().items():
        start = _prefix(of)
        own = {name.removeprefix(start): content for name, content in contents.items() if name.startswith(start)}
        environments.continue_logs(own)
    run.journal.continue_from(state["journal"], state["columns"])


def _monitors(run: Run) -> dict[str, tuple[Path, Any]]:
    return {
        _prefix(of) + name: (path, None)
        for of, environments in run.all_environments().items()
        for name, path in environments.log_files().items()
    }


def _prefix(of: Hashable) -> str:
    return f"Monitor of {of}: "


def _generators(run: Run) -> Any:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": [generator.get_state() for generator in _torch_generators(run.model.device)],
        "spaces": [(key, *state_of(space._np_random)) for key, space in _spaces(run) if space._np_random is not None],
    }


def _put_generators(run: Run, state: Any) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    for generator, of_torch in zip(_torch_generators(run.model.device), state["torch"], strict=False):
        generator.set_state(of_torch)
    found = dict(_spaces(run))
    for key, _, of_space in state["spaces"]:
        set_state(found[key].np_random, of_space)


def _torch_generators(device: th.device) -> list[th.Generator]:
    """That of the CPU and, on CUDA, that of the model's device."""
    if device.type != "cuda":
        return [th.default_generator]
    number = th.cuda.current_device() if device.index is None else device.index
    return [th.default_generator, th.cuda.default_generators[number]]


def _spaces(run: Run) -> Iterator[tuple[Hashable, spaces.Space]]:
    yield from with_inner_spaces("action", run.model.action_space)
    yield from with_inner_spaces("observation", run.model.observation_space)


PARTS: dict[str, Part] = {
    "progress": Part(_progress, _put_progress),
    "policy": Part(_policy, _put_policy),
    "algorithm": Part(lambda run: run.attributes.state(), lambda run, state: run.attributes.put(state)),
    "watch": Part(_watch, _put_watch),
    "environments": Part(_environments, _put_environments),
    "callbacks": Part(_callbacks, _put_callbacks),
    "logger": Part(_logger, _put_logger),
    # last, because the others may draw from them
    "generators": Part(_generators, _put_generators),
}
