"""``Checkpoints``: an SB3 callback that lets a run go on where it was killed, as if nothing had happened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_trpo_ext.checkpoints.folder import DamagedError, Folder, Position
from sb3_trpo_ext.checkpoints.identity import differences, identity, surroundings
from sb3_trpo_ext.checkpoints.parts import PARTS, Iterations, Run
from sb3_trpo_ext.checkpoints.plain_data import NotPlainError
from sb3_trpo_ext.checks import require, require_choice, require_count, warn_user
from sb3_trpo_ext.sampling.snapshot import SnapshotError, check_returns

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")


class Checkpoints(BaseCallback):
    """Saves all that decides how training goes on, and goes on from there when the same script is run again.

    ```
    env = make_vec_env("Hopper-v5", n_envs=4, seed=0, wrapper_class=SnapshotWrapper)
    model = TRPOExt("MlpPolicy", env, seed=0)
    model.learn(1_000_000, callback=Checkpoints("runs/hopper"))
    ```

    It may stand anywhere among the callbacks, of which there is one of this class. Other callbacks have their plain
    attributes carried; one that has more of a state says so by ``get_state()`` and ``set_state(state)``.

    :param folder: of this run's checkpoints. Only ``python -m sb3_trpo_ext.zoo train`` can do without: it takes
        ``checkpoints`` in the run's folder
    :param every: how many iterations, of a rollout and an update each, between two checkpoints; there is one before the
        first and one after the last, too
    :param keep: how many of them to keep
    :param exact: refuse to start where something cannot be carried. Else such a run goes on with new episodes
    :param signals: what makes the run save at the end of its iteration, and ``learn()`` return
    :raises ValueError: for a value that cannot work
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        every: int = 10,
        keep: int = 3,
        exact: bool = False,
        signals: Sequence[str] = ("SIGTERM",),
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        require_count("every", every)
        require_count("keep", keep)
        require_choice("exact", exact, (True, False))
        known = not isinstance(signals, str) and all(name in _SIGNALS for name in signals)
        require("signals", signals, known, f"some of {', '.join(_SIGNALS)}")
        self.folder = None if folder is None else Path(folder)
        self.every, self.keep, self.exact, self.signals = every, keep, exact, tuple(signals)
        self.failures = 0
        """How many checkpoints could not be written."""
        self.stopped_by: str | None = None
        """The signal that ended the training before its time."""
        self.resumed_at: int | None = None
        """From how many steps the last ``learn()`` went on; None: it began."""
        self._run: Run | None = None
        self._files: Folder | None = None
        self._identity: dict[str, str] = {}
        self._surroundings: dict[str, str] = {}
        self._call = 0

    def _on_rollout_start(self) -> None:
        if self._run is None:
            kind = type(self.model).__name__
            raise ValueError(f"Checkpoints needs an algorithm of sb3_trpo_ext, whose learn() says when to save; got {kind}")

    def _on_step(self) -> bool:
        return True

    def get_state(self) -> int:
        return self.failures

    def set_state(self, state: int) -> None:
        self.failures = state

    # -- what learn() tells -----------------------------------------------------------------------------

    def begin(self, iterations: Iterations, root: BaseCallback, call: int) -> None:
        """Training is about to start: go on from the newest checkpoint, or save the first.

        :param iterations: the count that ``learn()`` keeps
        :param root: the callback that holds all others
        :param call: which call of ``learn()`` it is in this process, of this model
        :raises ValueError: if the folder is not this run's, or if something cannot be carried that must be
        """
        assert self._files is not None and isinstance(self.model, OnPolicyAlgorithm)
        run = self._run = Run(self.model, iterations, root, self._files.path)
        self._identity, self._surroundings = identity(self.model), surroundings(self.model)
        self._call, self.stopped_by, self.resumed_at = call, None, None
        if self.exact:
            self._require_exactness(run)
        for position in self._files.of_call(call):
            try:
                state = self._files.read(position)
                self._go_on(run, state)
                return
            except DamagedError as error:
                warn_user(f"the checkpoint {self._files.path / position.name} is passed over: {error}")
        self._save_first()

    def boundary(self, is_last: bool, signal: str | None) -> bool:
        """Between two iterations: save if it is time.

        :param is_last: whether training ends here
        :param signal: which one came, if any
        :return: whether to go on
        """
        assert self._run is not None
        if is_last or signal is not None or self._run.iterations.done % self.every == 0:
            self.save()
        self.stopped_by = None if is_last else signal
        return signal is None

    def end(self) -> None:
        """Training has ended, in whatever way."""
        self._run = None
        if self._files is not None:
            self._files.unlock()

    def lock(self) -> None:
        """:raises ValueError: without a folder, or if another process writes to it"""
        expected = "a folder, except in a file of the RL Zoo that python -m sb3_trpo_ext.zoo reads"
        require("folder", self.folder, self.folder is not None, expected)
        assert self.folder is not None
        self._files = Folder(self.folder, self.keep)
        self._files.lock()

    # -- saving -------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Write a checkpoint now, between two iterations; whether that went well.

        If not, there is a warning, ``failures`` counts it, and the checkpoints of before stay.
        """
        try:
            self._write()
            return True
        except (OSError, SnapshotError, NotPlainError) as error:
            self.failures += 1
            warn_user(f"no checkpoint was written to {self.folder} ({error}); training goes on")
            self.logger.record("checkpoints/failures", self.failures)
            return False

    def _save_first(self) -> None:
        try:
            self._write()
        except (SnapshotError, NotPlainError) as error:
            raise ValueError(f"this run cannot be saved: {error}") from error
        except OSError as error:
            raise ValueError(f"no checkpoint can be written to {self.folder}: {error}") from error

    def _write(self) -> None:
        assert self._run is not None and self._files is not None
        self._files.path.mkdir(parents=True, exist_ok=True)
        model = self._run.model
        state: dict[str, Any] = {"identity": self._identity, "surroundings": self._surroundings}
        state["finished"] = model.num_timesteps >= model._total_timesteps
        state["parts"] = {name: part.state(self._run) for name, part in PARTS.items()}
        self._files.write(Position(self._call, self._run.iterations.done), state)

    # -- going on -------------------------------------------------------------------------------------------

    def _go_on(self, run: Run, state: dict[str, Any]) -> None:
        """:raises DamagedError: before anything is changed, if not all of it is there"""
        different = differences(state["identity"], self._identity)
        if different:
            raise ValueError(
                f"the checkpoints in {self.folder} are of another run: {'; '.join(different)}. "
                "Go on with what it was, or give this run another folder"
            )
        run.journal.contents(state["parts"]["logger"]["journal"])
        try:
            for name, part in PARTS.items():
                part.put(run, state["parts"][name])
        except SnapshotError as error:
            raise ValueError(f"the checkpoints in {self.folder} are of other environments: {error}") from error
        self.resumed_at = run.model.num_timesteps
        if run.anew:
            self.save()  # or the next start would play these new episodes again
        self._say_how_exact(run, differences(state["surroundings"], self._surroundings))

    def _say_how_exact(self, run: Run, surroundings: list[str]) -> None:
        why = [*run.anew, *run.refusals(), *surroundings]
        steps = run.model.num_timesteps
        if why:
            warn_user(f"from here on, {steps} steps, this run is not bit for bit what it would have been: {'; '.join(why)}")
        if self.verbose >= 1:
            print(f"Goes on at {steps} steps, from the checkpoints in {self.folder}")

    def _require_exactness(self, run: Run) -> None:
        why = [*run.refused_environments(), *run.refusals()]
        if not why:
            assert run.model.env is not None
            try:
                check_returns(run.model.env)
            except SnapshotError as error:
                why = [str(error)]
        if why:
            raise ValueError(f"exact=True, but {'; '.join(why)}")
