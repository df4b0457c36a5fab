"""The state of a chain of wrappers and the engine at its bottom, as bytes."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Hashable
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_trpo_ext.sampling.snapshot.adapters import SnapshotAdapter, adapter_for
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import Slot, restore_generators, restore_replaced, seed_generator
from sb3_trpo_ext.sampling.snapshot.layers import Layer
from sb3_trpo_ext.sampling.snapshot.plain import Decoder, Encoder

_Content = tuple[dict[str, Any], list[str]]  # a layer's attributes; names of what is not among them
_UNENCODABLE = (pickle.PicklingError, TypeError, AttributeError)
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
        self._encode(Encoder(io.BytesIO(), self._numbers), None, None)  # refuse now rather than in mid-training

    def save(self, extra: Any) -> bytes:
        """The state as bytes, with something of the caller's that goes with it."""
        buffer = io.BytesIO()
        encoder = Encoder(buffer, self._numbers)
        slots = self._encode(encoder, self.adapter.save(), extra)
        body = buffer.getvalue()
        compressed = len(body) > _COMPRESS_FROM
        if compressed:
            body = zlib.compress(body, 1)
        return pickle.dumps((self.signature, compressed, encoder.states(), slots, body), protocol=5)

    def _encode(self, encoder: Encoder, engine: Any, extra: Any) -> list[Slot]:
        """Write attributes and engine; tell where generators are held."""
        slots: list[Slot] = []
        _ = self._envs[-1].np_random  # gymnasium makes it when it is first asked for
        content: list[_Content | None] = []
        for number, layer in enumerate(self.layers):
            attributes, generators, others = layer.split()
            content.append((attributes, [*generators, *others]))
            slots += [(number, name, encoder.number(generator)) for name, generator in generators.items()]
        if self.adapter.handles is None:
            content[-1] = None
        for key, space in self._spaces:
            if space._np_random is not None:
                slots.append((key, "_np_random", encoder.number(space._np_random)))
        try:
            encoder.dump((content, engine, extra))
        except _UNENCODABLE as error:
            raise self._refusal(content, engine, error) from error
        return slots

    def restore(self, snapshot: bytes, seed: int | None = None) -> Any:
        """Return to a state; what was saved with it is given back.

        :param seed: if given, every generator is seeded afresh from it
        :raises SnapshotError: if the snapshot is of another environment
        """
        try:
            signature, compressed, states, slots, body = pickle.loads(snapshot)
        except (pickle.UnpicklingError, TypeError, ValueError, EOFError) as error:
            raise SnapshotError(f"expected what snapshot() gave, got {type(snapshot).__qualname__}: {error}") from error
        if signature != self.signature:
            raise SnapshotError(f"snapshot of\n  {signature}\ncannot be restored into\n  {self.signature}")
        generators = restore_generators(states, slots, self._owners)
        buffer = io.BytesIO(zlib.decompress(body) if compressed else body)
        content, engine, extra = Decoder(buffer, generators, self._envs).load()
        for layer, of_layer in zip(self.layers, content, strict=True):
            if of_layer is not None:
                layer.put(*of_layer)
        self.adapter.restore(engine)
        if self.adapter.handles is None:  # it may have reset the environment
            restore_replaced(generators, states, slots, self._owners)
        if seed is not None:
            for number, generator in enumerate(generators):
                seed_generator(generator, (seed, number))
            self.adapter.reseed(seed)
        return extra

    def _refusal(self, content: list[_Content | None], engine: Any, error: Exception) -> SnapshotError:
        """What says which attribute cannot be carried, if it is one."""
        for layer, of_layer in zip(self.layers, content, strict=True):
            for name, value in (of_layer[0] if of_layer else {}).items():
                why = self._why_not(value)
                if why is not None:
                    return SnapshotError(
                        f"cannot carry attribute {name!r} of layer {layer.name}: {why}. If it never changes, name it in "
                        f"{layer.name}.snapshot_constants = ({name!r},). If it does, give the environment snapshot_state() "
                        "and restore_state(state), or use register_snapshot_adapter"
                    )
        if self._why_not(engine) is not None:
            return SnapshotError(f"the state that {self.adapter.signature} saved is not plain data: {self._why_not(engine)}")
        return SnapshotError(f"cannot carry the last observation: {error}")

    def _why_not(self, value: Any) -> Exception | None:
        try:
            Encoder(io.BytesIO(), self._numbers).dump(value)
        except _UNENCODABLE as error:
            return error
        return None


def _envs(env: gym.Env) -> list[gym.Env]:
    found = [env]
    while isinstance(found[-1], gym.Wrapper):
        found.append(found[-1].env)
    return found


def _signature(env: gym.Env, layers: list[Layer], adapter: SnapshotAdapter) -> str:
    spec = env.unwrapped.spec
    name = spec.id if spec is not None else f"{type(env.unwrapped).__module__}.{type(env.unwrapped).__qualname__}"
    settings = {} if spec is None else {k: v for k, v in sorted(spec.kwargs.items()) if k != "render_mode"}
    shown = ", ".join(f"{key}={_shown(value)}" for key, value in settings.items())
    chain = " > ".join(layer.name for layer in layers)
    return f"{name}({shown}){layers[-1].tables()} through {chain} on {adapter.signature}"


def _shown(value: Any) -> str:
    """An argument, the same in every process; a long one by its checksum."""
    text = json.dumps(value, default=_json, skipkeys=True)
    return text if len(text) <= 100 else f"{text[:80]}... {zlib.crc32(text.encode()):08x}"


def _json(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else type(value).__qualname__
