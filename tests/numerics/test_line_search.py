import pytest

from sb3_trpo_ext.numerics.line_search import backtracking_line_search


def test_tries_the_fractions_in_turn_and_stops_at_the_first_accepted():
    tried = []

    def evaluate(fraction):
        tried.append(fraction)
        return fraction**2

    result = backtracking_line_search(evaluate, lambda f, value: value < 0.3, shrinking_factor=0.5, max_iter=10)
    assert tried == [1.0, 0.5]
    assert (result.accepted, result.fraction, result.value, result.backtracks) == (True, 0.5, 0.25, 1)


def test_says_so_when_none_is_accepted():
    result = backtracking_line_search(lambda f: f, lambda f, value: False, shrinking_factor=0.8, max_iter=3)
    assert (result.accepted, result.fraction, result.backtracks) == (False, 0.0, 3)
    assert result.value == pytest.approx(0.64)


@pytest.mark.parametrize("bad", [dict(shrinking_factor=1.0, max_iter=1), dict(shrinking_factor=0.5, max_iter=0)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="got"):
        backtracking_line_search(lambda f: f, lambda f, v: True, **bad)
