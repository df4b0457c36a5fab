"""The SB3 shell that the algorithms share: collect, update the policy, fit the critic, log."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_trpo_ext.algorithms.archives import settings_of_archive
from sb3_trpo_ext.algorithms.arguments import (
    CRITIC_FOLLOWS,
    KEYWORDS_WITHOUT_EFFECT,
    CriticChoice,
    Derived,
    PolicyOfObservations,
    check_rollout_size,
    class_of,
    critic_of_features,
    critic_of_keywords,
    initial_std_without_effect,
    keywords_given,
    policy_of_observations,
    set_initial_std,
    warn_of_own_start,
    warn_without_effect,
)
from sb3_trpo_ext.algorithms.updating import Updating
from sb3_trpo_ext.checks import require, require_choice, require_count, require_real
from sb3_trpo_ext.sampling.vine import make_restorable
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer
from sb3_trpo_ext.steps import StepReport

SelfOnPolicyExt = TypeVar("SelfOnPolicyExt", bound="OnPolicyExt")


class OnPolicyExt(Updating):
    """Collect transitions, improve the policy, fit the critic, report. Siblings define the second.

    Constructor arguments are documented at :class:`~sb3_trpo_ext.TRPOExt`. SB3's ``load()`` overwrites
    ``__dict__`` and calls ``_setup_model()``, so whatever is derived from arguments is made there.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
        "auto": PolicyOfObservations,
    }

    foreign_settings: ClassVar[dict[str | None, dict[str, Any]]] = {}
    """Attributes that a foreign archive gets when it is loaded, by :func:`~sb3_trpo_ext.algorithms.archives.saved_by`."""

    derived_from: ClassVar[dict[str, Derived]] = {"critic": CRITIC_FOLLOWS}
    """Arguments that follow from others unless given."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        critic: CriticChoice = "auto",
        critic_steps: int = 3,
        critic_cg_steps: int = 10,
        max_grad_norm: float = 0.0,
        values_at_each_step: bool = False,
        chunk_size: int | None = None,
        initial_std: float | None = 0.5,
        rollout_buffer_class: type[RolloutBuffer] | str | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=0.0,  # the critic is fitted on its own
            max_grad_norm=max_grad_norm,
            rollout_buffer_class=rollout_buffer_class,  # type: ignore[arg-type]  # resolved in _setup_model
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.batch_size = batch_size
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.critic = critic
        self.critic_steps = critic_steps
        self.critic_cg_steps = critic_cg_steps
        self.critic_damping = 0.1
        self.values_at_each_step = values_at_each_step
        self.chunk_size = chunk_size
        self.initial_std = initial_std
        self.derived_arguments: dict[str, Any] = {}
        self.outcome_counts: dict[str, int] = {}
        self.report: StepReport | None = None
        self._seconds: dict[str, float] = {}

    # -- construction ----------------------------------------------------------------------------

    def _constructed(self, set_up: bool) -> None:
        """The end of every constructor: look at the arguments together, and build what they describe."""
        OnPolicyExt._check_arguments(self)
        self._derive("critic", critic_of_keywords(keywords_given(self, CRITIC_FOLLOWS.keywords)))
        warn_without_effect(self)
        if set_up:
            self._setup_model()
            warn_of_own_start(self)
        check_rollout_size(self)

    def _derive(self, name: str, value: Any) -> None:
        """Set an argument that was not given, and remember that for archives."""
        if getattr(self, name) == self.derived_from[name].unless_given:
            self.derived_arguments[name] = value
            setattr(self, name, value)

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]:
        """Names of constructor keywords that are not used, by the choice that leaves them so."""
        choices = {f"critic={self.critic!r}": KEYWORDS_WITHOUT_EFFECT[self.critic]}
        if self.initial_std is not None and self.env is not None:
            choices |= initial_std_without_effect(self)
        return choices

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.policy_class is PolicyOfObservations:
            self.policy_class = policy_of_observations(self.observation_space)
        self.rollout_buffer_class = class_of(self.rollout_buffer_class)
        if self._branches_out:
            require("use_sde", self.use_sde, not self.use_sde, "False with VineRolloutBuffer: branches draw their own noise")
            if self.env is not None:
                make_restorable(self.env)
        super()._setup_model()
        self._check_distribution()
        set_initial_std(self)
        self._derive("critic", critic_of_features(self))
        if self.critic == "none":
            # with V = 0 and λ = 1 the advantage is the discounted return itself
            self.rollout_buffer.gae_lambda = 1.0
            if isinstance(self.rollout_buffer, VineRolloutBuffer):
                self.rollout_buffer.without_values()
        if self.verbose >= 1:
            print(self._describe())

    def _check_arguments(self) -> None:
        """Refuse values that cannot work.

        :raises ValueError: naming the argument, what was expected and what came
        """
        require("device", str(self.device), self.device.type != "mps", 'one with double precision, as "cpu" and "cuda" are')
        require_choice("critic", self.critic, tuple(KEYWORDS_WITHOUT_EFFECT))
        for name in ("n_steps", "batch_size", "n_critic_updates", "critic_steps", "critic_cg_steps"):
            require_count(name, getattr(self, name))
        if self.chunk_size is not None:
            require_count("chunk_size", self.chunk_size)
        if self.initial_std is not None:
            require_real("initial_std", self.initial_std, 0.0, open_below=True)
        require_real("gamma", self.gamma, 0.0, 1.0)
        require_real("gae_lambda", self.gae_lambda, 0.0, 1.0)
        require_real("ent_coef", self.ent_coef, 0.0)
        require_real("max_grad_norm", self.max_grad_norm, 0.0)

    def _describe(self) -> str:
        """One line on how this model is going to train, printed with ``verbose=1``."""
        return f"Critic: {self.critic}; acting: {self.actor_path}"

    @classmethod
    def load(
        cls: type[SelfOnPolicyExt],
        path: Any,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfOnPolicyExt:
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
        warn_without_effect(model, kwargs)
        check_rollout_size(model)
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "report", "_measured"]

    def learn(
        self: SelfOnPolicyExt,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOnPolicyExt:
        """Train; see SB3. ``tb_log_name`` is the class's name by default.

        :raises ValueError: with vine sampling, if the environments do not return to a state exactly
        """
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name or type(self).__name__,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
