"""Random MDPs and policies for property tests."""

from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_trpo_ext.lab.mdp import random_mdp

SEEDS = st.integers(0, 2**31)
GAMMAS = st.one_of(st.just(0.0), st.floats(0.05, 0.97))


@st.composite
def mdps(draw, concentrations=(0.1, 1.0), max_states=5):
    """Sizes, discounts, near-deterministic and well-mixed dynamics; rewards of every scale."""
    mdp = random_mdp(
        draw(st.integers(1, max_states)),
        draw(st.integers(1, 4)),
        gamma=draw(GAMMAS),
        seed=draw(SEEDS),
        concentration=draw(st.sampled_from(concentrations)),
    )
    return mdp


def random_policy(mdp, seed, spread=2.0):
    """Softmax of normal logits: positive everywhere."""
    logits = spread * np.random.default_rng(seed).normal(size=mdp.shape)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def random_rows(mdp, seed):
    """Policies with zeros among them: Dirichlet rows, some of which are deterministic."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(mdp.shape[1], 0.7), size=mdp.shape[0])
    chosen = np.eye(mdp.shape[1])[rng.integers(mdp.shape[1], size=mdp.shape[0])]
    return np.where(rng.random((mdp.shape[0], 1)) < 0.3, chosen, rows)


def for_all(**strategies):
    """200 examples of each, whatever time they take."""
    return lambda test: settings(max_examples=200, deadline=None)(given(**strategies)(test))


# identities, relative to the size of the numbers in them where that is above 1
def assert_equal(actual, expected, scale=1.0, tolerance=1e-9):
    assert np.abs(np.asarray(actual) - np.asarray(expected)).max() <= tolerance * max(1.0, scale)


well_mixed = partial(mdps, concentrations=(1.0,))
