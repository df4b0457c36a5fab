"""Tuning runs, folder beside folder."""

import pandas as pd
import pytest
from _runs import COLUMNS, Run, write
from tuning import table_of


def test_runs_stand_beside_those_of_the_same_environment_and_seed(tmp_path):
    for folder, env_id, seed, final in (("a", "X", 2, 1.4), ("a", "X", 10, 3.0), ("b", "X", 2, 5.0), ("b", "W", 2, 6.0)):
        rows = pd.DataFrame([{**dict.fromkeys(COLUMNS, 0.0), "timesteps": 1, "mean": final}])
        write(Run({"timesteps": 1}, rows), tmp_path / folder / env_id / f"{seed}.csv")
    assert table_of(tmp_path, ["a", "b"]) == [["W, 2", "", "6"], ["X, 2", "1", "5"], ["X, 10", "3", ""]]
    with pytest.raises(ValueError, match="nothing in c"):
        table_of(tmp_path, ["a", "c"])
