"""A page of pictures of the theory, each panel naming its equation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_trpo_ext.checks import needs_extra
from sb3_trpo_ext.lab import algorithms, bounds
from sb3_trpo_ext.lab.env import sample_transitions, sampled_problem
from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, optimal_values, random_mdp
from sb3_trpo_ext.lab.policies import ExactProblem, LogLinear, TabularSoftmax


def two_action_example(theta: float = 0.0, step_size: float = 0.01, n_steps: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """θ_k of plain and of natural gradient ascent on J(θ) = 100 π_θ[1] + 1 π_θ[2], one state, π_θ[1] = σ(θ); (n + 1,) each.

    J' = 99 e^θ/(1 + e^θ)² vanishes towards the optimum at θ = ∞ and plain steps with it; F_θ = e^θ/(1 + e^θ)²,
    so every natural step is 99η (lecture, "Example of Natural Gradient on 1-d problem").
    """
    mdp = FiniteMDP(np.ones((1, 2, 1)), np.array([[100.0, 1.0]]), np.ones(1), 0.0)
    paths = []
    for ascent in (algorithms.gradient_ascent, algorithms.natural_policy_gradient):
        policy = LogLinear(np.array([[[1.0], [0.0]]]), np.array([theta]))
        paths.append([policy.theta.item() for _ in islice(ascent(mdp, policy, step_size), n_steps + 1)])
    return np.array(paths[0]), np.array(paths[1])


def draw_page(picture: Path, small: bool = False) -> None:
    """Draw all panels as one PNG.

    :param picture: where to write
    :param small: fewer steps and samples, to see that it works
    """
    with needs_extra("pictures of the laboratory need", "plots"):
        from matplotlib.figure import Figure

    picture.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(16, 9), layout="constrained")
    panels = (_monotone, _tightness, _two_actions, _plain_and_natural, _sampled, _balls)
    for panel, axes in zip(panels, figure.subplots(2, 3).flat, strict=True):
        panel(axes, 8 if small else 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right" if panel is _balls else "best")
    figure.savefig(picture, dpi=75)


def _monotone(axes: Any, thrift: int) -> None:
    mdp = random_mdp(5, 3, gamma=0.5, seed=1)
    pi = np.full(mdp.shape, 1 / 3)
    runs = {
        "penalty C·max KL": (algorithms.monotone_policy_iteration(mdp, pi), "C0"),
        "conservative policy iteration": (algorithms.conservative_policy_iteration(mdp, pi), "C1"),
    }
    for name, (run, colour) in runs.items():
        history = list(islice(run, 50 // thrift))
        axes.plot([iterate.values.eta for iterate in history], colour, label=f"η, {name}")
        axes.plot([iterate.lower_bound for iterate in history], colour + ":", lw=2.5, label="its lower bound M")
    axes.axhline(optimal_values(mdp).eta, color="k", lw=0.8, label="optimal η")
    axes.set(
        xlabel="iteration i",
        title="Monotone improvement: η(π$_{i+1}$) ≥ M$_i$(π$_{i+1}$) ≥ η(π$_i$)\nTRPO eq. 10, algorithm 1",
    )


def _tightness(axes: Any, thrift: int) -> None:
    mdp = random_mdp(5, 3, gamma=0.7, seed=6, concentration=0.1)
    old = evaluate(mdp, np.full(mdp.shape, 1 / 3))
    better = optimal_values(mdp).pi
    alphas = np.linspace(0.0, 0.3, 200 // thrift)
    mixed = [bounds.mixture(old.pi, better, alpha) for alpha in alphas]
    axes.plot(alphas, [evaluate(mdp, pi).eta for pi in mixed], "k", label="η(π_new)")
    axes.plot(alphas, [bounds.surrogate(old, pi) for pi in mixed], label="L(π_new)")
    mixture_bound = [bounds.mixture_lower_bound(old, better, alpha) for alpha in alphas]
    axes.plot(alphas, mixture_bound, label="L − 2εγα²/((1−γ(1−α))(1−γ))")
    axes.plot(alphas, [bounds.tv_lower_bound(old, pi) for pi in mixed], label="L − C·max TV²")
    axes.plot(alphas, [bounds.kl_lower_bound(old, pi) for pi in mixed], label="L − C·max KL")
    axes.set(xlabel="α in π_new = (1 − α)π + απ'", ylim=(old.eta - 3.0, None))
    axes.set_title("How tight: Kakade & Langford's theorem 4.1 (TRPO eq. 6\nis looser), total variation (eq. 8), KL (eq. 9)")


def _two_actions(axes: Any, thrift: int) -> None:
    plain, natural = two_action_example(n_steps=80 // thrift)
    axes.plot(plain, label="plain: θ += η·99e$^θ$/(1 + e$^θ$)²")
    axes.plot(natural, label="natural: θ += 99η")
    axes.set(
        xlabel="iteration",
        ylabel="θ",
        title="The lecture's two actions, J = 100π[1] + π[2]\nθ += ηJ'(θ) against θ += ηJ'(θ)/F(θ)",
    )


def _plain_and_natural(axes: Any, thrift: int) -> None:
    mdp = random_mdp(8, 3, gamma=0.9, seed=4, concentration=0.2)
    best = optimal_values(mdp).eta
    for name, ascent, colour in (("∇η", algorithms.gradient_ascent, "C0"), ("F⁺∇η", algorithms.natural_policy_gradient, "C1")):
        for step_size, style in ((0.1, ":"), (1.0, "-")):
            history = islice(ascent(mdp, TabularSoftmax(np.zeros(mdp.shape)), step_size), 200 // thrift)
            gaps = [max(best - iterate.values.eta, 1e-12) for iterate in history]
            axes.semilogy(gaps, colour + style, label=f"θ += {step_size:g} {name}")
    axes.set(xlabel="iteration", ylabel="η* − η", ylim=(1e-8, None))
    axes.set_title("Plain against natural gradient, TRPO eqs. 18 and 17\n(tabular softmax; F⁻¹∇η as Kakade 2001 defines it)")


def _sampled(axes: Any, thrift: int) -> None:
    mdp, rng = random_mdp(6, 3, gamma=0.8, seed=2), np.random.default_rng(0)
    policy = LogLinear(rng.normal(size=(6, 3, 4)), rng.normal(size=4))
    exact = ExactProblem(mdp, policy)
    v, advantages = th.as_tensor(rng.normal(size=4)), exact.old.A
    sizes, n_repeats = 4 ** np.arange(2, 8 if thrift == 1 else 4), 20 // thrift
    errors: dict[str, list[float]] = {"g": [], "Fv, Gauss-Newton": [], "Fv, empirical": []}
    for size in sizes:
        squares = dict.fromkeys(errors, 0.0)
        for _ in range(n_repeats):
            batch = sample_transitions(mdp, exact.old.pi, 50, int(size), rng)
            states, actions = batch.states[-1], batch.actions[-1]
            for fisher, name in (("gauss_newton", "Fv, Gauss-Newton"), ("empirical", "Fv, empirical")):
                sampled = sampled_problem(policy, states, actions, advantages[states, actions], fisher)  # type: ignore[arg-type]
                squares[name] += float((sampled.fisher_product()(v) - exact.fisher_product()(v)).square().sum())
            squares["g"] += float((sampled.gradient()[1] - exact.gradient()[1]).square().sum())
        norms = {"g": float(exact.gradient()[1].norm())}
        for name in errors:
            norm = norms.get(name, float(exact.fisher_product()(v).norm()))
            errors[name].append(float(np.sqrt(squares[name] / n_repeats)) / norm)
    for name, error in errors.items():
        axes.loglog(sizes, error, "o-", label=name)
    axes.loglog(sizes, 3.0 / np.sqrt(sizes), "k:", label="∝ 1/√N")
    axes.set(xlabel="states N", ylabel="relative error, root mean square")
    axes.set_title(
        "Sampled against exact: g = ∇L, TRPO eq. 14;\nFv = JᵀMJv, appendix C, or average ∇log π ∇log πᵀv, section 6"
    )


def _balls(axes: Any, thrift: int) -> None:
    mdp, rng = random_mdp(4, 3, gamma=0.9, seed=7), np.random.default_rng(3)
    policy = LogLinear(rng.normal(size=(4, 3, 2)) * [1.5, 0.4])
    problem, radius, n = ExactProblem(mdp, policy), 0.05, 100 // thrift
    x, y = np.meshgrid(np.linspace(-1.3, 1.3, n), np.linspace(-1.3, 1.3, n))
    measured = []
    for s in np.stack([x, y], axis=-1).reshape(-1, 2):
        problem.parameters.write(th.as_tensor(s))
        measured.append(problem.evaluate())
    problem.parameters.write(th.zeros(2, dtype=th.float64))
    gains, kls = (np.reshape(column, x.shape) for column in zip(*measured, strict=True))
    F = np.stack([problem.fisher_product()(e).numpy() for e in th.eye(2, dtype=th.float64)])
    quadratic = 0.5 * (F[0, 0] * x**2 + 2 * F[0, 1] * x * y + F[1, 1] * y**2)
    axes.contourf(x, y, gains, levels=20, cmap="Greys", alpha=0.6)
    g = problem.gradient()[1].numpy()
    natural = np.linalg.solve(F, g)
    steps = g * np.sqrt(2 * radius / (g @ g)), natural * np.sqrt(2 * radius / (natural @ g))
    balls = (
        (0.5 * (x**2 + y**2), "C0", "-", "½‖s‖² = δ"),
        (kls, "C1", "-", "KL(π_old ‖ π) = δ"),
        (quadratic, "C1", ":", "½sᵀFs = δ"),
    )
    for values, colour, style, label in balls:
        axes.contour(x, y, values, levels=[radius], colors=colour, linestyles=style)
        axes.plot([], [], colour + style, label=label)
    for step, colour, label in zip(steps, ("C0", "C1"), ("plain step, eq. 18", "natural step, eq. 17"), strict=True):
        axes.annotate("", step, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
        axes.plot([], [], colour, lw=2, label=label)
    axes.set(xlabel="θ₁", ylabel="θ₂", aspect="equal", title="KL ball against L2 ball, L in grey\nTRPO eqs. 17 and 18")
