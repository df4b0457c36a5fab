"""Pictures of a training run, from what it logged to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Series(NamedTuple):
    """Values of one log key, and the timesteps at which they were logged; both (n,)."""

    steps: np.ndarray
    values: np.ndarray


def read_tensorboard(folder: Path) -> dict[str, Series]:
    """The scalars of the newest run below a folder.

    :raises FileNotFoundError: where there is no TensorBoard event file
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no TensorBoard event file below {folder}")
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: Series(
            np.array([event.step for event in events.Scalars(tag)]),
            np.array([event.value for event in events.Scalars(tag)]),
        )
        for tag in events.Tags()["scalars"]
    }


def draw_training(folder: Path, picture: Path) -> None:
    """The learning curve, and the KL of each update against its bound, as one PNG.

    :param folder: holds the TensorBoard log of the run
    :param picture: where to write
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_tensorboard(folder)
    figure, (learning, trust) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for tag, label in (("rollout/ep_rew_mean", "training, last 100 episodes"), ("eval/mean_reward", "evaluation")):
        if tag in log:
            learning.plot(log[tag].steps, log[tag].values, label=label)
    learning.set(xlabel="timesteps", ylabel="return", title="Learning curve")
    trust.plot(log["train/kl_divergence_loss"].steps, log["train/kl_divergence_loss"].values, ".", label="KL(old ‖ new)")
    trust.plot(log["trust_region/target_kl"].steps, log["trust_region/target_kl"].values, "k--", label="bound δ")
    trust.set(xlabel="timesteps", ylabel="nats", title="KL of each update against its bound", ylim=(0.0, None))
    for axes in (learning, trust):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
