"""SIGTERM: saved at the end of the iteration, and all handlers as they were."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_trpo_ext import Checkpoints
from sb3_trpo_ext.checkpoints.signals import listening
from tests.checkpoints.runs import N_STEPS, assert_equal_models, cartpole, learn, make_model, train

STEPS = 6 * 2 * N_STEPS


class Send(BaseCallback):
    def __init__(self, at, number, to=None):
        super().__init__()
        self.at, self.number, self.to = at, number, to
        self.handler = None

    def _on_step(self):
        if self.num_timesteps == self.at:
            self.handler = signal.getsignal(self.number)
            for process in self.to or [os.getpid()]:
                os.kill(process, self.number)
        return True


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_iteration_and_the_run_goes_on_later(tmp_path, name):
    number = signal.Signals[name]
    whole, _ = train(tmp_path / "whole", STEPS)
    before, heard = signal.getsignal(number), []
    signal.signal(number, lambda *_: heard.append(1))
    try:
        own = signal.getsignal(number)
        model, checkpoints = make_model(), Checkpoints(tmp_path / "run", every=100, signals=["SIGTERM", "SIGUSR1"])
        assert learn(model, STEPS, [Send(2 * 2 * N_STEPS + 4, number), checkpoints])
        assert signal.getsignal(number) is own and not heard
    finally:
        signal.signal(number, before)
    assert checkpoints.stopped_by == name and model.num_timesteps == 3 * 2 * N_STEPS
    resumed, checkpoints = train(tmp_path / "run", STEPS)
    assert checkpoints.resumed_at == 3 * 2 * N_STEPS and checkpoints.stopped_by is None
    assert_equal_models(whole, resumed)


def test_a_signal_that_was_not_asked_for_is_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    send = Send(10, signal.SIGWINCH)
    learn(make_model(), 2 * N_STEPS, [send, Checkpoints(tmp_path)])
    assert send.handler == signal.getsignal(signal.SIGWINCH) and before == signal.getsignal(signal.SIGUSR1)


def test_handlers_come_back_after_an_error(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert not learn(make_model(), STEPS, [Checkpoints(tmp_path)], kill_at=10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_main_thread_listens(tmp_path):
    before, handlers = signal.getsignal(signal.SIGTERM), []

    class Look(BaseCallback):
        def _on_step(self):
            handlers.append(signal.getsignal(signal.SIGTERM))
            return True

    thread = threading.Thread(target=lambda: learn(make_model(), 10, [Look(), Checkpoints(tmp_path)]))
    thread.start()
    thread.join()
    assert handlers and set(handlers) == {before}


@pytest.mark.parametrize("wrapped", [True, False])
def test_workers_ignore_it(tmp_path, wrapped):
    env = cartpole(wrapped=wrapped, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    workers = [process.pid for process in env.processes]
    model, checkpoints = make_model(env), Checkpoints(tmp_path)
    assert learn(model, STEPS, [Send(10, signal.SIGTERM, [*workers, os.getpid()]), checkpoints])
    assert checkpoints.stopped_by == "SIGTERM" and model.num_timesteps == 2 * N_STEPS
    with listening([], env):
        pass
    # and they end when they are told to, as before
    for process in env.processes:
        process.terminate()
        process.join(5)
        assert process.exitcode == -signal.SIGTERM


SCRIPT = """
import sys
from tests.checkpoints.runs import cartpole, make_model
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_trpo_ext import Checkpoints
def main():
    env = cartpole(vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    make_model(env).learn(10, Checkpoints(sys.argv[1]))
    raise SystemExit(3)  # without closing anything
main()
"""


def test_a_process_with_workers_ends(tmp_path):
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], timeout=60, check=False)
    assert ended.returncode == 3
