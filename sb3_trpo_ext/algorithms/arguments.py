"""What constructor arguments mean together: checks and warnings that several of them decide."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Protocol

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.checks import constant_of, default_of, require, require_choice, require_count, require_real, warn_user
from sb3_trpo_ext.masks import choices_of
from sb3_trpo_ext.standard_policies import has_parameters

CriticChoice = Literal["auto", "gauss_newton", "adam", "none"]

_ADAM_KEYWORDS = ("learning_rate", "batch_size", "n_critic_updates", "max_grad_norm")
_GAUSS_NEWTON_KEYWORDS = ("critic_steps", "critic_cg_steps")
KEYWORDS_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "adam": _GAUSS_NEWTON_KEYWORDS,
    "gauss_newton": _ADAM_KEYWORDS,
    "none": (*_ADAM_KEYWORDS, *_GAUSS_NEWTON_KEYWORDS, "gae_lambda"),
    "auto": (),
}
"""By critic."""


class Arguments(Protocol):
    """An algorithm, as far as its constructor's arguments go."""

    env: VecEnv | None
    device: th.device
    policy: ActorCriticPolicy
    action_space: spaces.Space
    policy_kwargs: dict[str, Any]
    use_sde: bool
    n_steps: int
    batch_size: int
    n_critic_updates: int
    gamma: float
    gae_lambda: float
    ent_coef: float
    max_grad_norm: float
    normalize_advantage: bool
    critic: CriticChoice
    critic_steps: int
    critic_cg_steps: int
    chunk_size: int | None
    initial_std: float | None
    derived_arguments: dict[str, Any]

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]: ...


def check_shared_arguments(model: Arguments) -> None:
    """Refuse values that cannot work, of the arguments that all algorithms have.

    :raises ValueError: naming the argument, what was expected and what came
    """
    require("device", str(model.device), model.device.type != "mps", 'one with double precision, as "cpu" and "cuda" are')
    require_choice("critic", model.critic, tuple(KEYWORDS_WITHOUT_EFFECT))
    for name in ("n_steps", "batch_size", "n_critic_updates", "critic_steps", "critic_cg_steps"):
        require_count(name, getattr(model, name))
    if model.chunk_size is not None:
        require_count("chunk_size", model.chunk_size)
    if model.initial_std is not None:
        require_real("initial_std", model.initial_std, 0.0, open_below=True)
    require_real("gamma", model.gamma, 0.0, 1.0)
    require_real("gae_lambda", model.gae_lambda, 0.0, 1.0)
    require_real("ent_coef", model.ent_coef, 0.0)
    require_real("max_grad_norm", model.max_grad_norm, 0.0)


class Derived(NamedTuple):
    """An argument that follows from others, unless it is given.

    :param unless_given: its default, which stands for this
    :param keywords: of the others, those that ``load()`` may change
    """

    unless_given: Any
    keywords: tuple[str, ...]


CRITIC_FOLLOWS = Derived("auto", (*_ADAM_KEYWORDS, *_GAUSS_NEWTON_KEYWORDS))
CRITIC_STEPS_FOLLOW = Derived(3, ())


def averaged_dimensions(action_space: spaces.Space) -> int:
    """The action dimensions over which sb3_contrib averages its KL, and the paper sums."""
    averaged = isinstance(action_space, (spaces.Box, spaces.MultiBinary))
    return get_action_dim(action_space) if averaged else 1


def uniform_curvature(action_space: spaces.Space) -> float:
    """Of the KL in a logit of the uniform policy, p(1 − p), against that of two choices; the mean over dimensions.

    Damping is to F what it is with two choices if it is scaled by this. With many choices, of which masks leave some,
    it would otherwise outweigh F, and the step be that of the plain gradient.
    """
    # one of a single choice has none at all
    sizes = [n for n in choices_of(action_space) if n > 1] or [2]
    return sum(4.0 * (n - 1) / n**2 for n in sizes) / len(sizes)


class PolicyOfObservations(ActorCriticPolicy):
    """Stands for the class that :func:`policy_of_observations` says, until the observations are known."""


_LEAST_IMAGE = 36
"""Height and width that SB3's ``CnnPolicy`` needs."""


def policy_of_observations(space: spaces.Space) -> type[ActorCriticPolicy]:
    """What ``policy="auto"`` is."""
    if isinstance(space, spaces.Dict):
        return MultiInputActorCriticPolicy
    # channels are the least of the three numbers, as SB3 has it
    if isinstance(space, spaces.Box) and is_image_space(space) and sorted(space.shape)[1] >= _LEAST_IMAGE:
        return ActorCriticCnnPolicy
    return ActorCriticPolicy


def class_of(name: type[RolloutBuffer] | str | None) -> type[RolloutBuffer] | None:
    """A class given as itself or as a dotted path.

    :raises ValueError: for a path that names no class
    """
    if not isinstance(name, str):
        return name
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"rollout_buffer_class must be a class or its dotted path, got {name!r}") from error


def check_rollout_size(model: Arguments) -> None:
    """sb3_contrib.TRPO's checks of the rollout against the advantage normalisation and the minibatches."""
    if model.env is None:
        return
    size = model.env.num_envs * model.n_steps
    # an AssertionError as in sb3_contrib, whose users and tests expect one
    assert size > 1 or not model.normalize_advantage, (
        f"`n_steps * n_envs` must be greater than 1 to normalise advantages, got n_steps={model.n_steps} "
        f"and n_envs={model.env.num_envs}"
    )
    in_use = all("batch_size" not in keywords for keywords in model.keywords_without_effect().values())
    if in_use and size % model.batch_size > 0:
        warn_user(
            f"batch_size={model.batch_size} does not divide n_steps * n_envs = {size}: after "
            f"{size // model.batch_size} whole minibatches there is one of {size % model.batch_size}"
        )


def critic_of_keywords(given: Collection[str]) -> CriticChoice:
    """``critic="auto"`` is the fit that any of the keywords given belongs to, if there are any."""
    if not set(_ADAM_KEYWORDS).isdisjoint(given):
        return "adam"
    return "auto" if set(_GAUSS_NEWTON_KEYWORDS).isdisjoint(given) else "gauss_newton"


def critic_of_features(model: Arguments) -> CriticChoice:
    """Else it is Gauss-Newton, or Adam where the critic's features are learned: products through a convolution
    cost more than they bring."""
    if model.critic == "auto":
        return "adam" if has_parameters(model.policy.vf_features_extractor) else "gauss_newton"
    return model.critic


def takes_one_critic_step(model: Arguments) -> bool:
    """``critic="auto"`` takes one Gauss-Newton step where the critic has an LSTM of its own: products through time
    cost more than the further steps bring."""
    is_chosen = model.critic == "gauss_newton" and "critic" in model.derived_arguments
    return is_chosen and getattr(model.policy, "lstm_critic", None) is not None


def initial_std_without_effect(model: Arguments) -> dict[str, tuple[str, ...]]:
    """``initial_std`` by the choice that leaves it without use: only Gaussian actions without gSDE start with it."""
    choices = {
        "use_sde=True": model.use_sde,
        f"the action space {model.action_space}": not isinstance(model.action_space, spaces.Box),
        "a log_std_init in policy_kwargs": "log_std_init" in model.policy_kwargs,
    }
    return {choice: ("initial_std",) for choice, holds in choices.items() if holds}


def set_initial_std(model: Arguments) -> None:
    """Let a new policy start with ``initial_std``, unless it was made to start otherwise.

    The parameter is set, not ``policy_kwargs``: SB3 compares those with the ones given to ``load()``.
    """
    policy, std = model.policy, _initial_std_in_use(model)
    if std is not None and _starts_as_sb3s(policy):
        policy.log_std_init = math.log(std)
        with th.no_grad():
            policy.log_std.fill_(policy.log_std_init)


def _initial_std_in_use(model: Arguments) -> float | None:
    return None if initial_std_without_effect(model) else model.initial_std


def _starts_as_sb3s(policy: ActorCriticPolicy) -> bool:
    """Whether its Gaussian actions start with a standard deviation of 1, which training changes."""
    log_std = getattr(policy, "log_std", None)
    return (
        type(getattr(policy, "action_dist", None)) is DiagGaussianDistribution
        and isinstance(log_std, th.nn.Parameter)
        and log_std.requires_grad
        and not log_std.any()
    )


def warn_of_own_start(model: Arguments) -> None:
    """One warning where the policy's class makes it start otherwise than with the ``initial_std`` that was given."""
    policy, std = model.policy, _initial_std_in_use(model)
    if std is not None and keywords_given(model, ("initial_std",)) and getattr(policy, "log_std_init", None) != math.log(std):
        warn_user(f"{type(policy).__name__} has a start of its own and makes no use of initial_std={std!r}")


def warn_without_effect(model: Arguments, among: Collection[str] | None = None) -> None:
    """One warning for each choice that leaves given keywords without use, naming them.

    :param among: the keywords to look at; None: all
    """
    for choice, keywords in model.keywords_without_effect().items():
        looked_at = [name for name in keywords if among is None or name in among]
        unused = [f"{name}={getattr(model, name)!r}" for name in keywords_given(model, looked_at)]
        if unused:
            warn_user(f"{choice} makes no use of {', '.join(unused)}")


def keywords_given(model: Arguments, keywords: Collection[str]) -> list[str]:
    """Those that differ from their defaults."""
    return [name for name in keywords if constant_of(getattr(model, name)) != default_of(type(model), name)]
