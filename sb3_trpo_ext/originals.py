"""SB3's own methods, known by their code: whether what a class has now is what SB3 came with.

Some of them are done here in their place, faster. Users replace them: in a subclass, on an instance, in SB3's class
itself, before or after this package is imported; and another SB3 may have other ones. So a method counts as SB3's own
only if its source is one that was read when its replacement was written. In doubt it does not, and is called.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from tokenize import TokenError
from types import CodeType, FunctionType
from typing import Any

KNOWN = {
    "policies.ActorCriticPolicy.forward": "5226de4affc1",
    "policies.ActorCriticPolicy.extract_features": "1fe17aa44973",
    "policies.ActorCriticPolicy.predict_values": "7f57d2064f21",
    "policies.ActorCriticPolicy.evaluate_actions": "17c84df0f64b",
    "policies.ActorCriticPolicy.get_distribution": "876c18ac54ab",
    "policies.ActorCriticPolicy._get_action_dist_from_latent": "044f3bfe7cd5",
    "policies.BaseModel.extract_features": "6b7d531c3724",
    "policies.BaseModel.obs_to_tensor": "2823e1eeb7d5",
    "preprocessing.preprocess_obs": "cef938b66716",
    "torch_layers.FlattenExtractor.forward": "4ebdf13a0e17",
    "torch_layers.MlpExtractor.forward": "3242fb891fb1",
    "torch_layers.MlpExtractor.forward_actor": "9048bdf9117d",
    "torch_layers.MlpExtractor.forward_critic": "331f5977cf0d",
    "distributions.Distribution.get_actions": "ae3f7dd5ead6",
    "distributions.DiagGaussianDistribution.proba_distribution": "59c5633ad658",
    "distributions.DiagGaussianDistribution.sample": "1e13227e2569",
    "distributions.CategoricalDistribution.proba_distribution": "29b40b6d12c8",
    "distributions.CategoricalDistribution.sample": "b36852cdceba",
    "distributions.MultiCategoricalDistribution.proba_distribution": "a28c68473551",
    "distributions.MultiCategoricalDistribution.sample": "4c3d921ac96b",
    "distributions.BernoulliDistribution.proba_distribution": "fa65a7f2b90b",
    "distributions.BernoulliDistribution.sample": "b36852cdceba",
    "buffers.RolloutBuffer.add": "c68ae28b8419",
    "buffers.RolloutBuffer.compute_returns_and_advantage": "75ac5f4a9b43",
    "buffers.DictRolloutBuffer.add": "cd28e0dff34e",
    "running_mean_std.RunningMeanStd.update": "cc2d1e20ae93",
    "running_mean_std.RunningMeanStd.update_from_moments": "599bd537d31f",
    "vec_env.base_vec_env.VecEnv.step": "0c7c9d5eaf95",
    "vec_env.base_vec_env.VecEnvWrapper.step_async": "36cdb84bc75e",
    "vec_env.dummy_vec_env.DummyVecEnv.step_async": "5440057975cc",
    "vec_env.dummy_vec_env.DummyVecEnv.step_wait": "bea5fa96bcb6",
    "vec_env.dummy_vec_env.DummyVecEnv._obs_from_buf": "83e05dbfb5eb",
    "vec_env.vec_normalize.VecNormalize.step_wait": "ee9b99f8a21a",
    "vec_env.vec_normalize.VecNormalize.normalize_obs": "e5ab8f1db8e2",
    "vec_env.vec_normalize.VecNormalize._normalize_obs": "b97f9b986cfc",
    "vec_env.vec_normalize.VecNormalize._update_reward": "e7060a715506",
}
"""Fingerprints by full name without ``stable_baselines3.common``, the same from SB3 2.7.0 to 2.9.2."""

KNOWN_OF_CONTRIB = {
    "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy.forward": "15ba453f37d1",
    "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy.get_distribution": "06c486f824df",
    "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy.predict_values": "6743566b18f3",
    "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy.evaluate_actions": "bef264efe658",
    "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy._process_sequence": "c2ec3ee3a632",
}
"""Those of sb3_contrib's recurrent policies, the same from sb3_contrib 2.8.0 to 2.9.2."""

_WITHOUT_EFFECT = frozenset({"annotation", "returns", "type_comment", "type_params", "ctx", "kind"})


def differs_from_sb3(thing: object, names: Iterable[str]) -> bool:
    """Whether any of these methods of ``thing`` is another one than SB3 came with."""
    return _differs(thing, names, is_original)


def differs_from_contrib(policy: object, names: Iterable[str]) -> bool:
    """Whether any of these methods of a recurrent policy is another one than sb3_contrib and SB3 came with."""
    return _differs(policy, names, lambda function: is_original(function) or is_of_contrib(function))


def _differs(thing: object, names: Iterable[str], is_known: Callable[[Any], bool]) -> bool:
    of_instance = getattr(thing, "__dict__", {})
    return any(name in of_instance or not is_known(getattr(type(thing), name, None)) for name in names)


def is_original(function: Any) -> bool:
    """Whether this function is one of ``KNOWN``."""
    return isinstance(function, FunctionType) and _is_known(name_of(function), function.__code__)


def is_of_contrib(function: Any) -> bool:
    """Whether this function is one of ``KNOWN_OF_CONTRIB``."""
    return isinstance(function, FunctionType) and _is_known_of_contrib(name_of(function), function.__code__)


def name_of(function: FunctionType) -> str:
    """As ``KNOWN`` has it."""
    return f"{function.__module__}.{function.__qualname__}".removeprefix("stable_baselines3.common.")


@lru_cache(maxsize=1024)
def _is_known(name: str, code: CodeType) -> bool:
    return name in KNOWN and fingerprint(code) == KNOWN[name]


@lru_cache(maxsize=64)
def _is_known_of_contrib(name: str, code: CodeType) -> bool:
    return name in KNOWN_OF_CONTRIB and fingerprint(code) == KNOWN_OF_CONTRIB[name]


def fingerprint(code: CodeType) -> str | None:
    """A hash of a function's source without comments, docstring and annotations; None where there is no source."""
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    if not lines:
        return None
    try:
        block = "".join(inspect.getblock(lines))
        tree = ast.parse(f"if True:\n{block}" if block[:1].isspace() else block)
    except (SyntaxError, TokenError):
        return None
    return hashlib.sha256(" ".join(_words(tree)).encode()).hexdigest()[:12]


def _words(node: Any) -> Iterator[str]:
    """What a syntax tree consists of, in an order and in words that are the same for every Python."""
    if isinstance(node, list):
        for item in node:
            yield from _words(item)
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
                value = value[1:]
            # an empty list may be missing or there
            if name not in _WITHOUT_EFFECT and value is not None and value != []:
                yield name
                yield from _words(value)
        yield "."
    else:
        yield repr(node)
