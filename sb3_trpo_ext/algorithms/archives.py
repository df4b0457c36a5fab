"""What a saved model says of itself and of the library that saved it."""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import json_to_data, open_path
from stable_baselines3.common.type_aliases import GymEnv

from sb3_trpo_ext.algorithms.arguments import (
    CRITIC_FOLLOWS,
    CRITIC_STEPS_FOLLOW,
    Derived,
    critic_of_keywords,
)
from sb3_trpo_ext.checks import default_of
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer

SelfArchived = TypeVar("SelfArchived", bound="WithArchives")

SB3_CONTRIB_SETTINGS: dict[str, Any] = {
    "kl_reduction": "mean",
    "critic": "adam",
    "line_search_accept_ratio": 0.0,
}
"""What sb3_contrib.TRPO does, in our words."""

FOREIGN = {"sb3_contrib.TRPO": "cg_damping", "PPO": "clip_range"}
"""By the algorithm that saved it, a name that its archives have and each other's lack."""

FOREIGN_DEFAULTS: dict[str | None, dict[str, Any]] = {"sb3_contrib.TRPO": {"target_kl": 0.01, "cg_damping": 0.1}}
"""By the algorithm that saved it, values that nobody gave, of arguments that we derive."""

OURS = frozenset(("kl_reduction", "critic", "outcome_counts", "chunk_size"))
"""Some names that only our archives have."""

EARLIER_BRANCHES = {"n_rollout_states": 128, "branch_length": 100}
"""Defaults of ``VineRolloutBuffer`` when archives did not yet say what was derived."""


def saved_data(path: Any) -> dict[str, Any]:
    """The attributes in a saved model as its JSON has them, without unpickling any.

    There are none in what is no archive: to say what is wrong with it is left to SB3, which reads it next.
    """
    file = open_path(path, "r", suffix="zip")
    position = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except (zipfile.BadZipFile, ValueError):
        return {}
    finally:
        # a file of the user's is left as it came
        file.seek(position) if file is path else file.close()
    return data if isinstance(data, dict) else {}


def saved_by(names: Collection[str]) -> str | None:
    """Which of the ``FOREIGN`` algorithms saved a model with these names; None if we or another one did."""
    return next((by for by, name in FOREIGN.items() if name in names and OURS.isdisjoint(names)), None)


def settings_of_archive(
    path: Any,
    foreign: Mapping[str | None, dict[str, Any]],
    derived_from: Mapping[str, Derived],
    given: Mapping[str, Any],
    custom_objects: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``load()`` is to set besides what a saved model says and what is given to it.

    :param foreign: by :func:`saved_by`, what models of other libraries get
    :param derived_from: arguments that follow from others unless given
    :param given: keyword arguments of ``load()``
    :param custom_objects: of ``load()``
    """
    data = saved_data(path)
    by = saved_by(data)
    # before there was the name, actions started as SB3's do
    settings = {**({} if "initial_std" in data else {"initial_std": None}), **foreign.get(by, {})}
    if by is None and "derived_arguments" not in data:
        settings |= _earlier_branches(data, given, custom_objects)
    derived = {
        name: value
        for name, value in data.get("derived_arguments", FOREIGN_DEFAULTS.get(by, {})).items()
        if name in derived_from and name not in {*given, *custom_objects} and data.get(name) == value
    }
    # what depends on something that is given now is derived anew, and all else stays as it was saved
    anew = {
        name: rule.unless_given
        for name, rule in derived_from.items()
        if name in derived and not given.keys().isdisjoint(rule.keywords)
    }
    return {**settings, **anew, "derived_arguments": derived}


def _earlier_branches(
    data: Mapping[str, Any], given: Mapping[str, Any], custom_objects: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The buffer's arguments in one of our earlier archives, with the defaults that it had."""
    names = ("rollout_buffer_class", "rollout_buffer_kwargs")
    if not given.keys().isdisjoint(names) or names[1] in custom_objects:
        return {}
    saved = json_to_data(json.dumps({name: data[name] for name in names if name in data}), dict(custom_objects))
    buffer_class, kwargs = saved.get(names[0]), saved.get(names[1])
    if not (isinstance(buffer_class, type) and issubclass(buffer_class, VineRolloutBuffer)):
        return {}
    defaults = {name: value for name, value in EARLIER_BRANCHES.items() if _has_our_default(buffer_class, name)}
    return {names[1]: {**defaults, **(kwargs or {})}}


def _has_our_default(buffer_class: type[VineRolloutBuffer], name: str) -> bool:
    """Whether a buffer takes an argument, with the default of ``VineRolloutBuffer``."""
    parameters = inspect.signature(buffer_class.__init__).parameters
    takes_it = name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_it and default_of(buffer_class, name) == default_of(VineRolloutBuffer, name)


class WithArchives(OnPolicyAlgorithm):
    """An SB3 algorithm whose archives tell what was given from what followed, and that loads those of its relatives."""

    foreign_settings: ClassVar[dict[str | None, dict[str, Any]]] = {}
    """Attributes that a foreign archive gets when it is loaded, by :func:`saved_by`."""

    derived_from: ClassVar[dict[str, Derived]] = {"critic": CRITIC_FOLLOWS, "critic_steps": CRITIC_STEPS_FOLLOW}
    """Arguments that follow from others unless given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.derived_arguments: dict[str, Any] = {}

    def _derive(self, name: str, value: Any) -> None:
        """Set an argument that was not given, and remember that for archives."""
        if getattr(self, name) == self.derived_from[name].unless_given:
            self.derived_arguments[name] = value
            setattr(self, name, value)

    def _loaded(self, given: dict[str, Any]) -> None:
        """The end of ``load()``: look at the arguments together.

        :param given: keyword arguments of ``load()``
        """

    @classmethod
    def load(
        cls: type[SelfArchived],
        path: Any,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfArchived:
        """Load a model, as SB3 does; see ``BaseAlgorithm.load`` for the arguments.

        Keyword arguments change the model. A default that depends on one of them follows it, as in the constructor,
        unless it is given too or was given when the model was made.

        An archive that sb3_contrib.TRPO saved goes on as it was, as far as the algorithms are the same: KL on its
        scale, its critic fit, any improvement accepted. Of one of SB3's PPO, ``target_kl`` was the early stop, and is
        the default of ours. Keyword arguments override that.
        """
        settings = settings_of_archive(path, cls.foreign_settings, cls.derived_from, kwargs, custom_objects or {}) | kwargs
        if settings.get("critic") == "auto":
            settings["critic"] = settings["derived_arguments"]["critic"] = critic_of_keywords(kwargs)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **settings)
        model._loaded(kwargs)
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "report", "_watch", "_measured", "_has_told_of_disagreement"]
