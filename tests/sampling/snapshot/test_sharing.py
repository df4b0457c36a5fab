"""What attributes share with each other: kept as it was, or refused by the attribute's name."""

import array
import functools
import itertools
import random
import types
import weakref
from collections import defaultdict, deque

import numpy as np
import pytest
import torch as th
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import SnapshotWrapper, check_snapshot
from sb3_trpo_ext.sampling.snapshot import ReplayError, SnapshotAdapter, SnapshotError, VecSimulator, check_returns
from sb3_trpo_ext.sampling.snapshot.adapters import _BY_CLASS
from tests.sampling.snapshot.families import Own


class Shares(Own):
    """A point that moves by noise and by what its attributes make of the action."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.begin()
        return observation, info

    def step(self, action):
        self.position = self.position + 0.01 * self.np_random.normal() + self.push(int(action))
        return self.position.astype(np.float32), float(self.position[0]), False, False, {}


class Player:
    def __init__(self):
        self.at = 0

    def go(self, steps):
        self.at += steps

    def left(self):
        self.at -= 1

    def right(self):
        self.at += 1


class HasAPlayer(Shares):
    def begin(self):
        self.player = Player()
        self.moves = self.wired(self.player)

    def push(self, action):
        self.moves[action]()
        return self.player.at


class BoundMethods(HasAPlayer):
    def wired(self, player):
        return {0: player.left, 1: player.right}


class BoundInTheConstructor(HasAPlayer):
    def __init__(self):
        super().__init__()
        super().begin()

    wired = BoundMethods.wired

    def begin(self):
        self.player.at = 0


class Partials(HasAPlayer):
    def wired(self, player):
        return [functools.partial(player.go, -1), functools.partial(Player.go, player, 2)]


class Closures(HasAPlayer):
    def wired(self, player):
        return [lambda: player.left(), lambda steps=player: steps.right()]


class ClosuresOverSelf(HasAPlayer):
    def wired(self, player):
        return [lambda: self.player.left(), types.MethodType(HasAPlayer.right, self)]

    def right(self):
        self.player.right()


HasAPlayer.right = ClosuresOverSelf.right


class VariablesOfFunctions(Shares):
    def begin(self):
        taken = 0

        def take(action):
            nonlocal taken
            taken += action

        def again(n):
            return again(n - 1) if n else taken

        self.take, self.get = take, again

    def push(self, action):
        self.take(action)
        return self.get(2)


class StateMachine(Shares):
    def __init__(self):
        super().__init__()
        self.mode = self.calm

    def begin(self):
        self.mode = self.calm

    def calm(self, action):
        self.mode = self.wild if action else self.calm
        return 1

    def wild(self, action):
        self.mode = self.wild if action else self.calm
        return -10

    def push(self, action):
        return self.mode(action)


class ChoosesCode(Shares):
    """By a function of a module, a class, a ufunc and two functions without a name."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (lambda: 1), (lambda: -10)
        self.now = self.one

    def begin(self):
        self.now, self.function, self.kind, self.ufunc = self.one, abs, int, np.sin

    def push(self, action):
        result = self.now() + self.function(-2.0) + (self.kind is int) + float(self.ufunc(1.0))
        self.now, self.function, self.kind, self.ufunc = (
            (self.other, float, float, np.cos) if action else (self.one, abs, int, np.sin)
        )
        return result


class MethodsOfContainers(Shares):
    def begin(self):
        self.log, self.bytes = [], bytearray()
        self.add, self.todo, self.put = self.log.append, [self.up, self.down], self.bytes.append

    def up(self):
        return 1

    def down(self):
        return -2

    def push(self, action):
        self.add(action)
        self.put(action)
        self.todo.append(self.up if action else self.down)
        return self.todo.pop(0)() + sum(self.log) + sum(self.bytes)


class MethodsOfGenerators(Shares):
    def begin(self):
        self.python, self.numpy = random.Random(1), np.random.RandomState(1)
        self.draws = self.python.gauss, self.python.random, self.numpy.normal, self.np_random.normal
        self.same = [self.python, {"numpy": self.numpy}]

    def push(self, action):
        others = self.same[0].random() + self.same[1]["numpy"].random() + self.np_random.random()
        return others + sum(draw(0, 1) if draw is not self.draws[1] else draw() for draw in self.draws)


class Patched(Shares):
    def begin(self):
        vars(self).pop("push", None)
        inner, seen = self.push, [0]

        @functools.wraps(inner)
        def push(action):
            seen[0] += 1
            return inner(action) + seen[0]

        self.push = push

    def push(self, action):
        return action


class Views(Shares):
    def begin(self):
        self.board = np.zeros((3, 4), order="F" if self.np_random.random() < 0.5 else "C")
        self.row, self.nested = self.board[0], {"rows": [self.board.T[::-1, 1], self.board[1:]]}
        self.bits = self.board[2, 1:].view(np.uint64)[::2]
        self.records = np.zeros(3, dtype=[("a", "f8"), ("b", "i4")])
        self.field = self.records["b"]

    def push(self, action):
        self.row[action] += 1
        self.nested["rows"][0][action] += 2
        self.nested["rows"][1][-1, action] += 3
        self.bits[1] += action
        self.field[action] += 1
        return self.board @ np.arange(4.0) @ np.arange(1.0, 4.0) + self.records["b"].sum()


class ViewsOfNothingElse(Shares):
    def begin(self):
        hidden, self.bytes = np.zeros(5), bytearray(4)
        self.one, self.other = hidden[:3], hidden[1:]
        self.numbers = np.frombuffer(self.bytes, np.uint8)[1:]
        self.fixed = np.broadcast_to(self.one[:1], (2, 1))

    def push(self, action):
        assert not self.fixed.flags.writeable
        self.one[1 + action] += 1
        self.numbers[action] += 1
        return self.other[0] - 2 * self.other[1] + sum(self.bytes) + self.fixed.sum()


class OneListUnderManyNames(Shares):
    def begin(self):
        self.a, self.d, self.f = [0], np.zeros(2), {}
        self.b, self.c, self.e, self.g = self.a, {"in": (self.a, [self.a])}, [self.d], self.f
        self.q = deque([1.0], maxlen=3)
        self.r = [self.q, iter(self.a), enumerate(self.a), defaultdict(lambda: 2)]

    def push(self, action):
        self.c["in"][1][0].append(action)
        self.e[0][action] += 1
        self.g[action] = 1
        self.r[0].append(action)
        self.r[3][len(self.r[3])] += action
        return sum(self.b) + self.d[0] + len(self.f) + sum(self.q) + next(self.r[1]) + sum(next(self.r[2]))


class Mode:
    def __init__(self):
        self.used = 0


IDLE, BUSY, NOTHING = Mode(), Mode(), object()


class KnownByIdentity(Shares):
    ROOMS = (Mode(), Mode())

    def begin(self):
        self.mode, self.what, self.room = IDLE, NOTHING, self.ROOMS[0]

    def push(self, action):
        result = 1 * (self.mode is IDLE) + 10 * (self.what is NOTHING) + 100 * (self.room is self.ROOMS[0])
        self.mode, self.what, self.room = (BUSY, None, self.ROOMS[1]) if action else (IDLE, NOTHING, self.ROOMS[0])
        return result


EXACT = [
    BoundMethods, BoundInTheConstructor, Partials, Closures, ClosuresOverSelf, VariablesOfFunctions, StateMachine,
    ChoosesCode, MethodsOfContainers, MethodsOfGenerators, Patched, Views, ViewsOfNothingElse, OneListUnderManyNames,
    KnownByIdentity,
]  # fmt: skip


def trunk(env_class, with_branches):
    venv = make_vec_env(env_class, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    observations = [venv.reset()]
    simulator = VecSimulator(venv)
    for t in range(14):
        if with_branches and t in (0, 5):
            snapshot = simulator.snapshot(0)
            with simulator.branching():
                for index in range(2):
                    simulator.restore(index, snapshot, seed=3)
                for _ in range(3):
                    simulator.step(np.ones(2, dtype=int))
        observations.append(venv.step(np.array([t % 2, t % 3 == 0]))[0])
    return np.array(observations)


@pytest.mark.parametrize("env_class", EXACT)
def test_what_is_shared_stays_shared(env_class):
    check_snapshot(env_class, n_snapshots=3, n_steps=20)
    venv = make_vec_env(env_class, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    check_returns(venv)
    np.testing.assert_array_equal(trunk(env_class, with_branches=False), trunk(env_class, with_branches=True))


def proxy(env):
    env.held = Player()
    return weakref.proxy(env.held)


def reference(env):
    env.held = Player()
    return weakref.ref(env.held)


def of_an_object_array(env):
    env.held = np.zeros((2, 2), dtype=object)
    return env.held[0]


def masked(env):
    env.held = np.zeros(3)
    return np.ma.array(env.held, copy=False)


def of_a_tensor(env):
    env.held = th.zeros(3)
    return env.held.numpy()


def tensor_of_an_array(env):
    env.held = np.zeros(3)
    return th.from_numpy(env.held)


def of_one_tensor(env):
    tensor = th.zeros(3)
    env.held = tensor.numpy()
    return [tensor.numpy()]


def tensor_of_a_tensor(env):
    env.held = th.zeros(3)
    return {"inside": env.held[1:]}


def bit_generator(env):
    env.held = np.random.PCG64(1)
    return np.random.Generator(env.held)


class OwnRandom(random.Random):
    pass


REFUSED = {
    "proxy": proxy,
    "reference": reference,
    "weak keys": lambda env: weakref.WeakKeyDictionary(),
    "object array": of_an_object_array,
    "masked array": masked,
    "array of a tensor": of_a_tensor,
    "tensor of an array": tensor_of_an_array,
    "two arrays of one tensor": of_one_tensor,
    "tensor of a tensor": tensor_of_a_tensor,
    "memoryview": lambda env: memoryview(bytearray(3)),
    "array.array": lambda env: array.array("d", [0]),
    "flat": lambda env: np.zeros(3).flat,
    "generator function": lambda env: (i for i in range(3)),
    "count": lambda env: itertools.count(),
    "cycle": lambda env: itertools.cycle([1, 2]),
    "iterator of a dict": lambda env: iter({1: 2}.values()),
    "iterator of a set": lambda env: iter({1}),
    "view of a dict": lambda env: {}.keys(),
    "super": lambda env: super(Own, env),
    "the system's generator": lambda env: random.SystemRandom(),
    "a generator of one's own, nested": lambda env: [OwnRandom(1)],
    "closure": lambda env: (lambda it: lambda: next(it))(itertools.count()),
    "partial": lambda env: functools.partial(next, itertools.count()),
    "method": lambda env: weakref.WeakSet().add,
    "code of no module": lambda env: eval("lambda x: lambda: x", {})([1]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_stay_shared_is_refused_by_name(kind):
    env = Own()
    env.thing = REFUSED[kind](env)
    with pytest.raises(SnapshotError, match=r"cannot carry attribute 'thing' of layer Own: "):
        SnapshotWrapper(env)


def test_two_attributes_that_share_a_bit_generator_are_refused():
    env = Own()
    env.thing = bit_generator(env)
    with pytest.raises(SnapshotError, match=r"attribute 'held' of layer Own.*PCG64"):
        SnapshotWrapper(env)


class ViewsOfTheEngineInside(HopperEnv):
    def __init__(self):
        super().__init__()
        self.heights = [self.data.qpos[1:2]]


class ViewsOfTheEngineThatMove(HopperEnv):
    def __init__(self):
        super().__init__()
        self.height = self.data.qpos[1:2]

    def step(self, action):
        self.height = self.data.qpos[2:3]
        return super().step(action)


def test_views_of_an_engines_memory_that_cannot_stay_are_refused():
    with pytest.raises(
        SnapshotError, match=r"attribute 'heights' of layer ViewsOfTheEngineInside.*view of the engine's memory"
    ):
        SnapshotWrapper(ViewsOfTheEngineInside())
    env = SnapshotWrapper(ViewsOfTheEngineThatMove())
    env.reset(seed=0)
    env.snapshot()
    env.step(env.action_space.sample())
    with pytest.raises(SnapshotError, match="attribute 'height' of layer ViewsOfTheEngineThatMove"):
        env.snapshot()


class PopsFromASet(Shares):
    def begin(self):
        self.cells = set(range(64))
        self.cells -= set(range(60)) - {1}
        self.cells.add(64)

    def push(self, action):
        cell = self.cells.pop()
        self.cells.add((7 * cell + action) % 101)
        return cell


class CountsInItsClass(Shares):
    steps = 0

    def begin(self):
        pass

    def push(self, action):
        type(self).steps += 1
        return self.steps


class GlobalGauss(Shares):
    def begin(self):
        self.draw = random.gauss

    def push(self, action):
        return self.draw(0, 1)


@pytest.mark.parametrize("env_class", [PopsFromASet, CountsInItsClass, GlobalGauss])
def test_what_cannot_be_seen_is_found_by_both_checks(env_class):
    with pytest.raises(ReplayError):
        check_snapshot(env_class, n_snapshots=2, n_steps=10)
    venv = make_vec_env(env_class, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    with pytest.raises(ReplayError):
        check_returns(venv)


def test_what_differs_from_a_way_that_nobody_interrupted_is_found(monkeypatch):
    """Restored with restored agree for a mover that is left behind each time."""
    monkeypatch.setattr(BoundMethods, "snapshot_constants", ("moves",), raising=False)
    venv = make_vec_env(BoundMethods, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    with pytest.raises(ReplayError, match="environment 0, restored to step 0 of environment 0"):
        check_returns(venv)


class Arm:
    def __init__(self):
        self.at = 0.0

    def turn(self, by):
        self.at += by


class HasAnArm(Shares):
    """The adapter restores the arm in its place, and a method of it is known elsewhere."""

    def __init__(self):
        super().__init__()
        self.arm = Arm()
        self.turn, self.parts = self.arm.turn, [self.arm]

    def begin(self):
        self.arm.at = 0.0

    def push(self, action):
        self.turn(action)
        return self.parts[0].at + self.arm.at


class ArmAdapter(SnapshotAdapter):
    handles = frozenset({"arm"})

    def save(self):
        return self.env.arm.at

    def restore(self, state):
        self.env.arm.at = state


def test_what_an_adapter_looks_after_is_the_same_wherever_it_is_held(monkeypatch):
    monkeypatch.setitem(_BY_CLASS, HasAnArm, ArmAdapter)
    check_snapshot(HasAnArm, n_snapshots=2, n_steps=20)


def test_functions_of_wrappers_are_carried_with_what_they_close_over():
    def make_env():
        env, seen = BoundMethods(), np.zeros(1)

        def counted(observation):
            seen[0] += 1
            return observation + seen + env.unwrapped.player.at

        env = TransformObservation(env, counted, Own.observation_space)
        return env

    check_snapshot(make_env, n_snapshots=2, n_steps=20)


def test_environments_with_other_functions_do_not_exchange_snapshots():
    envs = []
    for factor in ((lambda: 1), (lambda: len("two"))):
        env = Own()
        env.factor = factor
        envs.append(SnapshotWrapper(env))
        envs[-1].reset(seed=0)
    with pytest.raises(SnapshotError, match="code"):
        envs[1].restore(envs[0].snapshot())
