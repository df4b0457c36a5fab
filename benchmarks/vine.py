"""Vine sampling: how noisy its gradient is, how fast its branches run, and what memory they take.

    python benchmarks/vine.py                        # everything
    python benchmarks/vine.py --parts variance       # or some of: variance, speed, memory

Noise of a gradient estimate ĝ is tr Cov(ĝ) / ‖E ĝ‖², which no scale of the objective changes: the vine's, that of single
path with Monte Carlo returns and their mean as the baseline, and that of single path with generalised advantages and a
critic; all with the same policy and the same number of Q-values, whose returns are cut at the same horizon.
"""

from __future__ import annotations

import argparse
import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th
from _measure import (
    Comparison,
    argument_parser,
    interleave,
    new_figure,
    print_comparisons,
    print_table,
    save_figure,
    seconds,
    set_up,
    write_json,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer

N_ENVS = 8
MONTE_CARLO = "single path, Monte Carlo, mean baseline"
GAE = "single path, GAE and critic"


# -- variance --------------------------------------------------------------------------------------------


class Variance(NamedTuple):
    """Where the noise is measured.

    :param half: the mean training return at which the policy counts as half-trained
    :param n_steps: of the training iterations, for each environment
    :param n_states: N of the vine; single path gets as many Q-values as the vine
    :param horizon: steps after which every return is cut, without bootstrap
    """

    half: float
    n_steps: int
    n_states: int
    n_actions: int | str
    horizon: int


VARIANCE = {
    "CartPole-v1": Variance(250.0, 128, 32, "all", 100),
    "Hopper-v5": Variance(1000.0, 256, 16, 4, 100),
}


@dataclass(frozen=True)
class Estimates:
    """Independent estimates of a gradient by one estimator.

    :param gradients: (R, P)
    :param steps: simulator steps of one estimate
    :param factor: c, where E ĝ is c times the gradient that estimators of cut returns have in common; None for an
        estimator that has an expectation of its own, because V takes part
    """

    gradients: np.ndarray
    steps: float
    factor: float | None = 1.0

    @property
    def trace(self) -> float:
        """tr Cov(ĝ)."""
        return float(self.gradients.var(axis=0, ddof=1).sum())

    @property
    def weight(self) -> float:
        """How well the mean knows the common gradient."""
        return 0.0 if self.factor is None or self.trace == 0.0 else len(self.gradients) * self.factor**2 / self.trace

    def traces(self, rng: np.random.Generator, resamples: int = 500) -> np.ndarray:
        """tr Cov(ĝ) / c² of resamples of the estimates."""
        distances = ((self.gradients - self.gradients.mean(axis=0)) ** 2).sum(axis=1)
        n = len(distances)
        return distances[rng.integers(n, size=(resamples, n))].sum(axis=1) / (n - 1) / (self.factor or 1.0) ** 2


def noises_of(estimates: dict[str, Estimates]) -> dict[str, float]:
    """tr Cov(ĝ) / ‖E ĝ‖² by estimator.

    ‖E ĝ‖² is that of a mean less the trace of its covariance, which it is too large by on average. Estimators of the same
    returns have the same gradient up to a known factor, so it is taken from the mean of all of them.
    """
    total = sum(e.weight for e in estimates.values())
    common = sum(e.weight / total / e.factor * e.gradients.mean(axis=0) for e in estimates.values() if e.factor is not None)
    common_squared = float(common @ common) - 1.0 / total
    noises = {}
    for name, e in estimates.items():
        mean, n = e.gradients.mean(axis=0), len(e.gradients)
        squared = float(mean @ mean) - e.trace / n if e.factor is None else e.factor**2 * common_squared
        noises[name] = e.trace / squared if squared > 0 else float("inf")
    return noises


def half_trained(env_id: str, setting: Variance, seed: int, most: int) -> TRPOExt:
    env = make_vec_env(env_id, n_envs=N_ENVS, seed=seed)
    arguments = dict(n_steps=setting.n_steps, critic="adam", initial_std=None, seed=seed, device="cpu", stats_window_size=20)
    model = TRPOExt("MlpPolicy", env, **arguments)  # type: ignore[arg-type]
    while model.num_timesteps < most:
        model.learn(1, reset_num_timesteps=False)
        episodes = [episode["r"] for episode in model.ep_info_buffer or ()]
        if episodes and np.mean(episodes) >= setting.half:
            break
    print(f"{env_id}: mean return {np.mean(episodes):.0f} after {model.num_timesteps} steps", flush=True)
    return model


def like(trained: TRPOExt, env_id: str, setting: Variance, seed: int, n_steps: int, **vine: Any) -> TRPOExt:
    """The same policy and critic with another sampling, ready to collect."""
    env = make_vec_env(env_id, n_envs=N_ENVS, seed=seed, wrapper_class=SnapshotWrapper)
    if vine:
        vine = dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=vine)
    arguments = dict(n_steps=n_steps, batch_size=n_steps * N_ENVS, seed=seed, device="cpu", normalize_advantage=False)
    model = TRPOExt("MlpPolicy", env, **arguments, **vine)  # type: ignore[arg-type]
    model.policy.load_state_dict(trained.policy.state_dict())
    return model


def rollouts(model: TRPOExt, n_rollouts: int) -> Any:
    """Collect again and again with the same policy."""
    _, callback = model._setup_learn(10**9)
    model.set_logger(Logger(None, []))
    for _ in range(n_rollouts):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]
        model._n_updates += 1  # which branches are seeded by
        yield model.rollout_buffer


def vine_estimates(model: TRPOExt, n_estimates: int, factor: float | None) -> Estimates:
    gradients = []
    for buffer in rollouts(model, n_estimates):
        gradients.append(model._policy_problem(next(buffer.get())).gradient()[1].numpy())
    return Estimates(np.array(gradients, dtype=np.float64), model.num_timesteps / n_estimates, factor)


def single_path_estimates(model: TRPOExt, horizon: int, n_values: int, n_estimates: int) -> dict[str, Estimates]:
    """Both kinds of single path, from pairs drawn at random from one long rollout, which is kind to single path:

    pairs that follow each other would be alike. A pair costs one step.
    """
    buffer = next(rollouts(model, 1))
    usable = model.n_steps - horizon
    returns = cut_returns(buffer.rewards, buffer.episode_starts, model.gamma, horizon)
    chosen = np.random.default_rng(0).permutation(usable * N_ENVS)[: n_values * n_estimates].reshape(n_estimates, n_values)
    estimates = {}
    for name, values in {MONTE_CARLO: returns, GAE: buffer.advantages}.items():
        gradients = []
        for pairs in chosen:
            steps, envs = np.divmod(pairs, N_ENVS)
            weights = th.as_tensor(values[steps, envs], dtype=th.float32)
            observations, actions = (th.as_tensor(array[steps, envs]) for array in (buffer.observations, buffer.actions))
            log_probs = model.policy.get_distribution(observations).log_prob(model.as_taken(actions))
            parameters = [p for name, p in model.policy.named_parameters() if "value" not in name]
            gradient = th.autograd.grad(((weights - weights.mean()) * log_probs).mean(), parameters)
            gradients.append(np.concatenate([part.numpy().ravel() for part in gradient]))
        factor = None if name == GAE else 1.0 - 1.0 / n_values  # the mean baseline costs that
        estimates[name] = Estimates(np.array(gradients, dtype=np.float64), n_values, factor)
    return estimates


def cut_returns(rewards: np.ndarray, episode_starts: np.ndarray, gamma: float, horizon: int) -> np.ndarray:
    """Σ_{i < horizon} γⁱ r_{t+i} to the end of the episode at most, for all t but the last ``horizon``."""
    n = len(rewards) - horizon
    total, alive = np.zeros((n, rewards.shape[1])), np.ones((n, rewards.shape[1]))
    for i in range(horizon):
        if i > 0:
            alive *= 1.0 - episode_starts[i : i + n]
        total += gamma**i * alive * rewards[i : i + n]
    return total


def measure_variance(env_id: str, n_estimates: int, most: int) -> dict[str, Estimates]:
    setting, seed = VARIANCE[env_id], 0
    trained = half_trained(env_id, setting, seed, most)
    vine = dict(n_rollout_states=setting.n_states, n_branch_actions=setting.n_actions, branch_length=setting.horizon)
    # what self-normalisation costs
    factor = 1.0 if setting.n_actions == "all" else 1.0 - 1.0 / int(setting.n_actions)
    kinds: dict[str, tuple[int, float | None, dict[str, Any]]] = {
        "vine": (1, factor, dict(branch_bootstrap=False)),
        "vine, no common random numbers": (1, factor, dict(branch_bootstrap=False, common_random_numbers=False)),
        "vine, 10 steps and critic": (8, None, dict(branch_length=10)),
    }
    estimates = {}
    for name, (more, factor, kind) in kinds.items():
        model = like(trained, env_id, setting, seed + 1, 8, **vine | kind)
        estimates[name] = vine_estimates(model, more * n_estimates, factor)
    n_values = model.rollout_buffer.branches.q_values.size  # type: ignore[union-attr]
    many = 25 * n_estimates
    path = like(trained, env_id, setting, seed + 2, setting.horizon + 2 * n_values * many // N_ENVS)
    return estimates | single_path_estimates(path, setting.horizon, n_values, many)


def variance(arguments: argparse.Namespace) -> dict[str, Any]:
    n_estimates, most = (4, 2_000) if arguments.quick else (arguments.estimates, 400_000)
    results: dict[str, Any] = {}
    for env_id in VARIANCE:
        estimates = measure_variance(env_id, n_estimates, most)
        rng = np.random.default_rng(0)
        noises = noises_of(estimates)
        reference = estimates[MONTE_CARLO].traces(rng)
        # of estimators that have their expectation in common: of another's own too little is known
        intervals = {
            name: np.quantile(e.traces(rng) / reference, [0.05, 0.95]).tolist()
            for name, e in estimates.items()
            if e.factor is not None and name != MONTE_CARLO
        }
        results[env_id] = {
            name: {
                "noise": noises[name],
                "trace": e.trace,
                "against_monte_carlo": noises[name] / noises[MONTE_CARLO],
                "interval": intervals.get(name),
                "steps": e.steps,
                "estimates": len(e.gradients),
            }
            for name, e in estimates.items()
        }
    rows = []
    for env_id, found in results.items():
        monte_carlo = found[MONTE_CARLO]
        for name, row in found.items():
            interval = "" if row["interval"] is None else " ({:.3f}-{:.3f})".format(*row["interval"])
            rows.append(
                (
                    f"{env_id}, {name}",
                    f"{row['noise']:.3g}",
                    f"{row['against_monte_carlo']:.3f}{interval}",
                    f"{row['steps']:.0f}",
                    f"{row['against_monte_carlo'] * row['steps'] / monte_carlo['steps']:.2f}",
                )
            )
    header = ("", "noise", "against Monte Carlo (90% interval)", "steps an estimate", "noise x steps, against Monte Carlo")
    print_table("Noise of the gradient, equal numbers of Q-values; bar: the vine's at most 0.5", header, rows)
    draw_variance(arguments, results)
    return results


def draw_variance(arguments: argparse.Namespace, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    drawing, axes = new_figure(11, 3.2, 1, len(results))
    for ax, (env_id, found) in zip(axes[0], results.items(), strict=True):
        for i, row in enumerate(found.values()):
            if np.isfinite(row["against_monte_carlo"]):
                ax.barh(i, row["against_monte_carlo"], color="tab:blue", alpha=0.8)
                if row["interval"] is not None:
                    ax.plot(row["interval"], [i, i], color="black", lw=1)
        ax.axvline(0.5, color="tab:red", lw=1, label="half of Monte Carlo")
        ax.set(yticks=range(len(found)), xscale="log", xlabel="tr Cov(ĝ) / ‖E ĝ‖² against Monte Carlo", title=env_id)
        ax.set_yticklabels(found if ax is axes[0][0] else [])
        ax.invert_yaxis()
        ax.legend()
    save_figure(drawing, arguments.out, "vine_variance")


# -- speed -----------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Branch steps a second, restoring included, against the bare ``DummyVecEnv`` with random actions."""
    env_id, repeats = "HalfCheetah-v5", 2 if arguments.quick else 7
    n_states, length, n_bare = (4, 20, 50) if arguments.quick else (32, 100, 1000)
    vine = dict(n_rollout_states=n_states, n_branch_actions=4, branch_length=length)
    model = TRPOExt(
        "MlpPolicy",
        make_vec_env(env_id, n_envs=N_ENVS, seed=0, wrapper_class=SnapshotWrapper),
        n_steps=16,
        batch_size=16 * N_ENVS,
        initial_std=None,
        seed=0,
        device="cpu",
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=vine,
    )
    bare = make_vec_env(env_id, n_envs=N_ENVS, seed=0)
    bare.reset()
    actions = [np.stack([bare.action_space.sample() for _ in range(N_ENVS)]) for _ in range(n_bare)]
    _, callback = model._setup_learn(10**9)
    model.set_logger(Logger(None, []))

    def branches(_: int) -> float:
        before = model.num_timesteps
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]
        return (model.num_timesteps - before - model.n_steps * N_ENVS) / model._seconds["branches"]

    def steps(_: int) -> float:
        return n_bare * N_ENVS / seconds(lambda: [bare.step(action) for action in actions])

    figures = interleave({"branches": branches, "bare": steps}, repeats)
    comparison = Comparison(
        f"branches, {env_id}, {N_ENVS} environments",
        "steps/s",
        figures["branches"],
        figures["bare"],
        bar=0.7,
        more_is_better=True,
        against="bare DummyVecEnv",
    )
    print_comparisons("Speed", [comparison], "branches")
    return comparison.as_json()


# -- memory ----------------------------------------------------------------------------------------------


def resident() -> float:
    """Memory of this process now, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """What N snapshots of an Atari environment take, and whether anything grows from one iteration to the next."""
    from sb3_trpo_ext.sampling.snapshot import VecSimulator

    n_snapshots, iterations = (16, 5) if arguments.quick else (512, 100)
    env = VecFrameStack(make_atari_with_snapshots(), 4)
    env.reset()
    simulator = VecSimulator(env)
    gc.collect()
    before = resident()
    snapshots = []
    for i in range(n_snapshots):
        snapshots.append(simulator.snapshot(i % 2))
        env.step(np.array([env.action_space.sample() for _ in range(2)]))
    gc.collect()
    taken = resident() - before
    env.close()
    del snapshots
    model = growing_model()
    sizes = []
    for _ in range(iterations):
        model.learn(1, reset_num_timesteps=False)
        gc.collect()
        sizes.append(resident())
    settled = sizes[len(sizes) // 5]
    print_table(
        "Memory",
        ("", "MB", "bar"),
        [
            (f"{n_snapshots} snapshots, Breakout, AtariWrapper, 4 frames stacked", f"{taken:.0f}", "< 150"),
            (f"growth over {iterations} iterations of CartPole-v1, after the first fifth", f"{sizes[-1] - settled:.1f}", "0"),
        ],
    )
    return {"n_snapshots": n_snapshots, "snapshots_mb": taken, "resident_mb": sizes}


def make_atari_with_snapshots() -> Any:
    import ale_py
    import gymnasium as gym
    from stable_baselines3.common.atari_wrappers import AtariWrapper

    gym.register_envs(ale_py)
    return make_vec_env(
        "BreakoutNoFrameskip-v4", n_envs=2, seed=0, wrapper_class=lambda env: SnapshotWrapper(AtariWrapper(env))
    )


def growing_model() -> TRPOExt:
    return TRPOExt(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=2, seed=0, wrapper_class=SnapshotWrapper),
        n_steps=64,
        batch_size=128,
        seed=0,
        device="cpu",
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=dict(n_rollout_states=32, n_branch_actions="all", branch_length=20),
    )


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"speed": speed, "memory": memory, "variance": variance}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--estimates", type=int, default=40, help="of the vine's gradient; more of what is cheaper")
    arguments = parser.parse_args()
    set_up()
    for part in arguments.parts:
        write_json(arguments.out, f"vine_{part}", arguments, {part: PARTS[part](arguments)})


if __name__ == "__main__":
    main()
