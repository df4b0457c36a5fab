"""Trust Region Policy Optimization (Schulman et al. 2015) as an SB3 algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_trpo_ext.algorithms.arguments import CriticChoice, averaged_dimensions
from sb3_trpo_ext.algorithms.masking import UseMasking
from sb3_trpo_ext.algorithms.natural_gradient import NaturalGradientExt
from sb3_trpo_ext.checks import require_count, require_real
from sb3_trpo_ext.policy_problem import FisherChoice, KLReduction, PolicyProblem
from sb3_trpo_ext.trust_region import TrustRegionReport, trust_region_step


class TRPOExt(NaturalGradientExt):
    """Trust Region Policy Optimization, https://arxiv.org/abs/1502.05477.

    Maximise L(θ) = E[π_θ(a|s)/π_old(a|s) · A(s, a)] subject to E[KL(π_old ‖ π_θ)] ≤ δ.

    The arguments up to ``_init_setup_model`` are those of ``sb3_contrib.TRPO``, in its order. Two have
    another scale, because the KL here is the paper's, summed over action dimensions: multiply
    ``target_kl`` and ``cg_damping`` from there by the number d of action dimensions (Box, MultiBinary;
    d = 1 for Discrete and MultiDiscrete), or pass ``kl_reduction="mean"``. Their defaults are
    sb3_contrib's trust region, whichever way it is written.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, sb3_contrib's MlpLstmPolicy,
        CnnLstmPolicy and MultiInputLstmPolicy, or a class); ``"auto"``: MultiInputPolicy for Dict observations,
        CnnPolicy for images of at least 36 x 36 pixels, else MlpPolicy
    :param env: The environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: of ``critic="adam"``; can be a function of the remaining progress (from 1 to 0)
    :param n_steps: steps to run for each environment per update
    :param batch_size: minibatch size of ``critic="adam"``
    :param gamma: discount factor
    :param cg_max_steps: the most conjugate gradient steps, each one Fisher product
    :param cg_damping: λ in (F + λI)x = g; None: 0.1 d, or 0.1 with ``kl_reduction="mean"``; with masks times the mean of
        4(n − 1)/n² over dimensions of n choices, which is 1 for two
    :param line_search_shrinking_factor: c: the search tries the fractions 1, c, c², … of the full step
    :param line_search_max_iter: how many fractions to try
    :param n_critic_updates: passes over the rollout of ``critic="adam"``
    :param gae_lambda: λ of generalised advantage estimation
    :param use_sde: use generalised state-dependent exploration (gSDE)
    :param sde_sample_freq: sample a new noise matrix every n steps; -1: only at the start of a rollout
    :param rollout_buffer_class: rollout buffer class, or its dotted path; chosen by the observations if None
    :param rollout_buffer_kwargs: keyword arguments to pass to the rollout buffer
    :param normalize_advantage: whether to normalise advantages over the rollout
    :param target_kl: δ, the bound on the mean KL(π_old ‖ π_θ), in nats; can be a function of the remaining
        progress, or ``"lin_x"``, from x at the start to 0 at the end. An update takes the progress that remains
        after its rollout, so that the last one gets 0, which is no step; None: 0.01 d, or 0.01 with
        ``kl_reduction="mean"``
    :param sub_sampling_factor: k: the Fisher product, and nothing else, averages over 1/k of the states,
        drawn at random
    :param stats_window_size: episodes over which the logged return and length are averaged
    :param tensorboard_log: the log location for TensorBoard (None: no logging)
    :param policy_kwargs: additional arguments for the policy
    :param verbose: 0: no output; 1: info, the trust region in one line among it; 2: debug
    :param seed: of the pseudo-random generators
    :param device: on which to run; "auto" takes a CUDA GPU if there is one. It has to have double precision, as "mps" has not
    :param _init_setup_model: whether to build the network on creation
    :param fisher: F as ``"gauss_newton"`` (JᵀMJ, M the KL's Hessian in distribution parameters),
        ``"hessian"`` (of the KL, by double backward), ``"empirical"`` (average outer product of scores);
        ``"auto"`` is the fastest that is exact for the policy: Gauss-Newton, or the Hessian for
        distributions without an entry in :mod:`sb3_trpo_ext.distributions`; ``"identity"`` is I, no curvature at
        all: the plain policy gradient, whose full step has ½‖s‖² = ``step_radius`` and takes no damping
    :param kl_reduction: over action dimensions: ``"sum"``, or ``"mean"``, sb3_contrib's scale (KL, F and
        bound alike; Discrete and MultiDiscrete are not affected)
    :param line_search_accept_ratio: the least actual improvement to accept, as a fraction of the
        expected one; 0 accepts any improvement, as sb3_contrib does
    :param ent_coef: weight of an entropy bonus in L
    :param critic: how V is fitted: ``"gauss_newton"`` (second order, whole batch, no learning rate), ``"adam"``
        (minibatches with ``policy.optimizer``, as sb3_contrib does), or ``"none"`` (no V: the advantage is the
        discounted return, cut at the end of the rollout); ``"auto"`` is Adam where one of its keywords has
        another value than its default or the critic's features are learned (images), else Gauss-Newton
    :param critic_steps: Gauss-Newton steps per update; where ``critic="auto"`` chooses and the critic has an LSTM of its
        own, 3 stands for 1
    :param critic_cg_steps: conjugate gradient steps in each
    :param max_grad_norm: clip the gradient of ``critic="adam"`` at this norm; 0: no clipping
    :param values_at_each_step: compute values and log-probabilities at each step of a rollout, for
        callbacks that read them from the locals; slower
    :param chunk_size: states that go through the networks at once in an update, which bounds its
        memory; None: about 64 MB of observations and 256 MB between the layers
    :param initial_std: standard deviation that the actions of a new policy start with (Box actions without gSDE), in
        the units of the action space; SB3's policies start with 1. None, a ``log_std_init`` in ``policy_kwargs``, or
        a policy class whose actions start with another one than 1 leaves the policy as it is made
    :param step_radius: of ``fisher="identity"``: the L2 ball in which the full step ends
    :param adaptive_radius: let δ (of ``fisher="identity"``: ``step_radius``) follow the ratio of actual improvement
        to gᵀs, see :func:`~sb3_trpo_ext.trust_region.adapted_radius`; it is saved with the model
    :param radius_bounds: the least and the greatest radius; None: a tenth and ten times the first one
    :param use_masking: whether to take no action that the environment's ``action_masks()`` forbids (finite action spaces):
        ``"auto"``: if it has them; True, as sb3_contrib's MaskablePPO: it must have them when learning starts, and a
        policy that is given as a class must take ``action_masks``; False: never
    :raises ValueError: for a value that cannot work
    :raises AssertionError: for ``n_steps * n_envs`` of 1 with normalised advantages, as sb3_contrib
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float | None = None,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | str | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | str | Schedule | None = None,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        fisher: FisherChoice = "auto",
        kl_reduction: KLReduction = "sum",
        line_search_accept_ratio: float = 0.1,
        ent_coef: float = 0.0,
        critic: CriticChoice = "auto",
        critic_steps: int = 3,
        critic_cg_steps: int = 10,
        max_grad_norm: float = 0.0,
        values_at_each_step: bool = False,
        chunk_size: int | None = None,
        initial_std: float | None = 0.5,
        step_radius: float = 0.01,
        adaptive_radius: bool = False,
        radius_bounds: Sequence[float] | None = None,
        use_masking: UseMasking = "auto",
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            gae_lambda=gae_lambda,
            n_critic_updates=n_critic_updates,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            critic=critic,
            critic_steps=critic_steps,
            critic_cg_steps=critic_cg_steps,
            max_grad_norm=max_grad_norm,
            values_at_each_step=values_at_each_step,
            chunk_size=chunk_size,
            initial_std=initial_std,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            target_kl=target_kl,
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            sub_sampling_factor=sub_sampling_factor,
            fisher=fisher,
            kl_reduction=kl_reduction,
            step_radius=step_radius,
            adaptive_radius=adaptive_radius,
            radius_bounds=radius_bounds,
            use_masking=use_masking,
        )
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.line_search_accept_ratio = line_search_accept_ratio
        self._constructed(_init_setup_model)
        if _init_setup_model and verbose >= 1:
            self._tell_of_the_scale()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        shrinking = self.line_search_shrinking_factor
        require_real("line_search_shrinking_factor", shrinking, 0.0, 1.0, open_below=True, open_above=True)
        require_real("line_search_accept_ratio", self.line_search_accept_ratio, 0.0, 1.0, open_above=True)
        require_count("line_search_max_iter", self.line_search_max_iter)

    def _update_policy(self, problem: PolicyProblem) -> TrustRegionReport:
        settings = self._step_settings(
            line_search_shrinking_factor=self.line_search_shrinking_factor,
            line_search_max_iter=self.line_search_max_iter,
            line_search_accept_ratio=self.line_search_accept_ratio,
        )
        return trust_region_step(problem, settings)

    def _tell_of_the_scale(self) -> None:
        """Print what numbers that were given are in sb3_contrib's, where these differ."""
        d = averaged_dimensions(self.action_space)
        given = [name for name in ("target_kl", "cg_damping") if name not in self.derived_arguments]
        if d == 1 or self.kl_reduction == "mean" or not given:
            return
        theirs = [f"{name} / {d}" if callable(v := getattr(self, name)) else f"{name}={v / d:g}" for name in given]
        print(
            f"In sb3_contrib.TRPO's numbers, an average over {d} action dimensions, this is {', '.join(theirs)}; "
            'kl_reduction="mean" takes numbers on that scale'
        )

    def _describe(self) -> str:
        return f"Trust region: {self.target_kl} nats of {super()._describe()}"
