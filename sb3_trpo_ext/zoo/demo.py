"""``make demo``: CartPole through the Zoo to 500, evaluated, with a picture of what happened."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch as th

from sb3_trpo_ext.algorithms.trpo import TRPOExt
from sb3_trpo_ext.zoo.registration import config_path, register

ENV_ID = "CartPole-v1"


def train(out: Path, seed: int) -> tuple[Path, Path]:
    """Train with the Zoo's ``train`` verb; the folders of this run and of its TensorBoard log, not earlier ones'."""
    from rl_zoo3.train import train as zoo_train

    runs = out / "zoo"

    def folders() -> list[set[Path]]:
        return [set(out.glob(pattern)) for pattern in (f"zoo/trpo_ext/{ENV_ID}_*", f"tensorboard/{ENV_ID}/*")]

    before = folders()
    sys.argv = [
        "train",
        *("--algo", "trpo_ext", "--env", ENV_ID, "--seed", str(seed)),
        *("--conf-file", str(config_path()), "--log-folder", str(runs)),
        *("--tensorboard-log", str(out / "tensorboard"), "--num-threads", "1", "--eval-freq", "10000"),
        "-P",
    ]
    zoo_train()
    (run,), (log,) = (after - earlier for after, earlier in zip(folders(), before, strict=True))
    return run, log


def main() -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_trpo_ext.plots import draw_training

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    try:
        register()
    except ImportError as error:
        sys.exit(str(error))
    run, log = train(arguments.out, arguments.seed)
    model = TRPOExt.load(run / f"{ENV_ID}.zip", device="cpu")
    env = make_vec_env(ENV_ID, seed=10_000 + arguments.seed)
    mean, spread = evaluate_policy(model, env, n_eval_episodes=20)
    saved = arguments.out / "cartpole.zip"
    model.save(saved)
    picture = arguments.out / "cartpole.png"
    draw_training(log, picture)
    print(f"\n20 deterministic episodes with the final policy: {mean:.1f} ± {spread:.1f} (500 is the most there is)")
    print(f"model: {saved}\npicture: {picture}")


if __name__ == "__main__":
    main()
