"""Time of one update and of its parts, against sb3_contrib.TRPO.

    python benchmarks/update.py [--quick] [--out DIR]

Measured in turns, in one process: ``train()`` on a rollout buffer that was filled once, everything
that it changes being restored outside the timing; the Fisher product, each with 1/15 of its set-up;
and how the time of a policy update grows with states and with parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from _measure import (
    OURS,
    REFERENCE,
    Comparison,
    SpacesOnly,
    Spread,
    Stopwatch,
    argument_parser,
    draw_ratios,
    figure,
    fill_rollout_buffer,
    initial_std_of_sb3,
    interleave,
    new_figure,
    print_comparisons,
    print_table,
    save_figure,
    seconds,
    set_up,
    write_json,
)
from gymnasium import spaces
from matplotlib.axes import Axes
from sb3_contrib import TRPO
from stable_baselines3.common.distributions import Distribution, kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.algorithms.archives import SB3_CONTRIB_SETTINGS
from sb3_trpo_ext.numerics.curvature import damped
from sb3_trpo_ext.trust_region import TrustRegionReport

DAMPING = 0.1
PRODUCTS = 15
"""Products for one linearisation, as in an update with the default ``cg_max_steps``."""


# -- models whose update can be repeated -----------------------------------------------------------------


class Repeatable:
    """A model with a full rollout buffer, and all that an update changes as it was at first."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._policy = copy.deepcopy(model.policy.state_dict())
        self._optimizer = copy.deepcopy(model.policy.optimizer.state_dict())
        # the buffer flattens its arrays in place when it is read
        self._buffer = copy.deepcopy(model.rollout_buffer)
        self._critic_damping = getattr(model, "critic_damping", None)

    def restore(self) -> None:
        self.model.policy.load_state_dict(self._policy)
        self.model.policy.optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        self.model.rollout_buffer = copy.deepcopy(self._buffer)
        if self._critic_damping is not None:
            self.model.critic_damping = self._critic_damping
        th.manual_seed(0)
        np.random.seed(0)

    def milliseconds(self, update: Callable[[Any], object]) -> float:
        """How long one update of the restored model takes."""
        self.restore()
        return 1000.0 * seconds(lambda: update(self.model))


def collected(algorithm: type[TRPO] | type[TRPOExt], env_id: str, n_steps: int, **arguments: Any) -> Repeatable:
    """A new model with one rollout in an environment."""
    arguments |= initial_std_of_sb3(algorithm)
    model: Any = algorithm("MlpPolicy", make_vec_env(env_id, seed=0), n_steps=n_steps, seed=0, device="cpu", **arguments)
    model.train = lambda: None
    model.learn(n_steps)
    del model.train
    return Repeatable(model)


class Size(NamedTuple):
    """Of the observations, actions, both hidden layers, and the batch."""

    inputs: int
    actions: int
    width: int
    states: int


def filled(algorithm: type[TRPO] | type[TRPOExt], size: Size, **arguments: Any) -> Repeatable:
    """A new model with random transitions."""
    env = SpacesOnly(
        spaces.Box(-np.inf, np.inf, (size.inputs,), np.float32), spaces.Box(-1.0, 1.0, (size.actions,), np.float32)
    )
    architecture = {"net_arch": [size.width, size.width]}
    arguments |= initial_std_of_sb3(algorithm)
    model = algorithm("MlpPolicy", env, n_steps=size.states, policy_kwargs=architecture, seed=0, device="cpu", **arguments)
    fill_rollout_buffer(model)
    return Repeatable(model)


def all_samples(model: Any) -> RolloutBufferSamples:
    return next(iter(model.rollout_buffer.get(batch_size=None)))


# -- train() ---------------------------------------------------------------------------------------------


def compare_train(name: str, ours: Repeatable, theirs: Repeatable, repeats: int, bar: float | None) -> Comparison:
    times = interleave(
        {
            REFERENCE: lambda _: theirs.milliseconds(lambda model: model.train()),
            OURS: lambda _: ours.milliseconds(lambda model: model.train()),
        },
        repeats,
    )
    return Comparison(name, "ms", times[OURS], times[REFERENCE], bar)


def compare_trains(repeats: int, n_steps: int) -> list[Comparison]:
    variants: tuple[tuple[str, dict[str, Any], float | None], ...] = (
        ("defaults", {}, 2.5),
        ("sb3_contrib's settings", SB3_CONTRIB_SETTINGS, 1.5),
        ('critic="adam"', {"critic": "adam"}, None),
    )
    comparisons = []
    for env_id in ("HalfCheetah-v5", "CartPole-v1"):
        theirs = collected(TRPO, env_id, n_steps)
        for settings, arguments, bar in variants:
            ours = collected(TRPOExt, env_id, n_steps, **arguments)
            name = f"train(), {env_id}, {settings}"
            comparisons.append(compare_train(name, ours, theirs, repeats, bar if env_id == "HalfCheetah-v5" else None))
    return comparisons


# -- the Fisher product ------------------------------------------------------------------------------------


class TheirFisher:
    """The Fisher product as ``TRPO.train()`` makes it, with the forward passes done beforehand."""

    def __init__(self, model: Any) -> None:
        observations = all_samples(model).observations
        self._model = model
        with th.no_grad():
            self._old: Distribution = copy.copy(model.policy.get_distribution(observations))
        self._new: Distribution = model.policy.get_distribution(observations)

    def linearize(self) -> Callable[[th.Tensor], th.Tensor]:
        """``_compute_actor_grad`` without the surrogate's gradient."""
        kl = kl_divergence(self._new, self._old).mean()
        parameters, gradients = [], []
        for name, parameter in self._model.policy.named_parameters():
            if "value" in name:
                continue
            (gradient,) = th.autograd.grad(kl, parameter, create_graph=True, retain_graph=True, allow_unused=True)
            if gradient is not None:
                parameters.append(parameter)
                gradients.append(gradient.reshape(-1))
        flat = th.cat(gradients)
        return lambda v: self._model.hessian_vector_product(parameters, flat, v)


def milliseconds_per_product(linearize: Callable[[], Callable], vectors: Sequence[th.Tensor], inner: int) -> float:
    """With the linearisation's share."""

    def solve() -> None:
        for _ in range(inner):
            product = linearize()
            for v in vectors:
                product(v)

    return 1000.0 * seconds(solve) / (inner * len(vectors))


def compare_products(name: str, size: Size, repeats: int, factor: int, bar: float, inner: int) -> Comparison:
    """Ours on every ``factor``-th state, theirs on all."""
    ours = filled(TRPOExt, size, kl_reduction="mean", sub_sampling_factor=factor).model
    problem = ours._policy_problem(all_samples(ours))
    theirs = TheirFisher(filled(TRPO, size).model)
    vectors = list(th.randn(PRODUCTS, len(problem.parameters), generator=th.Generator().manual_seed(0)))

    def our_linearization() -> Callable[[th.Tensor], th.Tensor]:
        return damped(problem.fisher_product(), DAMPING)

    if factor == 1:
        require_same(our_linearization()(vectors[0]), theirs.linearize()(vectors[0]))
    times = interleave(
        {
            REFERENCE: lambda _: milliseconds_per_product(theirs.linearize, vectors, inner),
            OURS: lambda _: milliseconds_per_product(our_linearization, vectors, inner),
        },
        repeats,
    )
    return Comparison(name, "ms", times[OURS], times[REFERENCE], bar)


def require_same(ours: th.Tensor, theirs: th.Tensor) -> None:
    """A comparison of times means nothing if the two are not the same matrix."""
    difference = float((ours - theirs).norm() / theirs.norm())
    if difference > 1e-3:
        raise RuntimeError(f"the Fisher products differ by {difference:.1e}")


def compare_fisher(repeats: int, quick: bool) -> list[Comparison]:
    states = 256 if quick else 2048
    small, large = Size(17, 6, 64, states), Size(376, 17, 256, states)
    return [
        compare_products("Fisher product, 64x64", small, repeats, 1, 1.4, 5),
        compare_products("Fisher product, 256x256", large, repeats, 1, 1.4, 1),
        compare_products("Fisher product, 64x64, every 10th state", small, repeats, 10, 5.0, 5),
        compare_products("Fisher product, 256x256, every 10th state", large, repeats, 10, 5.0, 1),
    ]


# -- growth ------------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """Times of a policy update, ms, at one size."""

    states: int
    parameters: int
    cg_iterations: int
    ours: list[float]
    theirs: list[float]


def update_policy(model: Any) -> TrustRegionReport:
    """Our update without the critic."""
    return model._update_policy(model._policy_problem(all_samples(model)))


def growth_at(size: Size, repeats: int) -> Growth:
    ours = filled(TRPOExt, size)
    # without critic updates its train() is the policy's update
    theirs = filled(TRPO, size, n_critic_updates=0)
    times = interleave(
        {
            REFERENCE: lambda _: theirs.milliseconds(lambda model: model.train()),
            OURS: lambda _: ours.milliseconds(update_policy),
        },
        repeats,
    )
    ours.restore()
    n_parameters = len(ours.model._policy_problem(all_samples(ours.model)).parameters)
    report = update_policy(ours.model)
    return Growth(size.states, n_parameters, report.cg_iterations, times[OURS], times[REFERENCE])


def exponent(sizes: Sequence[int], growths: Sequence[Growth]) -> float:
    """k of time ~ size^k, fitted over the upper half of the sizes, where fixed costs have faded."""
    upper = slice(len(sizes) // 2, None) if len(sizes) > 3 else slice(None)
    times = [Spread.of(growth.ours).median for growth in growths]
    return float(np.polyfit(np.log(sizes[upper]), np.log(times[upper]), 1)[0])


def print_growth(title: str, unit: str, sizes: Sequence[int], growths: Sequence[Growth]) -> None:
    rows = [
        (
            f"{size:,}",
            figure(growth.theirs),
            figure(growth.ours),
            growth.cg_iterations,
            f"{1000.0 * Spread.of(growth.ours).median / size:.3f}",
            Spread.of(their / our for our, their in zip(growth.ours, growth.theirs, strict=True)),
        )
        for size, growth in zip(sizes, growths, strict=True)
    ]
    header = (unit, f"{REFERENCE}, ms", f"{OURS}, ms", "CG steps", f"us per {unit[:-1]}", "ratio (min-max)")
    print_table(f"{title}; {OURS}'s time grows with the power {exponent(sizes, growths):.2f} of the {unit}", header, rows)


def measure_growth(repeats: int, quick: bool) -> tuple[list[Growth], list[Growth]]:
    """By states with the default policy, and by the width of its layers."""
    counts = (256, 512) if quick else tuple(2**k for k in range(10, 17))
    widths = (64, 128) if quick else (64, 128, 256, 512, 1000)
    by_states = [growth_at(Size(17, 6, 64, states), repeats) for states in counts]
    by_width = [growth_at(Size(17, 6, width, counts[1]), repeats) for width in widths]
    print_growth("Policy update by states, 64x64", "states", counts, by_states)
    parameters = [growth.parameters for growth in by_width]
    print_growth(f"Policy update by parameters, {counts[1]:,} states", "parameters", parameters, by_width)
    return by_states, by_width


# -- where the time goes -------------------------------------------------------------------------------------


class Breakdown:
    """``TRPOExt.train()`` taken apart by a stopwatch around its parts."""

    PARTS = (
        "data",
        "policy set-up",
        "gradient",
        "linearisation",
        "Fisher products",
        "line search",
        "rest of the policy step",
        "critic",
        "rest",
    )

    def __init__(self, repeatable: Repeatable) -> None:
        self._repeatable = repeatable

    def milliseconds(self) -> dict[str, float]:
        """Of one update, by part."""
        self._repeatable.restore()
        model, stopwatch = self._repeatable.model, Stopwatch()
        wrapped = self._wrap(model, stopwatch)
        total = seconds(model.train)
        for name in wrapped:
            delattr(model, name)
        parts = stopwatch.seconds
        step = parts.pop("step")
        inside = ("gradient", "linearisation", "Fisher products", "line search")
        parts["rest of the policy step"] = step - sum(parts[name] for name in inside)
        parts["rest"] = total - sum(parts.values())
        return {name: 1000.0 * parts[name] for name in self.PARTS}

    @classmethod
    def _wrap(cls, model: Any, stopwatch: Stopwatch) -> list[str]:
        """Put the stopwatch around a model's methods; the names of those to take it off again."""
        timed, buffer, set_up_problem = stopwatch.timed, model.rollout_buffer, model._policy_problem
        get = buffer.get

        def timed_get(**arguments: Any) -> Iterator[RolloutBufferSamples]:
            yield timed("data", next)(get(**arguments))

        def problem_of(samples: RolloutBufferSamples) -> Any:
            problem = timed("policy set-up", set_up_problem)(samples)
            cls._wrap_problem(problem, stopwatch)
            return problem

        buffer.get = timed_get
        model._policy_problem = problem_of
        model._update_policy = timed("step", model._update_policy)
        model._fit_critic = timed("critic", model._fit_critic)
        return ["_policy_problem", "_update_policy", "_fit_critic"]

    @staticmethod
    def _wrap_problem(problem: Any, stopwatch: Stopwatch) -> None:
        timed, linearize = stopwatch.timed, problem.fisher_product
        problem.gradient = timed("gradient", problem.gradient)
        problem.fisher_product = lambda: timed("Fisher products", timed("linearisation", linearize)())
        problem.evaluate = timed("line search", problem.evaluate)


def break_down(repeats: int, n_steps: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by part, with our defaults and with sb3_contrib's settings."""
    medians = {}
    for name, arguments in (("defaults", {}), ("sb3_contrib's settings", SB3_CONTRIB_SETTINGS)):
        breakdown = Breakdown(collected(TRPOExt, "HalfCheetah-v5", n_steps, **arguments))
        turns = [breakdown.milliseconds() for _ in range(repeats + 1)][1:]
        medians[name] = {part: Spread.of(turn[part] for turn in turns).median for part in Breakdown.PARTS}
    rows = []
    for part in Breakdown.PARTS:
        shares = [(times[part], times[part] / sum(times.values())) for times in medians.values()]
        rows.append((part, *(f"{time:.2f} ({share:.0%})" for time, share in shares)))
    print_table(f"Where {OURS}'s train() spends its time, HalfCheetah-v5, ms", ("", *medians), rows)
    return medians


# -- pictures ------------------------------------------------------------------------------------------------


def draw_growth(ax: Axes, sizes: Sequence[int], growths: Sequence[Growth], unit: str) -> None:
    for name, times in ((REFERENCE, [g.theirs for g in growths]), (OURS, [g.ours for g in growths])):
        spreads = [Spread.of(figures) for figures in times]
        ax.plot(sizes, [spread.median for spread in spreads], "o-", label=name)
        ax.fill_between(sizes, [spread.low for spread in spreads], [spread.high for spread in spreads], alpha=0.2)
    first = Spread.of(growths[-1].ours).median / sizes[-1]
    ax.plot(sizes, [first * size for size in sizes], "k:", lw=1, label="linear")
    ax.set(xscale="log", yscale="log", xlabel=unit, ylabel="ms", title=f"One policy update by {unit}")
    ax.legend()


def draw_breakdown(ax: Axes, medians: dict[str, dict[str, float]]) -> None:
    left = np.zeros(len(medians))
    for part in Breakdown.PARTS:
        widths = np.array([max(times[part], 0.0) for times in medians.values()])
        ax.barh(list(medians), widths, left=left, label=part, height=0.6)
        left += widths
    ax.set(xlabel="ms", title=f"Where {OURS}'s train() spends its time")
    ax.legend(fontsize="x-small", ncols=2)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="turns of each (11; 2 with --quick)")
    arguments = parser.parse_args()
    arguments.repeats = repeats = arguments.repeats or (2 if arguments.quick else 11)
    n_steps = 256 if arguments.quick else 2048
    set_up()
    trains = compare_trains(repeats, n_steps)
    print_comparisons("train() alone", trains)
    products = compare_fisher(repeats, arguments.quick)
    print_comparisons(f"Fisher product, with 1/{PRODUCTS} of its set-up", products)
    medians = break_down(repeats, n_steps)
    # the largest take seconds
    by_states, by_width = measure_growth(math.ceil(repeats / 4), arguments.quick)
    content = {
        "train": [comparison.as_json() for comparison in trains],
        "fisher_product": [comparison.as_json() for comparison in products],
        "breakdown_ms": medians,
        "by_states": [growth._asdict() for growth in by_states],
        "by_parameters": [growth._asdict() for growth in by_width],
    }
    write_json(arguments.out, "update", arguments, content)
    drawing, axes = new_figure(15, 9, 2, 2)
    draw_ratios(axes[0, 0], [*trains, *products], f"{REFERENCE}'s time as a multiple of ours")
    draw_breakdown(axes[0, 1], medians)
    draw_growth(axes[1, 0], [growth.states for growth in by_states], by_states, "states")
    draw_growth(axes[1, 1], [growth.parameters for growth in by_width], by_width, "parameters")
    save_figure(drawing, arguments.out, "update")


if __name__ == "__main__":
    main()
