"""Files on the disk: whole or passed over, never a crash, never a wrong resume."""

import os
import random
import warnings

import numpy as np
import pytest

from sb3_trpo_ext.checkpoints import DamagedError
from sb3_trpo_ext.checkpoints.folder import Folder, Position
from sb3_trpo_ext.checkpoints.journal import Journal
from tests.checkpoints.runs import N_STEPS, assert_equal_models, train

STEPS = 6 * 2 * N_STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in one go, and the folder of one that was interrupted near its end."""
    root = tmp_path_factory.mktemp("runs")
    whole, _ = train(root / "whole", STEPS)
    train(root / "killed", STEPS, kill_at=STEPS - 3)
    return whole, {path.name: path.read_bytes() for path in (root / "killed").iterdir()}


def lay_out(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def newest(files):
    return max(name for name in files if name.endswith(".checkpoint"))


def cut(data, part):
    return data[: int(part * len(data))]


def flipped(data, part):
    position = min(int(part * len(data)), len(data) - 1)
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


PLACES = [round(i / 20, 2) for i in range(20)]


@pytest.mark.parametrize("harm", [cut, flipped])
def test_a_damaged_checkpoint_is_never_read(tmp_path, runs, harm):
    _, files = runs
    lay_out(files, tmp_path / "run")
    position = Folder(tmp_path / "run").positions()[0]
    for part in [*PLACES, 0.999999]:
        (tmp_path / "run" / position.name).write_bytes(harm(files[position.name], part))
        with pytest.raises(DamagedError):
            Folder(tmp_path / "run").read(position)


@pytest.mark.parametrize("harm", ["cut", "zeroed", "empty", "gone", "swapped"])
def test_the_one_before_is_taken(tmp_path, runs, harm):
    whole, files = runs
    lay_out(files, tmp_path / "run")
    path = tmp_path / "run" / newest(files)
    data = files[path.name]
    before = sorted(name for name in files if name.endswith(".checkpoint"))[-2]
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": cut(data, 0.7), "zeroed": bytes(len(data)), "empty": b"", "swapped": files[before]}[harm])
    if harm == "swapped":
        (tmp_path / "run" / before).write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed, checkpoints = train(tmp_path / "run", STEPS)
    passed_over = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
    assert [path.name in message for message in passed_over[:1]] == ([] if harm == "gone" else [True])
    assert checkpoints.resumed_at < STEPS - 2 * 2 * N_STEPS
    assert_equal_models(whole, resumed)


@pytest.mark.parametrize("harm", ["all", "journal"])
def test_with_nothing_left_the_run_begins_anew(tmp_path, runs, harm):
    whole, files = runs
    files = {
        name: cut(content, 0.5) if name.endswith(".checkpoint" if harm == "all" else ".journal") else content
        for name, content in files.items()
    }
    lay_out({**files, "logs.journal": files.get("logs.journal", b"")}, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed, checkpoints = train(tmp_path / "run", STEPS)
    if harm == "all":
        assert checkpoints.resumed_at is None
    assert_equal_models(whole, resumed)


def test_the_last_few_are_kept_and_the_end_of_earlier_calls(tmp_path):
    folder = Folder(tmp_path, keep=2)
    for call, iterations in ((1, (0, 5, 10, 15)), (2, (0, 3)), (3, (0, 1, 2))):
        for iteration in iterations:
            folder.write(Position(call, iteration), {})
    assert folder.positions() == [Position(3, 2), Position(3, 1), Position(2, 3), Position(1, 15)]
    folder.write(Position(2, 4), {})  # another course was taken
    assert folder.positions() == [Position(2, 4), Position(2, 3), Position(1, 15)]


def test_nothing_unfinished_is_left(tmp_path):
    (tmp_path / "learn1-iteration00000004.checkpoint.unfinished").write_bytes(b"half")
    train(tmp_path, 2 * N_STEPS)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_full_disk_is_a_warning_and_a_count(tmp_path, monkeypatch):
    whole, _ = train(tmp_path / "whole", STEPS)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"no checkpoint was written to .*No space left.*training goes on"):
        model, checkpoints = train(tmp_path / "run", STEPS)
    assert checkpoints.failures >= 2
    assert_equal_models(whole, model)
    monkeypatch.undo()
    assert Folder(tmp_path / "run").positions() and not list((tmp_path / "run").glob("*.unfinished"))
    again, checkpoints = train(tmp_path / "run", STEPS)
    assert checkpoints.resumed_at < STEPS
    assert_equal_models(whole, again)


def test_a_folder_that_is_lost_is_made_again(tmp_path):
    import shutil

    from stable_baselines3.common.callbacks import BaseCallback

    class Lose(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == STEPS // 2:
                shutil.rmtree(tmp_path / "run")
            return True

    whole, _ = train(tmp_path / "whole", STEPS)
    train(tmp_path / "run", STEPS, callbacks=[Lose], kill_at=STEPS - 3)
    resumed, checkpoints = train(tmp_path / "run", STEPS)
    assert checkpoints.resumed_at > STEPS // 2
    assert_equal_models(whole, resumed)


def test_one_run_at_a_time(tmp_path):
    folder = Folder(tmp_path)
    folder.lock()
    with pytest.raises(ValueError, match="another run is using"):
        train(tmp_path, STEPS)
    folder.unlock()
    train(tmp_path, 10)
    train(tmp_path, 10)  # it was given back


def test_a_journal_gives_back_each_log_as_it_was(tmp_path):
    rng = random.Random(0)
    logs = {name: tmp_path / name for name in "abc"}
    journal, marks = Journal(tmp_path / "journal"), []
    for _ in range(12):
        for path in logs.values():
            if rng.random() < 0.7:
                with path.open("ab" if rng.random() < 0.8 else "wb") as file:
                    file.write(os.urandom(rng.randint(1, 99)))
        versions = {name: (path, path.read_bytes()[:4]) for name, path in logs.items() if path.exists()}
        mark = journal.write(versions)
        marks.append((mark, {name: path.read_bytes() for name, (path, _) in versions.items()}))
    for mark, expected in marks:
        found = Journal(tmp_path / "journal").contents(mark)
        assert {name: found.get(name, b"") for name in expected} == expected
    mark, expected = marks[5]
    journal = Journal(tmp_path / "journal")
    journal.continue_from(mark, {name: content[:4] for name, content in expected.items()})
    for name, content in expected.items():
        logs[name].write_bytes(content + b"more")
    later = journal.write({name: (path, path.read_bytes()[:4]) for name, path in logs.items() if name in expected})
    assert journal.contents(later) == {name: content + b"more" for name, content in expected.items()}
    assert journal.contents(mark) == {name: content for name, content in expected.items() if content}


def test_positions_sort_by_number():
    rng = np.random.default_rng(0)
    positions = [Position(int(call), int(i)) for call, i in rng.integers(0, 10**6, (50, 2))]
    assert sorted(positions) == sorted(positions, key=lambda position: tuple(position))
