"""One thread for every test, and no display."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import pytest
import torch as th


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    th.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    th.manual_seed(0)
