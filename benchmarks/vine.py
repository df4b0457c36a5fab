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
    "Hopper-v5": Variance(1000.0, 256, 32, 4, 100),
}


class Noise(NamedTuple):
    """tr Cov(ĝ) / ‖E ĝ‖² of one estimator with its bootstrap interval, and the steps that one estimate costs."""

    ratio: float
    low: float
    high: float
    steps: float

    @classmethod
    def of(cls, gradients: np.ndarray, steps: float, resamples: int = 200) -> Noise:
        rng, n = np.random.default_rng(0), len(gradients)
        drawn = [noise_of(gradients[rng.integers(n, size=n)], n - 1) for _ in range(resamples)]
        return cls(noise_of(gradients, n), *np.quantile(drawn, [0.05, 0.95]).tolist(), steps)


def noise_of(gradients: np.ndarray, n_distinct: float) -> float:
    """tr Cov / ‖E‖² from estimates (R, P); ‖ḡ‖² is too large by tr Cov / R on average, which is taken off."""
    mean = gradients.mean(axis=0)
    trace = ((gradients - mean) ** 2).sum() / (len(gradients) - 1)
    squared_norm = mean @ mean - trace / n_distinct
    return float(trace / squared_norm) if squared_norm > 0 else float("inf")


def half_trained(env_id: str, setting: Variance, seed: int, most: int) -> TRPOExt:
    env = make_vec_env(env_id, n_envs=N_ENVS, seed=seed)
    model = TRPOExt("MlpPolicy", env, n_steps=setting.n_steps, seed=seed, device="cpu", stats_window_size=20)
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


def vine_noise(model: TRPOExt, n_estimates: int) -> Noise:
    gradients = []
    for buffer in rollouts(model, n_estimates):
        gradients.append(model._policy_problem(next(buffer.get())).gradient()[1].numpy())
    return Noise.of(np.array(gradients, dtype=np.float64), model.num_timesteps / n_estimates)


def single_path_noises(model: TRPOExt, setting: Variance, n_values: int, n_estimates: int) -> dict[str, Noise]:
    """Both kinds of single path, from pairs drawn at random from one long rollout, which is kind to single path:

    pairs that follow each other would be alike. A pair costs one step.
    """
    buffer = next(rollouts(model, 1))
    usable = model.n_steps - setting.horizon
    returns = cut_returns(buffer.rewards, buffer.episode_starts, model.gamma, setting.horizon)
    advantages = {MONTE_CARLO: returns, GAE: buffer.advantages}
    chosen = np.random.default_rng(0).permutation(usable * N_ENVS)[: n_values * n_estimates].reshape(n_estimates, n_values)
    noises = {}
    for name, values in advantages.items():
        gradients = []
        for pairs in chosen:
            steps, envs = np.divmod(pairs, N_ENVS)
            weights = th.as_tensor(values[steps, envs], dtype=th.float32)
            observations, actions = (th.as_tensor(array[steps, envs]) for array in (buffer.observations, buffer.actions))
            log_probs = model.policy.get_distribution(observations).log_prob(model.as_taken(actions))
            parameters = [p for name, p in model.policy.named_parameters() if "value" not in name]
            gradient = th.autograd.grad(((weights - weights.mean()) * log_probs).mean(), parameters)
            gradients.append(np.concatenate([part.numpy().ravel() for part in gradient]))
        noises[name] = Noise.of(np.array(gradients, dtype=np.float64), n_values)
    return noises


def cut_returns(rewards: np.ndarray, episode_starts: np.ndarray, gamma: float, horizon: int) -> np.ndarray:
    """Σ_{i < horizon} γⁱ r_{t+i} to the end of the episode at most, for all t but the last ``horizon``."""
    n = len(rewards) - horizon
    total, alive = np.zeros((n, rewards.shape[1])), np.ones((n, rewards.shape[1]))
    for i in range(horizon):
        if i > 0:
            alive *= 1.0 - episode_starts[i : i + n]
        total += gamma**i * alive * rewards[i : i + n]
    return total


def measure_variance(env_id: str, n_estimates: int, most: int) -> dict[str, Noise]:
    setting, seed = VARIANCE[env_id], 0
    trained = half_trained(env_id, setting, seed, most)
    vine = dict(
        n_rollout_states=setting.n_states,
        n_branch_actions=setting.n_actions,
        branch_length=setting.horizon,
        branch_bootstrap=False,
    )
    noises = {}
    kinds = {"vine": {}, "vine, no common random numbers": dict(common_random_numbers=False)}
    for name, kind in kinds.items():
        model = like(trained, env_id, setting, seed + 1, 16, **vine, **kind)
        noises[name] = vine_noise(model, n_estimates)
    short = like(trained, env_id, setting, seed + 1, 16, **vine | dict(branch_length=10, branch_bootstrap=True))
    noises["vine, 10 steps and critic"] = vine_noise(short, n_estimates)
    branches = model.rollout_buffer.branches  # type: ignore[attr-defined]
    n_values = branches.q_values.size
    n_steps = setting.horizon + 5 * n_values * n_estimates // N_ENVS
    path = like(trained, env_id, setting, seed + 2, n_steps)
    return noises | single_path_noises(path, setting, n_values, n_estimates)


def variance(arguments: argparse.Namespace) -> dict[str, Any]:
    n_estimates, most = (4, 2_000) if arguments.quick else (arguments.estimates, 400_000)
    results = {env_id: measure_variance(env_id, n_estimates, most) for env_id in VARIANCE}
    rows = []
    for env_id, noises in results.items():
        reference = noises[MONTE_CARLO]
        for name, noise in noises.items():
            rows.append(
                (
                    f"{env_id}, {name}",
                    f"{noise.ratio:.3g} ({noise.low:.3g}-{noise.high:.3g})",
                    f"{noise.ratio / reference.ratio:.3f}",
                    f"{noise.steps:.0f}",
                    f"{noise.ratio * noise.steps / (reference.ratio * reference.steps):.2f}",
                )
            )
    header = ("", "noise (90% interval)", "against Monte Carlo", "steps an estimate", "noise x steps, against Monte Carlo")
    print_table("Noise of the gradient, equal numbers of Q-values; bar: the vine's at most 0.5", header, rows)
    draw_variance(arguments, results)
    return {env_id: {name: noise._asdict() for name, noise in noises.items()} for env_id, noises in results.items()}


def draw_variance(arguments: argparse.Namespace, results: dict[str, dict[str, Noise]]) -> None:
    drawing, axes = new_figure(11, 3.2, 1, len(results))
    for ax, (env_id, noises) in zip(axes[0], results.items(), strict=True):
        for row, noise in enumerate(noises.values()):
            if np.isfinite(noise.ratio):
                spread = [[max(noise.ratio - noise.low, 0.0)], [max(min(noise.high, 1e9) - noise.ratio, 0.0)]]
                ax.barh(row, noise.ratio, xerr=spread, color="tab:blue", alpha=0.8, capsize=3)
        ax.axvline(noises[MONTE_CARLO].ratio / 2, color="tab:red", lw=1, label="half of Monte Carlo")
        ax.set(yticks=range(len(noises)), xscale="log", xlabel="tr Cov(ĝ) / ‖E ĝ‖²", title=env_id)
        ax.set_yticklabels(noises if ax is axes[0][0] else [])
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
    parser.add_argument("--estimates", type=int, default=64, help="of each gradient")
    arguments = parser.parse_args()
    set_up()
    for part in arguments.parts:
        write_json(arguments.out, f"vine_{part}", arguments, {part: PARTS[part](arguments)})


if __name__ == "__main__":
    main()
