"""What a saved model says of the library that saved it."""

from __future__ import annotations

import json
import zipfile
from typing import Any

from stable_baselines3.common.save_util import open_path

SB3_CONTRIB_SETTINGS: dict[str, Any] = {
    "kl_reduction": "mean",
    "critic": "adam",
    "line_search_accept_ratio": 0.0,
}
"""What sb3_contrib.TRPO does, in our words."""

FOREIGN = {"sb3_contrib.TRPO": "cg_damping", "PPO": "clip_range"}
"""By the algorithm that saved it, a name that its archives have and each other's lack."""

OURS = frozenset(("kl_reduction", "critic", "outcome_counts", "chunk_size"))
"""Some names that only our archives have."""


def saved_names(path: Any) -> set[str]:
    """The names of the attributes in a saved model, without unpickling any of them."""
    file = open_path(path, "r", suffix="zip")
    position = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            return set(json.loads(archive.read("data"))) if "data" in archive.namelist() else set()
    finally:
        # a file of the user's is left as it came
        file.seek(position) if file is path else file.close()


def saved_by(names: set[str]) -> str | None:
    """Which of the ``FOREIGN`` algorithms saved a model with these names; None if we or another one did."""
    return next((by for by, name in FOREIGN.items() if name in names and names.isdisjoint(OURS)), None)


def settings_of_archive(path: Any, foreign: dict[str | None, dict[str, Any]]) -> dict[str, Any]:
    """What a saved model went by that it does not say itself.

    :param foreign: by :func:`saved_by`, what models of other libraries get
    """
    names = saved_names(path)
    # before there was the name, actions started as SB3's do
    earlier = {} if "initial_std" in names else {"initial_std": None}
    return {**earlier, **foreign.get(saved_by(names), {})}
