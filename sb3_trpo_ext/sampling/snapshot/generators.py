"""Random generators as part of a state: found, restored in place, seeded afresh.

They are restored in place, not replaced, because others may hold them: an environment's spaces, a
closure, an engine.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)

Slot = tuple[Hashable, str, int]  # (owner's key, attribute, number of the generator)


def state_of(generator: Any) -> tuple[str, Any]:
    """(kind, state) of a generator, plain data."""
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator).__name__, generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return "RandomState", generator.get_state(legacy=False)
    return "Random", generator.getstate()


def new_generator(kind: str) -> Any:
    if kind == "RandomState":
        return np.random.RandomState(0)
    if kind == "Random":
        return random.Random(0)
    return np.random.Generator(getattr(np.random, kind)(0))


def set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def seed_generator(generator: Any, entropy: tuple[int, ...]) -> None:
    """Start a generator afresh; different ``entropy`` gives unrelated streams."""
    sequence = np.random.SeedSequence(entropy)
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(sequence).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(sequence.generate_state(8))
    else:
        generator.seed(int.from_bytes(sequence.generate_state(8).tobytes(), "little"))


def kind_of(generator: Any) -> str | None:
    """What :func:`new_generator` would make to match; ``None`` for what is no generator."""
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator).__name__
    if isinstance(generator, np.random.RandomState):
        return "RandomState"
    return "Random" if isinstance(generator, random.Random) else None


def restore_generators(states: list[tuple[str, Any]], slots: Iterable[Slot], owners: Mapping[Hashable, Any]) -> list[Any]:
    """The generators of a snapshot, in the attributes that held them, with the states they had.

    Attributes that shared one generator share one again, and those that did not do not.
    """
    restored: list[Any] = [None] * len(states)
    taken: set[int] = set()
    for key, name, number in slots:
        attributes = vars(owners[key])
        generator = restored[number]
        if generator is None:
            generator = attributes.get(name)
            if kind_of(generator) != states[number][0] or id(generator) in taken:
                generator = new_generator(states[number][0])
            restored[number] = generator
            taken.add(id(generator))
        attributes[name] = generator
    for number, (kind, state) in enumerate(states):
        if restored[number] is None:  # held by something inside the attributes, which is made anew
            restored[number] = new_generator(kind)
        set_state(restored[number], state)
    return restored


def restore_replaced(
    generators: list[Any], states: list[tuple[str, Any]], slots: Iterable[Slot], owners: Mapping[Hashable, Any]
) -> None:
    """The same for generators that have been drawn from or replaced since: ``reset(seed=...)`` makes a new one."""
    for key, name, number in slots:
        generator = vars(owners[key]).get(name)
        if kind_of(generator) == states[number][0]:
            generators[number] = generator
            set_state(generator, states[number][1])


def global_states() -> tuple[Any, Any]:
    """Of the process's own generators: NumPy's and Python's."""
    return np.random.get_state(), random.getstate()


def set_global_states(states: tuple[Any, Any]) -> None:
    np.random.set_state(states[0])
    random.setstate(states[1])
