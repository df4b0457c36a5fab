"""The screening's design confounds no main effect with another, and finds the effects that are there."""

import numpy as np
from rl_zoo3.exp_manager import ExperimentManager
from screening import CHOICES, DIMENSIONS, design, effects, setting

from sb3_trpo_ext import TRPOExt
from tests.envs import Walk


def test_main_effects_are_orthogonal_to_one_another_and_to_every_product_of_two():
    signs = 2 * design() - 1
    n_runs, n_choices = signs.shape
    assert n_choices == len(CHOICES) and len(np.unique(signs, axis=0)) == n_runs == 16
    np.testing.assert_array_equal(signs.T @ signs, n_runs * np.eye(n_choices))
    products = [signs[:, i] * signs[:, j] for i in range(n_choices) for j in range(i)]
    assert not (np.array(products) @ signs).any()


def test_effects_are_found_whatever_two_choices_do_together():
    levels, truth = design(), np.array([3.0, -1.0, 0.0, 2.0, 0.5, 0.0, -4.0])
    scores = 10.0 + levels @ truth + 7.0 * (levels[:, 0] - 0.5) * (levels[:, 3] - 0.5)
    found, errors = effects(levels, scores)
    np.testing.assert_allclose(found, truth, atol=1e-12)
    # the product is what is left over: its variance is (7/4)², of which an effect's error is 2/sqrt(16) with 8 degrees of 16
    np.testing.assert_allclose(errors, np.sqrt((7 / 4) ** 2 * 16 / 8 * 4 / 16))
    # of eight runs there are as many figures as runs
    half = effects(levels[[1, 3, 4, 6, 8, 10, 13, 15]], scores[[1, 3, 4, 6, 8, 10, 13, 15]])
    assert np.isnan(half.errors).all() and not np.isnan(half.estimates).any()


def test_every_row_is_a_setting_of_its_own():
    for n_dimensions in DIMENSIONS.values():
        settings = [setting(levels, n_dimensions) for levels in design()]
        assert len({str(row) for row in settings}) == 16
        for row in settings[::5]:
            TRPOExt(env=Walk(), device="cpu", **ExperimentManager._preprocess_schedules(dict(row.arguments)))
