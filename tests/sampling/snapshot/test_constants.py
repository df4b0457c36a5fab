"""Large arrays that stay as they are cost nothing, and one that changes after all is as exact as any other."""

import os

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_trpo_ext import SnapshotWrapper
from sb3_trpo_ext.sampling.snapshot import BranchError, SnapshotError, VecSimulator, check_returns, constants, plain
from tests.sampling.snapshot.families import Own

WORDS = 50_000  # 400 kB


class Table(Own):
    """Reads a table, and writes to it when it is asked for action 1, if at all."""

    writes = False

    def __init__(self):
        super().__init__()
        self.table, self.steps = self.made(), 0
        self.alias = [self.table]

    def made(self):
        return np.arange(WORDS, dtype=np.float64).reshape(50, -1)

    def step(self, action):
        self.steps += 1
        read = self.table[self.steps % 7, 3]
        if self.writes and action == 1:
            self.write()
        observation, *rest = super().step(action)
        return observation + np.float32(read), *rest

    def write(self):
        self.alias[0][self.steps % 7, 3] += 1000.0


class Writes(Table):
    writes = True


class WritesByReshaping(Writes):
    def write(self):
        np.add(self.table, 1.0, out=self.table)
        self.table = self.table + 1.0
        self.alias = [self.table]


class FortranTable(Writes):
    def made(self):
        return np.asfortranarray(super().made())


class PartOfATable(Writes):
    def made(self):
        return np.repeat(super().made(), 2, axis=1)[:, ::2]


class TableOfBytes(Writes):
    def made(self):
        return np.random.default_rng(0).integers(256, size=(50, 4001), dtype=np.uint8)

    def write(self):
        self.table[self.steps % 7, 3] ^= 1


class TableMadeInReset(Writes):
    def reset(self, **kwargs):
        self.table[...] = self.made() + 1.0
        return super().reset(**kwargs)


class TableWithARow(Writes):
    def __init__(self):
        super().__init__()
        self.rows = [self.table[row] for row in range(7)]

    def write(self):
        self.rows[self.steps % 7][3] += 1000.0


class ReadOnlyTable(Table):
    def made(self):
        table = super().made()
        table.flags.writeable = False
        return table


class MappedTable(Table):
    path = None

    def made(self):
        return np.load(self.path, mmap_mode="r")


class OtherTables(Writes):
    """Each environment has its own."""

    def made(self):
        return super().made() + np.random.default_rng(int.from_bytes(os.urandom(4), "big")).random()


def run(env_class, branch_action, trunk_actions=(0,) * 10):
    """Observations of a trunk and of branches from its states."""
    venv = make_vec_env(env_class, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    seen, snapshots = [venv.reset()], []
    simulator = VecSimulator(venv)
    for t, action in enumerate(trunk_actions):
        snapshots.append(simulator.snapshot(t % 2))
        seen.append(venv.step(np.array([action, 0]))[0])
        if t % 3 == 2:
            with simulator.branching():
                for n, snapshot in enumerate(snapshots):
                    simulator.restore(n % 2, snapshot, seed=n)
                    seen += [simulator.step(np.array([branch_action(k)] * 2))[0].copy() for k in range(4)]
    sizes = [len(snapshot.env) for snapshot in snapshots]
    venv.close()
    return np.array(seen), sizes


def without_constants(monkeypatch):
    monkeypatch.setattr(plain, "LARGE", 1 << 40)


@pytest.mark.parametrize(
    "env_class",
    [
        Table,
        Writes,
        WritesByReshaping,
        FortranTable,
        PartOfATable,
        TableOfBytes,
        TableMadeInReset,
        TableWithARow,
        ReadOnlyTable,
    ],
)
@pytest.mark.parametrize("branches", [(0, 0, 0, 0), (0, 1, 0, 1)])
@pytest.mark.parametrize("trunk", [(0,) * 10, (0, 0, 0, 0, 1, 0, 0, 1, 1, 0)])
def test_a_table_is_exact_whoever_changes_it(env_class, branches, trunk, monkeypatch):
    seen, sizes = run(env_class, branches.__getitem__, trunk)
    changed = env_class.writes and any(trunk)
    assert (max(sizes) < 5000) is not changed or env_class is TableWithARow
    assert sizes[0] < 5000
    without_constants(monkeypatch)
    expected, sizes = run(env_class, branches.__getitem__, trunk)
    np.testing.assert_array_equal(seen, expected)
    assert min(sizes) > 5000


def test_a_mapped_table_is_not_copied(tmp_path, monkeypatch):
    np.save(tmp_path / "table.npy", Table().table)
    monkeypatch.setattr(MappedTable, "path", tmp_path / "table.npy")
    assert max(run(MappedTable, int)[1]) < 5000


@pytest.mark.parametrize("cls", [None, SubprocVecEnv])
def test_environments_with_other_tables_exchange_snapshots(cls):
    kwargs = {} if cls is None else {"start_method": "fork"}
    venv = make_vec_env(OtherTables, n_envs=2, seed=0, wrapper_class=SnapshotWrapper, vec_env_cls=cls, vec_env_kwargs=kwargs)
    venv.reset()
    simulator = VecSimulator(venv)
    check_returns(venv)
    tables = venv.get_attr("table")
    assert not np.array_equal(*tables)
    snapshot = simulator.snapshot(0)
    assert len(snapshot.env) < 5000
    with simulator.branching():
        simulator.restore(1, snapshot)
        simulator.step(np.ones(2, dtype=int))
        simulator.restore(1, snapshot)
        np.testing.assert_array_equal(venv.get_attr("table")[1], tables[0])
    for table, before in zip(venv.get_attr("table"), tables, strict=True):
        np.testing.assert_array_equal(table, before)
        assert cls is not None or table.flags.writeable
    venv.close()


def test_a_snapshot_by_itself_is_self_contained():
    one, other = SnapshotWrapper(OtherTables()), SnapshotWrapper(OtherTables())
    one.reset(seed=0)
    for _ in range(2):
        other.restore(one.snapshot())
        np.testing.assert_array_equal(other.unwrapped.table, one.unwrapped.table)
        assert len(one.snapshot()) > 5000 > len(one.snapshot(self_contained=False))


def test_a_table_that_nobody_has_is_told(monkeypatch):
    one, other = SnapshotWrapper(OtherTables()), SnapshotWrapper(OtherTables())
    one.reset(seed=0)
    snapshot = one.snapshot(self_contained=False)
    other.restore(snapshot)
    monkeypatch.setattr(constants, "_contents", {})  # as in another process
    third = SnapshotWrapper(OtherTables())
    with pytest.raises(SnapshotError, match="large array by its content"):
        third.restore(snapshot)


class Breaks(Table):
    def step(self, action):
        if action == 1 and self.steps == 2:
            raise ZeroDivisionError("not twice")
        return super().step(action)


def test_an_error_in_a_branch_is_told_as_ever():
    with pytest.raises(BranchError, match="ZeroDivisionError: not twice"):
        run(Breaks, (1, 1, 1, 1).__getitem__, trunk_actions=(0,) * 4)


HIDDEN = {}


class WritesBehindOnesBack(Writes):
    def made(self):
        table = super().made().copy()
        HIDDEN[self.number()] = table.reshape(-1)
        return table

    def number(self):
        return 0

    def write(self):
        HIDDEN[self.number()][3] += 1.0


def test_writing_through_what_nobody_can_see_is_told_once():
    venv = make_vec_env(WritesBehindOnesBack, n_envs=1, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    simulator = VecSimulator(venv)
    snapshot = simulator.snapshot(0)

    def branch():
        with simulator.branching():
            simulator.restore(0, snapshot, seed=0)
            simulator.step(np.ones(1, dtype=int))

    table = venv.get_attr("table")[0].copy()
    with pytest.raises(SnapshotError, match="attribute 'table' of layer WritesBehindOnesBack had not changed before"):
        branch()
    np.testing.assert_array_equal(venv.get_attr("table")[0], table)
    branch()
    np.testing.assert_array_equal(venv.get_attr("table")[0], table)


class TableOfObjects(Own):
    def __init__(self):
        super().__init__()
        self.table = {(i, j): float(i * j) for i in range(400) for j in range(200)}


def test_a_large_attribute_that_is_copied_each_time_is_named_once():
    env = SnapshotWrapper(TableOfObjects())
    env.reset(seed=0)
    with pytest.warns(UserWarning, match=r"attribute 'table' of layer TableOfObjects, .*snapshot_constants = \('table',\)"):
        env.snapshot(self_contained=False)
    env.snapshot(self_contained=False)
