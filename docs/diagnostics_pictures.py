"""Draws ``healthy.png`` and ``sick.png`` for the page on reading a run; takes a minute or two."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.logs import read_runs
from sb3_trpo_ext.plots import PANELS, draw_page

HERE = Path(__file__).parent
RUNS = {
    "healthy": dict(n_steps=512),
    "sick": dict(n_steps=32, target_kl=1.0, cg_damping=0.0),
}
NOTES = {
    "healthy": {
        "Return": "rises",
        "KL(old ‖ new) against its bound": "below the bound: damping shortens steps",
        "Improvement of the surrogate": "actual close to expected",
        "Fraction of the full step taken": "1: the model holds",
        "Outcomes of the updates": "accepted alone",
        "Residual of conjugate gradient": "small",
        "Explained variance of the critic": "towards 1",
    },
    "sick": {
        "Return": "hardly moves",
        "KL(old ‖ new) against its bound": "anywhere: the search decides, not the model",
        "Improvement of the surrogate": "expected far above actual",
        "Fraction of the full step taken": "often below 1: the model does not hold",
        "Outcomes of the updates": "some refused",
        "Residual of conjugate gradient": "larger, as nothing damps",
        "Explained variance of the critic": "falls below 0",
    },
}


def run(folder: Path, arguments: dict, total_timesteps: int) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0), gamma=0.9)
    model = TRPOExt("MlpPolicy", env, gamma=0.9, seed=0, device="cpu", **arguments)
    model.set_logger(configure(str(folder), ["csv"]))
    model.learn(total_timesteps)
    model.logger.close()


def picture(name: str, total_timesteps: int) -> None:
    with TemporaryDirectory() as folder:
        run(Path(folder), RUNS[name], total_timesteps)
        figure = draw_page({name: read_runs(Path(folder))}, columns=2)
    arguments = ", ".join(f"{key}={value}" for key, value in RUNS[name].items())
    figure.suptitle(f"Pendulum-v1, two environments, {arguments}")
    for panel, ax in zip(PANELS, figure.axes, strict=True):
        if note := NOTES[name].get(panel.title):
            ax.set_title(f"{panel.title}\n{note}", fontsize="medium")
    figure.savefig(HERE / f"{name}.png", dpi=80)


def main(total_timesteps: int = 60_000) -> None:
    th.set_num_threads(1)
    for name in RUNS:
        picture(name, total_timesteps)


if __name__ == "__main__":
    main()
