"""Tuning runs, folder beside folder."""

import pandas as pd
import pytest
from _runs import COLUMNS, Run, write
from tuning import table_of


def put(root, name, final, **about):
    rows = pd.DataFrame([{**dict.fromkeys(COLUMNS, 0.0), "timesteps": 1, "mean": final}])
    write(Run({"timesteps": 1, **about}, rows), root / f"{name}.csv")


def test_runs_stand_beside_those_of_the_same_environment_and_seed(tmp_path):
    for name, final in (("a/X/2", 1.4), ("a/X/10", 3.0), ("b/X/2", 5.0), ("b/W/2", 6.0)):
        put(tmp_path, name, final, setting=name[2])
    assert table_of(tmp_path, ["a", "b"]) == [["W, 2", "", "6"], ["X, 2", "1", "5"], ["X, 10", "3", ""]]
    with pytest.raises(ValueError, match=r"below .*c, found none"):
        table_of(tmp_path, ["a", "c"])
    put(tmp_path, "a/X/3", 1.0, setting="another")
    with pytest.raises(ValueError, match=r"one setting and budget below .*X, got several"):
        table_of(tmp_path, ["a", "b"])


def test_runs_from_before_and_after_a_change_of_defaults_do_not_stand_in_one_folder(tmp_path):
    setting = {"arguments": {"policy": "MlpPolicy"}, "n_envs": 1, "normalize": None}
    about = {"algorithm": "trpo_ext_zoo", "env": "Hopper-v5", "setting": setting}
    put(tmp_path, "a/Hopper-v5/1", 1.0, **about, resolved={"policy": "MlpPolicy", "initial_std": None})
    put(tmp_path, "a/Hopper-v5/2", 2.0, **about, resolved={"policy": "MlpPolicy"})
    assert len(table_of(tmp_path, ["a"])) == 2
    put(tmp_path, "a/Hopper-v5/3", 3.0, **about, resolved={"policy": "MlpPolicy", "initial_std": 0.5})
    with pytest.raises(ValueError, match="one setting and budget"):
        table_of(tmp_path, ["a"])
