import time

import numpy as np
import pytest

from sb3_trpo_ext.logs import Series, across_runs, as_log, read_progress, read_runs, read_tensorboard

HEADER = "time/total_timesteps,rollout/ep_rew_mean,train/loss,note\n"


def series(steps, values):
    return Series(np.array(steps, dtype=float), np.array(values, dtype=float))


def test_cells_without_a_number_are_left_out(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text(HEADER + "64,-3.5,,words\n128,nan,0.25,\n192,-2.5,inf,\n")
    log = read_progress(path)
    assert set(log) == {"time/total_timesteps", "rollout/ep_rew_mean", "train/loss"}
    np.testing.assert_array_equal(log["rollout/ep_rew_mean"], [[64.0, 192.0], [-3.5, -2.5]])
    np.testing.assert_array_equal(log["train/loss"], [[128.0], [0.25]])


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", HEADER])
def test_a_table_without_timesteps_is_refused(tmp_path, content):
    path = tmp_path / "progress.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"progress.csv: expected rows with numbers in a column time/total_timesteps"):
        read_progress(path)


def test_runs_below_a_folder(tmp_path):
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "progress.csv").write_text(HEADER + f"64,{seed},,\n")
    # a run that wrote both is one run
    (tmp_path / "0" / "events.out.tfevents.1").write_bytes(b"")
    assert [run["rollout/ep_rew_mean"].values.tolist() for run in read_runs(tmp_path)] == [[0.0], [1.0], [2.0]]


def test_no_log_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TensorBoard event file below"):
        read_tensorboard(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no progress.csv and no TensorBoard event file below"):
        read_runs(tmp_path)


def test_a_run_counts_as_far_as_it_goes_and_cuts_no_other_short():
    runs = [{"a": series([0, 10, 20], [0, 1, 2])}, {"a": series([5, 15], [1, 3])}, {"b": series([0], [0])}]
    steps, values = across_runs(runs, "a")
    np.testing.assert_array_equal(steps, [0.0, 5.0, 10.0, 15.0, 20.0])
    np.testing.assert_array_equal(values, [[0.0, 0.5, 1.0, 1.5, 2.0], [np.nan, 1.0, 2.0, 3.0, np.nan]])
    assert across_runs(runs, "c") is None


def test_training_from_a_checkpoint_replaces_what_came_after_it(tmp_path):
    path = tmp_path / "progress.csv"
    rows = [(64, 1, 0.5), (128, 2, ""), (192, 3, ""), (256, 4, 0.25), (144, 5, ""), (208, 6, 0.75), (64, 7, ""), (128, 8, "")]
    path.write_text(HEADER + "".join(f"{step},{reward},{loss},\n" for step, reward, loss in [*rows, (112, 9, "")]))
    log = read_progress(path)
    # from a checkpoint at 80; then anew, and that from a checkpoint at 48
    np.testing.assert_array_equal(log["rollout/ep_rew_mean"], [[64, 128, 144, 208, 272, 320], [1, 2, 5, 6, 7, 9]])
    np.testing.assert_array_equal(log["train/loss"], [[64, 208], [0.5, 0.75]])


def test_timesteps_that_are_counted_anew_go_on(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text(HEADER + "64,1,,\n128,2,0.5,\n128,3,,\n64,4,,\n128,5,0.25,\n")
    log = read_progress(path)
    np.testing.assert_array_equal(log["rollout/ep_rew_mean"], [[64, 128, 128, 192, 256], [1, 2, 3, 4, 5]])
    # what is logged more seldom is moved by as much
    np.testing.assert_array_equal(log["train/loss"], [[128, 256], [0.5, 0.25]])


def test_what_was_logged_only_after_the_checkpoint_is_gone_as_a_whole():
    log = as_log([(64, {"a": 1.0}), (128, {"a": 2.0, "b": 3.0}), (96, {"a": 4.0})])
    assert {key: values.values.tolist() for key, values in log.items()} == {"a": [1.0, 4.0]}


def test_a_thousand_checkpoints_take_no_longer_than_their_entries():
    keys = [f"key {n}" for n in range(20)]
    # each goes on from two entries before the last
    entries = [(8 * part + n, dict.fromkeys(keys, float(part))) for part in range(1000) for n in range(10)]
    started = time.process_time()
    log = as_log(entries)
    assert time.process_time() - started < 1.5  # 3.6 when all points were looked through each time
    assert set(log) == set(keys) and log["key 0"].steps.tolist() == [*range(8002)]
    assert log["key 19"].values.tolist() == [*np.repeat(range(1000), 8), 999.0, 999.0]
