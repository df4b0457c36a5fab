"""The state of a chain of wrappers and the engine at its bottom, as bytes."""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Hashable
from typing import Any

import gymnasium as gym

from sb3_trpo_ext.sampling.snapshot.adapters import SnapshotAdapter, adapter_for
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import Slot, restore_generators, restore_replaced, seed_generator
from sb3_trpo_ext.sampling.snapshot.layers import Layer
from sb3_trpo_ext.sampling.snapshot.plain import Decoder, Encoder

_COMPRESS_FROM = 1 << 15  # bytes; only screens are larger, and they shrink tenfold


class Chain:
    """A wrapped environment, from the outermost layer to the engine.

    :raises SnapshotError: naming the layer and what to do, if something in it cannot be carried
    """

    def __init__(self, env: gym.Env) -> None:
        envs = _envs(env)
        self.adapter = adapter_for(env.unwrapped)
        self.layers = [Layer(layer, self.adapter) for layer in envs]
        self._envs = envs
        self._numbers = {id(layer): number for number, layer in enumerate(envs)}
        self._owners: dict[Hashable, Any] = dict(enumerate(envs))
        for number, layer in enumerate(self.layers):
            self._owners |= {(number, key): space for key, space in layer.spaces()}
        spaces = {id(space): (key, space) for key, space in self._owners.items() if isinstance(space, gym.Space)}
        self._spaces = list(spaces.values())
        self.signature = _signature(env, self.layers, self.adapter)
        self.save(None)  # refuse now rather than in mid-training

    def save(self, extra: Any) -> bytes:
        """The state as bytes, with something of the caller's that goes with it."""
        try:
            return self._save(extra)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            self._refuse(error)
            raise

    def _save(self, extra: Any) -> bytes:
        buffer = io.BytesIO()
        encoder = Encoder(buffer, self._numbers)
        slots: list[Slot] = []
        _ = self._envs[-1].np_random  # gymnasium makes it when it is first asked for
        content: list[dict[str, Any] | None] = []
        for number, layer in enumerate(self.layers):
            attributes, generators = layer.split()
            content.append(attributes)
            slots += [(number, name, encoder.number(generator)) for name, generator in generators.items()]
        if self.adapter.handles is None:
            content[-1] = None
        for key, space in self._spaces:
            if space._np_random is not None:
                slots.append((key, "_np_random", encoder.number(space._np_random)))
        encoder.dump((content, self.adapter.save(), extra))
        body = buffer.getvalue()
        compressed = len(body) > _COMPRESS_FROM
        if compressed:
            body = zlib.compress(body, 1)
        return pickle.dumps((self.signature, compressed, encoder.states(), slots, body), protocol=5)

    def restore(self, snapshot: bytes, seed: int | None = None) -> Any:
        """Return to a state; what was saved with it is given back.

        :param seed: if given, every generator is seeded afresh from it
        :raises SnapshotError: if the snapshot is of another environment
        """
        signature, compressed, states, slots, body = pickle.loads(snapshot)
        if signature != self.signature:
            raise SnapshotError(f"snapshot of\n  {signature}\ncannot be restored into\n  {self.signature}")
        generators = restore_generators(states, slots, self._owners)
        buffer = io.BytesIO(zlib.decompress(body) if compressed else body)
        content, engine, extra = Decoder(buffer, generators, self._envs).load()
        for layer, attributes in zip(self.layers, content, strict=True):
            if attributes is not None:
                layer.put(attributes)
        self.adapter.restore(engine)
        if self.adapter.handles is None:  # it may have reset the environment
            restore_replaced(generators, states, slots, self._owners)
        if seed is not None:
            for number, generator in enumerate(generators):
                seed_generator(generator, (seed, number))
            self.adapter.reseed(seed)
        return extra

    def _refuse(self, error: Exception) -> None:
        """:raises SnapshotError: naming the attribute that cannot be carried, if it is one"""
        for layer in self.layers:
            for name, value in layer.split()[0].items():
                try:
                    Encoder(io.BytesIO(), self._numbers).dump(value)
                except (pickle.PicklingError, TypeError, AttributeError) as why:
                    raise SnapshotError(
                        f"cannot carry attribute {name!r} of layer {layer.name}: {why}. If it never changes, name it in "
                        f"{layer.name}.snapshot_constants = ({name!r},). If it does, give the environment snapshot_state() "
                        "and restore_state(state), or use register_snapshot_adapter"
                    ) from error


def _envs(env: gym.Env) -> list[gym.Env]:
    found = [env]
    while isinstance(found[-1], gym.Wrapper):
        found.append(found[-1].env)
    return found


def _signature(env: gym.Env, layers: list[Layer], adapter: SnapshotAdapter) -> str:
    spec = env.unwrapped.spec
    name = spec.id if spec is not None else f"{type(env.unwrapped).__module__}.{type(env.unwrapped).__qualname__}"
    settings = {} if spec is None else spec.kwargs
    shown = [f"{key}={value!r}" for key, value in sorted(settings.items()) if isinstance(value, (int, float, str, tuple))]
    shown = [setting for setting in shown if not setting.startswith("render_mode=")]
    chain = " > ".join(layer.name for layer in layers)
    return f"{name}({', '.join(shown)}) through {chain} on {adapter.signature}"
