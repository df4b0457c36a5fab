import inspect
import math

import pytest
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from sb3_trpo_ext.checks import schedule_of, scheduled, with_keywords_of


def test_a_string_becomes_sb3s_own_linear_schedule():
    schedule = schedule_of("target_kl", "lin_2e-2")
    assert type(schedule) is LinearSchedule
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == [0.02, 0.01, 0.0]


@pytest.mark.parametrize("value", ["lin", "lin_", "lin_x", "lin_nan", "lin_1_0", "exp_0.1", "0.01", True, None, [0.1]])
def test_what_is_neither_number_nor_schedule_is_refused(value):
    with pytest.raises(ValueError, match=r'target_kl must be a number, a schedule or "lin_x" .*got'):
        schedule_of("target_kl", value)


def test_schedules_are_asked_about_progress_from_1_to_0():
    assert scheduled("x", 0.3, 0.5) == 0.3
    assert scheduled("x", ConstantSchedule(0.2), 0.5) == 0.2
    assert scheduled("x", lambda progress: progress, -0.02) == 0.0


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, None, "1"])
def test_a_schedule_that_gives_no_usable_number_is_named(bad):
    with pytest.raises(ValueError, match=r"x at a remaining progress of 0.25 must be a number in \[0, inf\)"):
        scheduled("x", lambda _: bad, 0.25)


class Base:
    def __init__(self, one, two=2, *, three=3):
        self.given = (one, two, three)


class Child(Base):
    @with_keywords_of(Base)
    def __init__(self, one, *, four=4, **keywords):
        super().__init__(one, **keywords)


def test_a_signature_names_what_is_passed_on():
    parameters = inspect.signature(Child).parameters
    assert [(p.name, p.default) for p in parameters.values()][1:] == [("four", 4), ("two", 2), ("three", 3)]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[1:])
    assert Child(1, three=5).given == (1, 2, 5)
