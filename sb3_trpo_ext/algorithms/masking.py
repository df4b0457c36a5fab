"""Action masks: where they come from, when they are used, and how users are told that they cannot be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.checks import require, require_choice
from sb3_trpo_ext.masks import METHOD, MaskReader, call_masked, has_masks, masked, takes_masks
from sb3_trpo_ext.observations import length
from sb3_trpo_ext.sampling.actor import Observation, usable
from sb3_trpo_ext.standard_policies import overrides

UseMasking = Literal["auto"] | bool
AskForMasks = Callable[[Observation, np.ndarray | None], th.Tensor]
"""Observations (E, ·), and in which environments nobody acts (E,) ↦ masks (E, Σ choices)."""

MASKABLE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_use_masking(use_masking: UseMasking, policy: Any) -> None:
    """Refuse what is no choice and, with True, a policy class that MaskablePPO would refuse too.

    :raises ValueError: saying what to do instead
    """
    require_choice("use_masking", use_masking, ("auto", True, False))
    if use_masking is True and not isinstance(policy, str):
        expected = "a name, or a class whose get_distribution() takes action_masks with use_masking=True; 'auto' masks any"
        require("policy", policy, takes_masks(policy.get_distribution), expected)


class WithMasks(OnPolicyAlgorithm):
    """An SB3 algorithm that takes no action that is forbidden."""

    action_distribution: Callable[..., Distribution]
    use_masking: UseMasking
    _use_masking_now: UseMasking | None = None
    """Of the present ``learn()``, None outside."""
    _env_has_masks = False

    def allowed(self, observations: PyTorchObs) -> th.Tensor | None:
        """Which choices observations allow, (B, Σ choices), where they say so themselves; None where they do not.

        For subclasses: an environment may have its masks among its observations rather than in ``action_masks()``.
        With both, an action must be allowed by both.

        :param observations: (B, ·), as the policy sees them
        """
        return None

    def _masking_may_be(self) -> bool:
        use = self.use_masking if self._use_masking_now is None else self._use_masking_now
        return use is not False and isinstance(self.action_space, MASKABLE)

    @property
    def _observations_say(self) -> bool:
        return overrides(self, WithMasks, ("allowed",))

    @property
    def _is_masked(self) -> bool:
        """Whether rollouts and updates are masked now."""
        return (self._env_has_masks or self._observations_say) and self._masking_may_be()

    def _look_for_masks(self) -> None:
        self._env_has_masks = self.env is not None and has_masks(self.env)

    def _setup_model(self) -> None:
        with _made_without_sde(self):
            super()._setup_model()
        self._look_for_masks()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Go on with another environment; see SB3."""
        super().set_env(env, force_reset)
        self._look_for_masks()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        prepared = super()._setup_learn(*args, **kwargs)
        self._look_for_masks()
        return prepared

    @contextmanager
    def _masking_of_run(self, use_masking: UseMasking | None) -> Iterator[None]:
        """Context of one ``learn()``."""
        if use_masking is not None:
            require_choice("use_masking", use_masking, ("auto", True, False))
        self._use_masking_now = use_masking
        try:
            yield
        finally:
            self._use_masking_now = None

    def _mask_reader(self, env: VecEnv) -> AskForMasks | None:
        """What asks for the masks of a rollout, None for one without.

        :raises ValueError: where masking is a must and there are no masks
        """
        if not self._is_masked:
            use = self.use_masking if self._use_masking_now is None else self._use_masking_now
            if use is True:
                raise ValueError(
                    "use_masking=True needs an environment with action_masks(), its own or by sb3_contrib's ActionMasker, or "
                    "an algorithm that overrides allowed(); there is neither. use_masking=False goes without masks"
                )
            return None

        read, say, has_masks = MaskReader(self.action_space, "environment"), self._observations_say, self._env_has_masks

        def ask(observations: Observation, idle: np.ndarray | None) -> th.Tensor:
            masks = read(env.env_method(METHOD), idle) if has_masks else None
            if say:
                masks = self._masks_seen(obs_as_tensor(usable(observations), self.device), masks, read, idle)
            return th.as_tensor(masks)

        return ask

    def _masks_seen(
        self, observations: PyTorchObs, further: np.ndarray | None, read: MaskReader, idle: np.ndarray | None = None
    ) -> np.ndarray | None:
        """What observations allow and further masks do too."""
        with th.no_grad():
            allowed = self.allowed(observations)
        if allowed is None:
            return further
        masks = allowed.bool().cpu().numpy()
        return read(masks if further is None else masks & further, idle)  # type: ignore[arg-type]

    def _allowed_part(self, distribution: Distribution, observations: PyTorchObs, samples: Any) -> Distribution:
        """A distribution on these observations, kept to what they allow.

        :param samples: transitions or context, with their masks; None: only the observations say
        """
        if not self._is_masked:
            return masked(distribution, None)
        masks = getattr(samples, "action_masks", None)
        if masks is None and self._observations_say:
            masks = self.allowed(observations)
        elif masks is None and samples is not None:
            kind = type(self.rollout_buffer).__name__
            raise ValueError(f"samples must have action_masks, which {kind} gives them if get() makes them by _get_samples()")
        return masked(distribution, None if masks is None else masks.bool())

    def _own_distribution_masked(self, observations: PyTorchObs, samples: Any = None) -> Distribution:
        """What a subclass says that the distribution is, kept to what is allowed whether it looked at that or not."""
        distribution = self.action_distribution(observations, samples)
        return self._allowed_part(distribution, observations, samples) if self._is_masked else distribution

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The policy's action; see SB3.

        :param action_masks: which choices are allowed, (Σ choices,), or (n, Σ choices) for n observations, as the
            environment's ``action_masks()`` has them; None: all, but for what :meth:`allowed` says
        """
        says = self._observations_say and self._masking_may_be()
        if action_masks is None and not says:
            return self.policy.predict(observation, state, episode_start, deterministic)
        masks = self._masks_to_predict(observation, action_masks, says)
        return call_masked(self.policy, "predict", masks, observation, state, episode_start, deterministic)

    def _masks_to_predict(self, observation: Any, given: Any, says: bool) -> th.Tensor | None:
        require("action_masks", given, isinstance(self.action_space, MASKABLE), f"None for {self.action_space}")
        seen, read = self.policy.obs_to_tensor(observation)[0], MaskReader(self.action_space, "observation")
        masks = None if given is None else read(np.reshape(given, (length(seen), -1)))  # type: ignore[arg-type]
        if says:
            masks = self._masks_seen(seen, masks, read)
        return None if masks is None else th.as_tensor(masks)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_use_masking_now", "_env_has_masks"]


@contextmanager
def _made_without_sde(model: OnPolicyAlgorithm) -> Iterator[None]:
    """Context in which a policy class that knows nothing of gSDE, such as sb3_contrib's maskable ones, can be made."""
    made = model.policy_class
    # a constructor may pass keywords on, to one that names them
    if any("use_sde" in inspect.signature(base.__init__).parameters for base in made.__mro__):  # type: ignore[misc]
        yield
        return

    def make(*args: Any, use_sde: bool, **kwargs: Any) -> BasePolicy:
        return made(*args, **kwargs, **({"use_sde": use_sde} if use_sde else {}))

    make.__name__ = made.__name__
    model.policy_class = make  # type: ignore[assignment]
    try:
        yield
    finally:
        model.policy_class = made
