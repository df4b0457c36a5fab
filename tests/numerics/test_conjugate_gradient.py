import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_trpo_ext.numerics.conjugate_gradient import CGStatus, conjugate_gradient


def positive_definite(n, condition, seed, spectrum="log"):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    eigenvalues = np.geomspace(1.0, condition, n) if spectrum == "log" else np.linspace(1.0, condition, n)
    return th.as_tensor(basis * eigenvalues @ basis.T), th.as_tensor(rng.normal(size=n))


class Counted:
    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v):
        self.calls += 1
        return self.matrix @ v


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 80),
    st.floats(1.0, 100.0),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["log", "linear"]),
    st.floats(-12, 12),
)
def test_well_conditioned_systems_are_solved_within_p_steps(n, condition, seed, spectrum, log_scale):
    A, b = positive_definite(n, condition, seed, spectrum)
    b = b * 10.0**log_scale
    solution = conjugate_gradient(lambda v: A @ v, b, max_steps=n, rtol=1e-8)
    assert solution.status is CGStatus.CONVERGED
    assert solution.iterations <= n
    assert (b - A @ solution.x).norm() <= 1e-8 * b.norm() * (1 + 1e-6)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, b), rtol=0, atol=1e-6 * float(solution.x.norm()))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.floats(2, 16), st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-10, 1e-14]))
def test_the_status_and_the_residual_are_honest_whatever_the_conditioning(n, log_condition, seed, rtol):
    A, b = positive_definite(n, 10.0**log_condition, seed)
    product = Counted(A)
    solution = conjugate_gradient(product, b, max_steps=3 * n, rtol=rtol)
    residual = float((b - A @ solution.x).norm())
    # what rounding makes of b - Ax, whoever computes it
    rounding = 1e-14 * float(b.norm() + th.linalg.matrix_norm(A, 2) * solution.x.norm())
    assert abs(solution.residual_norm - residual) <= rounding
    if solution.status is CGStatus.CONVERGED:
        assert residual <= rtol * float(b.norm()) + rounding
    else:
        assert residual > rtol * float(b.norm()) - rounding
    assert solution.iterations <= 3 * n


def test_one_product_a_step_and_one_to_check_the_end():
    A, b = positive_definite(30, 50.0, 0)
    product = Counted(A)
    solution = conjugate_gradient(product, b, max_steps=5)
    assert (solution.status, solution.iterations, product.calls) == (CGStatus.STEP_LIMIT, 5, 6)
    product = Counted(A)
    assert conjugate_gradient(product, b, max_steps=5, recompute_residual=False).iterations == product.calls == 5


def test_the_recursions_residual_is_the_true_one_on_a_short_run():
    A, b = positive_definite(30, 50.0, 0)
    solution = conjugate_gradient(lambda v: A @ v, b, max_steps=10, recompute_residual=False)
    assert math.isclose(solution.residual_norm, float((b - A @ solution.x).norm()), rel_tol=1e-9)


def test_from_a_zero_start_xAx_is_xb_at_any_step():
    A, b = positive_definite(40, 1e3, 3)
    for steps in (1, 3, 10):
        x = conjugate_gradient(lambda v: A @ v, b, max_steps=steps).x
        assert math.isclose(float(x @ A @ x), float(x @ b), rel_tol=1e-10)


def test_absolute_tolerance():
    A, b = positive_definite(30, 100.0, 1)
    solution = conjugate_gradient(lambda v: A @ v, b, max_steps=30, rtol=0.0, atol=1e-3)
    assert solution.status is CGStatus.CONVERGED
    assert solution.residual_norm <= 1e-3
    assert solution.iterations < 30


def test_zero_right_hand_side_takes_no_product():
    product = Counted(th.eye(3, dtype=th.float64))
    solution = conjugate_gradient(product, th.zeros(3, dtype=th.float64), max_steps=3)
    assert (solution.status, solution.iterations, product.calls) == (CGStatus.ZERO_RHS, 0, 0)
    assert not solution.x.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_b_does_not_matter_in_single_precision(scale):
    A, b = positive_definite(10, 10.0, 2)
    solution = conjugate_gradient(lambda v: A.float() @ v, b.float() * scale, max_steps=20, rtol=1e-5)
    assert solution.status is CGStatus.CONVERGED
    np.testing.assert_allclose(solution.x.double() / scale, np.linalg.solve(A, b), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("matrix", [-np.eye(3), np.diag([1.0, 1.0, -3.0]), np.zeros((3, 3))])
def test_non_positive_curvature(matrix):
    solution = conjugate_gradient(lambda v: th.as_tensor(matrix) @ v, th.ones(3, dtype=th.float64), max_steps=10)
    assert solution.status is CGStatus.NON_POSITIVE_CURVATURE
    assert th.isfinite(solution.x).all()


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("in_range", [True, False])
def test_a_singular_matrix_is_no_fault(dtype, rank, in_range):
    generator = th.Generator().manual_seed(rank)
    basis = th.linalg.qr(th.randn(60, 60, generator=generator, dtype=th.float64))[0][:, :rank].to(dtype)
    scale = th.logspace(0, -2, rank, dtype=dtype)
    b = basis @ th.randn(rank, generator=generator).to(dtype) if in_range else th.randn(60, generator=generator).to(dtype)
    solution = conjugate_gradient(
        lambda v: basis @ (scale * (basis.T @ v)), b, max_steps=100, rtol=0.0, recompute_residual=False
    )
    assert solution.status in (CGStatus.SINGULAR, CGStatus.CONVERGED, CGStatus.STEP_LIMIT)
    assert bool(th.isfinite(solution.x).all())
    if in_range:
        th.testing.assert_close(basis.T @ solution.x, (basis.T @ b) / scale, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_in_b_or_in_a_product(bad):
    b = th.ones(3, dtype=th.float64)
    in_b = conjugate_gradient(lambda v: v, b * th.tensor([1.0, bad, 1.0]), max_steps=3)
    calls = iter([1.0, bad, bad])
    A = th.diag(th.tensor([1.0, 2.0, 3.0], dtype=th.float64))
    in_product = conjugate_gradient(lambda v: next(calls) * (A @ v), b, max_steps=3)
    assert in_b.status is in_product.status is CGStatus.NON_FINITE
    assert in_product.iterations == 1
    assert th.isfinite(in_b.x).all() and th.isfinite(in_product.x).all()


def test_no_random_numbers_are_used_and_b_is_left_alone():
    A, b = positive_definite(5, 10.0, 0)
    kept, state = b.clone(), th.get_rng_state()
    conjugate_gradient(lambda v: A @ v, b, max_steps=5)
    assert th.equal(th.get_rng_state(), state)
    assert th.equal(b, kept)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(b=th.ones(2, 2), max_steps=1), r"shape \(P,\), got shape \(2, 2\)"),
        (dict(b=th.ones(2), max_steps=0), "max_steps must be at least 1, got 0"),
        (dict(b=th.ones(2), max_steps=1, rtol=-1.0), "rtol=-1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, **arguments)
