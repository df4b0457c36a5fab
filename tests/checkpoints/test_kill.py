"""``kill -9`` in a rollout, its branches, an update and the writing of a checkpoint; the whole of it is a program."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPOExt
from tests.checkpoints.runs import cartpole, make_model, train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kill_and_resume import CASES, killed


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_is_the_run_that_was_not(tmp_path, case):
    result = killed(case, tmp_path, iterations=6, kills=3, seed=1)
    assert result["kills"] == 3 and result["different"] == {}


SCRIPT = """
import os, signal, sys
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from sb3_trpo_ext import Checkpoints
from tests.checkpoints.runs import cartpole, make_model

class Kill(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return True

model = make_model(VecNormalize(cartpole()))
model.learn(512, [Kill(), Checkpoints(sys.argv[1], every=2)])
model.save(sys.argv[1] + "/end")
"""


def test_another_process_goes_on(tmp_path):
    def script(kill_at):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), str(kill_at)]
        return subprocess.run(command, timeout=100, check=False).returncode

    assert script(300) == -signal.SIGKILL and script(-1) == 0
    whole, _ = train(tmp_path / "whole", 512, lambda: make_model(VecNormalize(cartpole())))
    resumed = TRPOExt.load(tmp_path / "killed/end.zip", device="cpu")
    for parameter, its in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(parameter, its)
