"""The benchmark programs import one another as scripts do, from their own folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    import _scores

    monkeypatch.setattr(_scores, "REPEATS", 200)
