"""Registration of our algorithms with rl_zoo3: algorithms, samplers and configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_trpo_ext.algorithms.base import OnPolicyExt
from sb3_trpo_ext.algorithms.kl_ppo import KLPPOExt
from sb3_trpo_ext.algorithms.npg import NPGExt
from sb3_trpo_ext.algorithms.trpo import TRPOExt
from sb3_trpo_ext.checks import needs_extra

if TYPE_CHECKING:
    import optuna

ALGORITHMS: dict[str, type[OnPolicyExt]] = {"trpo_ext": TRPOExt, "npg_ext": NPGExt, "kl_ppo_ext": KLPPOExt}


def sample_trpo_ext_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Hyperparameters of one trial of ``-optimize``, in rl_zoo3's own encoding."""
    return convert_params(
        {
            **_sample_shared(trial),
            **_sample_critic(trial),
            **_sample_radius(trial, n_actions, 0.003, 0.1),
            **_per_dimension(trial, "cg_damping", n_actions, 0.001, 1.0),
        }
    )


def sample_npg_ext_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters of one trial of ``-optimize`` for NPGExt: no search shortens a step that is too long."""
    return convert_params(
        {
            **_sample_shared(trial),
            **_sample_critic(trial),
            **_sample_radius(trial, n_actions, 0.001, 0.03),
            **_per_dimension(trial, "cg_damping", n_actions, 0.01, 1.0),
        }
    )


def sample_kl_ppo_ext_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Hyperparameters of one trial of ``-optimize`` for KLPPOExt."""
    return convert_params(
        {
            **_sample_shared(trial),
            **_sample_adam(trial),
            "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 7),
            "n_epochs": trial.suggest_int("n_epochs", 3, 20),
            **_per_dimension(trial, "target_kl", n_actions, 0.003, 0.1),
            "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
        }
    )


def _sample_shared(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "n_steps_pow": trial.suggest_int("n_steps_pow", 7, 12),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.005, 0.1, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
        "log_std_init": trial.suggest_float("log_std_init", -1.0, 0.5),
    }


def _per_dimension(trial: optuna.Trial, name: str, n_actions: int, low: float, high: float) -> dict[str, Any]:
    """What adds up over action dimensions: the bound on the KL, and λ, which stands beside F.

    :param n_actions: of a Box; rl_zoo3 gives 0 for other spaces, whose KL is that of one
    :param low, high: per action dimension
    """
    size = max(n_actions, 1)
    return {name: trial.suggest_float(name, low * size, high * size, log=True)}


def _sample_radius(trial: optuna.Trial, n_actions: int, low: float, high: float) -> dict[str, Any]:
    """Constant, or falling to 0 over the trial."""
    falls = trial.suggest_categorical("target_kl_falls", [False, True])
    return {**_per_dimension(trial, "target_kl", n_actions, low, high), "target_kl_falls": falls}


def _sample_critic(trial: optuna.Trial) -> dict[str, Any]:
    """By name, as a file's entry may have chosen one, and each with what it makes use of."""
    critic = trial.suggest_categorical("critic", ["gauss_newton", "adam"])
    if critic == "adam":
        return {"critic": critic, **_sample_adam(trial)}
    return {"critic": critic, "critic_steps": trial.suggest_int("critic_steps", 1, 5)}


def _sample_adam(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 5, 30),
    }


def convert_params(sampled: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the algorithm from the parameters of a trial."""
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    rest = dict(sampled)
    log_std_init, falls = rest.pop("log_std_init"), rest.pop("target_kl_falls", False)
    arguments = convert_onpolicy_params(rest)
    arguments["policy_kwargs"]["log_std_init"] = log_std_init
    arguments["initial_std"] = None  # that of a file's entry has no use beside it
    if falls:
        arguments["target_kl"] = f"lin_{arguments['target_kl']}"
    return arguments


SAMPLERS = {
    "trpo_ext": sample_trpo_ext_params,
    "npg_ext": sample_npg_ext_params,
    "kl_ppo_ext": sample_kl_ppo_ext_params,
}


def register() -> None:
    """Make rl_zoo3 know our algorithms, in this process; calling it again changes nothing.

    rl_zoo3 reads its choices of ``--algo`` when a verb starts, so this comes first.

    :raises ImportError: saying what to install, where rl_zoo3 is missing
    """
    with needs_extra("the RL Zoo entry points need", "zoo"):
        import rl_zoo3
        from rl_zoo3 import enjoy, exp_manager, hyperparams_opt, train
    # one dictionary, shared by reference; re-assigned as rl_zoo3's documentation has it
    rl_zoo3.ALGOS.update(ALGORITHMS)
    for module in (train, enjoy, exp_manager):
        setattr(module, "ALGOS", rl_zoo3.ALGOS)  # noqa: B010 (a name that they import, which a type checker does not see)
    # here, because it needs rl_zoo3
    from sb3_trpo_ext.zoo.continuing import ContinuingExperimentManager

    setattr(train, "ExperimentManager", ContinuingExperimentManager)  # noqa: B010
    for name, sampler in SAMPLERS.items():
        hyperparams_opt.HYPERPARAMS_SAMPLER[name] = sampler
        hyperparams_opt.HYPERPARAMS_CONVERTER[name] = convert_params  # type: ignore[assignment]


def config_path(algorithm: str = "trpo_ext") -> Path:
    """The hyperparameter file of an algorithm: in an installed wheel beside this module, else in ``zoo_configs/``.

    :raises ValueError: for an algorithm that is not ours
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {sorted(ALGORITHMS)}, got {algorithm!r}")
    here = Path(__file__).parent
    installed = here / "configs" / f"{algorithm}.yml"
    return installed if installed.exists() else here.parents[1] / "zoo_configs" / f"{algorithm}.yml"
