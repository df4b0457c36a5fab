"""MuJoCo: the integration state, and the kinematics that lag behind it.

``mjSTATE_INTEGRATION`` alone fixes where the simulation goes, warm start of the solver included. What
environments read before the next step (Ant and Humanoid: ``xpos`` and ``xipos``) is derived from the state
of a substep earlier, so it is carried as it is: ``mj_forward`` would bring it up to date, and be wrong.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_DERIVED_NAMES = (
    "xpos xquat xmat xipos ximat xanchor xaxis geom_xpos geom_xmat site_xpos site_xmat cam_xpos cam_xmat "
    "light_xpos light_xdir subtree_com cinert cvel subtree_linvel subtree_angmom cacc cfrc_int cfrc_ext "
    "sensordata qacc qfrc_actuator actuator_force actuator_length actuator_velocity ten_length ten_velocity energy"
)


_DERIVED = tuple(_DERIVED_NAMES.split())


class MujocoAdapter(SnapshotAdapter):
    """An environment that has one ``mujoco.MjModel`` and one ``mujoco.MjData``."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        engine = {n: v for n, v in vars(env).items() if type(v).__module__.split(".")[0].lstrip("_") == "mujoco"}
        models = [value for value in engine.values() if isinstance(value, mujoco.MjModel)]
        data = [value for value in engine.values() if isinstance(value, mujoco.MjData)]
        if len(models) != 1 or len(data) != 1:
            raise SnapshotError(
                f"{type(env).__qualname__} has {len(models)} MjModel and {len(data)} MjData, expected one of each: "
                "give it snapshot_state() and restore_state()"
            )
        self._names = [next(name for name, value in engine.items() if value is kind[0]) for kind in (models, data)]
        self.handles = frozenset(engine)
        self._viewed: Any = None
        self._views: list[np.ndarray] = []
        self._buffer = np.empty(mujoco.mj_stateSize(models[0], _STATE.value))
        self.signature = f"mujoco {mujoco.__version__}, {len(self._buffer)} numbers"

    def _model_and_data(self) -> list[Any]:
        return [getattr(self.env, name) for name in self._names]

    def _derived(self, data: Any) -> list[np.ndarray]:
        if data is not self._viewed:  # views of its memory, which lives as long as it does
            arrays = [getattr(data, name, None) for name in _DERIVED]
            self._views = [array.reshape(-1) for array in arrays if array is not None and array.size]
            self._viewed = data
        return self._views

    def save(self) -> np.ndarray:
        model, data = self._model_and_data()
        mujoco.mj_getState(model, data, self._buffer, _STATE.value)
        return np.concatenate([self._buffer, *self._derived(data)])

    def restore(self, state: np.ndarray) -> None:
        model, data = self._model_and_data()
        start = len(self._buffer)
        mujoco.mj_setState(model, data, state[:start], _STATE.value)
        for array in self._derived(data):
            array[:] = state[start : start + array.size]
            start += array.size

    def owns_memory_of(self, array: np.ndarray) -> bool:
        owner: Any = array.base
        while isinstance(owner, np.ndarray):
            owner = owner.base
        return owner is self._model_and_data()[1].qpos.base
