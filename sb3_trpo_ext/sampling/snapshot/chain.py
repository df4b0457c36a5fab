"""The state of a chain of wrappers and the engine at its bottom, as bytes."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Collection, Hashable
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_trpo_ext.checks import warn_user
from sb3_trpo_ext.sampling.snapshot import elsewhere
from sb3_trpo_ext.sampling.snapshot.adapters import SnapshotAdapter, adapter_for
from sb3_trpo_ext.sampling.snapshot.allowed import code_of_kind, loads_plain
from sb3_trpo_ext.sampling.snapshot.constants import LARGE, Constants, Key, Unread
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import Slot, restore_generators, restore_replaced, seed_generator
from sb3_trpo_ext.sampling.snapshot.layers import Layer
from sb3_trpo_ext.sampling.snapshot.plain import Decoder, Encoder, Place, is_an_object

_Content = tuple[dict[str, Any], list[str]]  # a layer's attributes; names of what is not among them
_UNENCODABLE = (pickle.PicklingError, TypeError, AttributeError)
_COMPRESS_FROM = LARGE  # only screens are larger, and they shrink tenfold
_LARGE_SNAPSHOT = 1 << 20  # bytes; from here on the user is told of it


class Chain:
    """A wrapped environment, from the outermost layer to the engine.

    :param outer: what holds the chain; functions in it may hold that
    :raises SnapshotError: naming the layer and what to do, if something in it cannot be carried
    """

    def __init__(self, env: gym.Env, outer: gym.Env) -> None:
        envs = _envs(env)
        self.adapter = adapter_for(env.unwrapped)
        self.layers = [Layer(layer, self.adapter) for layer in envs]
        self._holding = [(number, layer) for number, layer in enumerate(self.layers) if layer.holds_for_good]
        self.constants = Constants()
        self._met_constants = False
        self._bottom = envs[-1]
        self._staying = [*envs, outer, self.adapter]
        self._holders = elsewhere.holders_of(envs)
        self._places: dict[int, Place] = {
            id(thing): place for place, thing in elsewhere.held_by(self._holders) if is_an_object(thing)
        }
        self._places |= {id(thing): (number,) for number, thing in enumerate(self._staying)}
        self._owners: dict[Hashable, Any] = dict(enumerate(envs))
        for number, layer in enumerate(self.layers):
            self._owners |= {(number, key): space for key, space in layer.spaces()}
        spaces = {id(space): (key, space) for key, space in self._owners.items() if isinstance(space, gym.Space)}
        self._spaces = list(spaces.values())
        self.signature = _signature(env, self.layers, self.adapter)
        self.code = code_of_kind(self.signature)
        self._encode(None, None, Unread())  # refuse now rather than in mid-training

    def save(self, extra: Any, self_contained: bool = True) -> bytes:
        """The state as bytes, with something of the caller's that goes with it.

        :param self_contained: whether it holds large arrays that do not change, or only tells them by their content
        """
        encode = self._encode if self_contained else self._encode_with_constants
        encoder, slots, body = encode(self.adapter.save(), extra)
        self._last = encoder
        compressed = len(body) > _COMPRESS_FROM
        if compressed:
            body = zlib.compress(body, 1)
        return pickle.dumps((self.signature, compressed, encoder.states(), slots, encoder.keys, body), protocol=5)

    def freeze_constants(self) -> None:
        """Those of the snapshot that was just taken."""
        self.constants.freeze(self._last.keys, self._last.shared)

    def _encode_with_constants(self, engine: Any, extra: Any) -> tuple[Encoder, list[Slot], bytes]:
        self.constants.learning = not self._met_constants
        encoded = self._encode(engine, extra, self.constants)
        if not self._met_constants:
            self._met_constants, self.constants.learning = True, False
            self._warn_of_size(len(encoded[2]))
        return encoded

    def _encode(self, engine: Any, extra: Any, constants: Constants | None = None) -> tuple[Encoder, list[Slot], bytes]:
        """Attributes and engine, and where generators are held."""
        _ = self._bottom.np_random  # gymnasium makes it when it is first asked for
        encoded = self._encode_as(frozenset(), engine, extra, constants)
        if encoded[0].shared:  # memory is shared, which is known only when all of it has been met
            encoded = self._encode_as(encoded[0].shared, engine, extra, constants)
        return encoded

    def _encode_as(
        self, shared: Collection[int], engine: Any, extra: Any, constants: Constants | None
    ) -> tuple[Encoder, list[Slot], bytes]:
        buffer = io.BytesIO()
        encoder = self._encoder(buffer, shared, constants)
        slots: list[Slot] = []
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
            raise self._refusal(content, engine, error, shared) from error
        return encoder, slots, buffer.getvalue()

    def _encoder(self, buffer: io.BytesIO, shared: Collection[int], constants: Constants | None) -> Encoder:
        places = self._places.copy()
        for number, layer in self._holding:
            for thing, name in layer.staying():
                places.setdefault(thing, (number, name))
        return Encoder(buffer, self.code, places, constants, self.adapter.owns_memory_of, shared)

    def restore(self, snapshot: bytes, seed: int | None = None) -> Any:
        """Return to a state; what was saved with it is given back.

        :param seed: if given, every generator is seeded afresh from it
        :raises SnapshotError: if the snapshot is of another environment
        """
        try:
            signature, compressed, states, slots, keys, body = loads_plain(snapshot)
        except (pickle.UnpicklingError, TypeError, ValueError, EOFError, AttributeError, IndexError) as error:
            raise SnapshotError(f"expected what snapshot() gave, got {type(snapshot).__qualname__}: {error}") from error
        if signature != self.signature:
            raise SnapshotError(f"snapshot of\n  {signature}\ncannot be restored into\n  {self.signature}")
        constants = self._constants_of(keys) if keys else []
        generators = restore_generators(states, slots, self._owners)
        buffer = io.BytesIO(zlib.decompress(body) if compressed else body)
        try:
            content, engine, extra = Decoder(buffer, self.code, generators, constants, self._at).load()
        except SnapshotError:
            raise
        except (pickle.PickleError, LookupError, TypeError, ValueError, AttributeError, EOFError) as error:
            raise SnapshotError(f"a snapshot that no environment of this kind gave: {error}") from error
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

    def _at(self, *place: Any) -> Any:
        """What stays, in this environment."""
        if isinstance(place[0], int):
            return self._held_for_good(*place)
        thing = elsewhere.at(place) if place[:2] in self._holders else None
        if not is_an_object(thing):
            raise SnapshotError(f"the snapshot needs what {'.'.join(map(str, filter(None, place)))} holds, which is not there")
        return thing

    def _held_for_good(self, number: int, name: str | None = None) -> Any:
        if name is None:
            return self._staying[number]
        if name not in self.layers[number].holds_for_good:
            raise SnapshotError(f"attribute {name!r} of layer {self.layers[number].name} does not stay where it is")
        return vars(self.layers[number].env)[name]

    def _constants_of(self, keys: list[Key]) -> list[np.ndarray]:
        if not self._met_constants:
            self._encode_with_constants(None, None)
        return [self.constants.array_of(key) for key in keys]

    def name_of(self, array: np.ndarray) -> str:
        """For the user."""
        for layer in self.layers:
            for name, value in vars(layer.env).items():
                if value is array:
                    return f"attribute {name!r} of layer {layer.name}"
        return f"an array of shape {array.shape} inside of an attribute"

    def _warn_of_size(self, size: int) -> None:
        if size < _LARGE_SNAPSHOT:
            return
        sizes = {}
        for layer in self.layers:
            for name, value in layer.split()[0].items():
                buffer = io.BytesIO()
                self._encoder(buffer, (), self.constants).dump(value)
                sizes[buffer.tell()] = (name, layer.name)
        largest = max(sizes, default=0)
        if 2 * largest > size:
            name, layer_name = sizes[largest]
            warn_user(
                f"each snapshot copies attribute {name!r} of layer {layer_name}, {largest / 1e6:.1f} MB. If it never "
                f"changes, name it in {layer_name}.snapshot_constants = ({name!r},)"
            )

    def _refusal(
        self, content: list[_Content | None], engine: Any, error: Exception, shared: Collection[int]
    ) -> SnapshotError:
        """What says which attribute cannot be carried, if it is one."""
        before: list[Any] = []
        for layer, of_layer in zip(self.layers, content, strict=True):
            for name, value in (of_layer[0] if of_layer else {}).items():
                before.append(value)  # it may be its sharing with others that cannot be carried
                why = self._why_not(before, shared)
                if why is not None:
                    return SnapshotError(
                        f"cannot carry attribute {name!r} of layer {layer.name}: {why}. If it never changes, name it in "
                        f"{layer.name}.snapshot_constants = ({name!r},). If it does, give the environment snapshot_state() "
                        "and restore_state(state), or use register_snapshot_adapter"
                    )
        why = self._why_not(engine, shared)
        if why is not None:
            return SnapshotError(f"the state that {self.adapter.signature} saved is not plain data: {why}")
        return SnapshotError(f"cannot carry the last observation: {error}")

    def _why_not(self, value: Any, shared: Collection[int]) -> Exception | None:
        try:
            self._encoder(io.BytesIO(), shared, Unread()).dump(value)
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
    return f"{name}({shown}){layers[-1].kept()} through {chain} on {adapter.signature}"


def _shown(value: Any) -> str:
    """An argument, the same in every process; a long one by its checksum."""
    text = json.dumps(value, default=_json, skipkeys=True)
    return text if len(text) <= 100 else f"{text[:80]}... {zlib.crc32(text.encode()):08x}"


def _json(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else type(value).__qualname__
