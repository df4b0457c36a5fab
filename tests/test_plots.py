import numpy as np
import pytest

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.plots import draw_training, read_tensorboard
from tests.envs import Walk, limited


def test_a_picture_of_a_run(tmp_path):
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, device="cpu", tensorboard_log=str(tmp_path), target_kl=0.03)
    model.learn(256)
    model.logger.close()
    log = read_tensorboard(tmp_path)
    assert (log["train/kl_divergence_loss"].values <= 0.03 + 1e-6).all()
    np.testing.assert_allclose(log["trust_region/target_kl"].values, 0.03, rtol=1e-6)
    draw_training(tmp_path, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_no_log_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TensorBoard event file below"):
        read_tensorboard(tmp_path)
