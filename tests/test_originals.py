"""SB3's methods are known by what they are: by their code, not by where or when they are found."""

import functools
import importlib
from unittest import mock

import pytest
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext import originals
from sb3_trpo_ext.originals import (
    KNOWN,
    KNOWN_OF_CONTRIB,
    differs_from_contrib,
    differs_from_sb3,
    fingerprint,
    is_of_contrib,
    is_original,
)

PLAIN = "def act(x):\n    return x + 1\n"


def installed(name):
    """What the installed SB3 has under a name of the table."""
    *modules, last, method = name.split(".")
    if last[0].isupper():
        return getattr(getattr(importlib.import_module(".".join(["stable_baselines3.common", *modules])), last), method)
    return getattr(importlib.import_module(".".join(["stable_baselines3.common", *modules, last])), method)


@pytest.mark.parametrize("name", KNOWN)
def test_the_installed_sb3_has_the_methods_that_were_read(name):
    method = installed(name)
    assert is_original(method), (
        f"{name} has the fingerprint {fingerprint(method.__code__)} and is called instead of what is done in its place: "
        "read what has changed in it, then write its fingerprint into KNOWN"
    )


@pytest.mark.parametrize("name", KNOWN_OF_CONTRIB)
def test_the_installed_sb3_contrib_has_the_methods_that_were_read(name):
    module, cls, method = name.rsplit(".", 2)
    policy = getattr(importlib.import_module(module), cls)
    assert is_of_contrib(getattr(policy, method)), fingerprint(getattr(policy, method).__code__)
    # a recurrent policy is no plain one, which is asked about observations alone
    assert differs_from_sb3(policy.__new__(policy), (method,)) and not differs_from_contrib(policy.__new__(policy), (method,))
    mine = type("Mine", (policy,), {method: lambda self: None})
    assert differs_from_contrib(mine.__new__(mine), (method,))


def made_of(source, tmp_path, name):
    """The function that a file of this source defines."""
    path, scope = tmp_path / f"{name}.py", {}
    path.write_text(source)
    exec(compile(source, path, "exec"), scope)
    return scope["act"]


@pytest.mark.parametrize(
    "source, is_same",
    [
        ('def act(x):\n    """Words."""\n    # more of them\n    return x + 1\n', True),
        ("def act(x: int) -> int:\n    return (x + 1)\n\n\ndef other():\n    pass\n", True),
        ("def act(x):\n    return x + 2\n", False),
        ("def act(x, y=0):\n    return x + 1\n", False),
        ("def act(x):\n    print(x)\n    return x + 1\n", False),
    ],
)
def test_a_fingerprint_is_of_what_is_done_and_not_of_how_it_is_written(source, is_same, tmp_path):
    ours, theirs = made_of(PLAIN, tmp_path, "ours"), made_of(source, tmp_path, "theirs")
    assert (fingerprint(ours.__code__) == fingerprint(theirs.__code__)) is is_same


def test_without_a_source_nothing_is_known():
    scope = {}
    exec(compile(PLAIN, "<nowhere>", "exec"), scope)
    assert fingerprint(scope["act"].__code__) is None and not is_original(scope["act"])


METHOD = ActorCriticPolicy.get_distribution


@functools.wraps(METHOD)
def wrapped(self, obs):
    return METHOD(self, obs)


@pytest.mark.parametrize(
    "other", [wrapped, mock.MagicMock(), functools.partial(METHOD), None, ActorCriticPolicy.predict, print]
)
def test_whatever_is_put_in_its_place_is_not_the_original(other):
    assert is_original(METHOD) and not is_original(other)


def test_of_a_subclass_an_instance_and_the_class_itself(monkeypatch):
    class Sub(DiagGaussianDistribution):
        def sample(self):
            return super().sample()

    names = ("proba_distribution", "sample")
    thing = DiagGaussianDistribution(2)
    assert not differs_from_sb3(thing, names) and differs_from_sb3(Sub(2), names)
    thing.sample = thing.mode
    assert differs_from_sb3(thing, names) and not differs_from_sb3(DiagGaussianDistribution(2), names)
    monkeypatch.setattr(DiagGaussianDistribution, "proba_distribution", lambda self, mean, log_std: self)
    assert differs_from_sb3(DiagGaussianDistribution(2), names)


def test_another_sb3_is_not_taken_for_one_that_was_read(monkeypatch):
    monkeypatch.setattr(originals, "KNOWN", {**KNOWN, "policies.ActorCriticPolicy.get_distribution": "of another version"})
    originals._is_known.cache_clear()
    assert not is_original(METHOD)
    originals._is_known.cache_clear()
