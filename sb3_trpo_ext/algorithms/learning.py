"""The loop of ``learn()``: SB3's, with a place between two iterations where a run can be saved and gone on with."""

from __future__ import annotations

from typing import TypeVar

from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_trpo_ext.algorithms.masking import UseMasking, WithMasks
from sb3_trpo_ext.checkpoints.iterations import iterations_of

SelfWithLearn = TypeVar("SelfWithLearn", bound="WithLearn")


class WithLearn(WithMasks):
    """An SB3 algorithm whose runs checkpoints can look into."""

    def learn(
        self: SelfWithLearn,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        use_masking: UseMasking | None = None,
    ) -> SelfWithLearn:
        """Train; see SB3. ``tb_log_name`` is the class's name by default.

        :param use_masking: as in the constructor, for this run; None: what was said there
        :raises ValueError: with vine sampling, if the environments do not return to a state exactly
        """
        tb_log_name = tb_log_name or type(self).__name__
        iteration = 0  # of SB3's locals, for callbacks
        with self._masking_of_run(use_masking):
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            callback.on_training_start(locals(), globals())
            assert self.env is not None
            # SB3's loop, which a checkpoint has to look into between two iterations
            with iterations_of(self, callback) as iterations:
                while self.num_timesteps < total_timesteps:
                    if not self.collect_rollouts(self.env, callback, self.rollout_buffer, n_rollout_steps=self.n_steps):
                        break
                    iterations.done += 1
                    self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                    if log_interval is not None and iterations.done % log_interval == 0:
                        self.dump_logs(iterations.done)
                    self.train()
                    if not iterations.boundary():
                        break
            callback.on_training_end()
        return self
