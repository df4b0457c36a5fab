import math

import pytest
import torch as th
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_trpo_ext.critic import AdamSettings, CriticProblem, FitOutcome, GaussNewtonSettings, fit_adam, fit_gauss_newton
from sb3_trpo_ext.numerics.dense import DenseNetwork
from sb3_trpo_ext.numerics.flat_optimizer import FlatOptimizer
from sb3_trpo_ext.numerics.parameters import FlatParameters
from tests.cases import dense


def network_and_data(n=64, seed=0):
    th.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = th.randn(n, 3, dtype=th.float64)
    return network, x, 5 + 3 * th.sin(x.sum(dim=1))


def problem_of(network, x, returns, mlp=False, **kwargs):
    read = (DenseNetwork.read([network]), x) if mlp else None
    return CriticProblem(lambda rows: network(x[rows]), returns, FlatParameters(network.parameters()), mlp=read, **kwargs)


@pytest.mark.parametrize("chunk_size", [7, 1000])
@pytest.mark.parametrize("mlp", [False, True])
def test_linearisation_agrees_with_the_dense_jacobian(mlp, chunk_size):
    network, x, returns = network_and_data(20)
    problem = problem_of(network, x, returns, mlp, chunk_size=chunk_size)
    parameters = problem.parameters
    J = th.stack([parameters.gradient(value) for value in map(lambda row: network(row).sum(), x)])
    errors = returns - network(x).flatten().detach()
    descent, curvature, scales = problem.linearize()
    th.testing.assert_close(descent, J.T @ errors / 20)
    th.testing.assert_close(dense(curvature, len(parameters)), J.T @ J / 20)
    assert problem.loss() == pytest.approx(float(errors.square().mean()))
    # one number a tensor: exact for a dense network, estimated from random signs for any other
    for part, scale in zip(parameters.split((J.T @ J / 20).diagonal()), parameters.split(scales), strict=True):
        assert (scale == scale.flatten()[0]).all()
        ratio = float(scale.flatten()[0]) / float(part.mean().sqrt())
        assert ratio == pytest.approx(1.0, rel=1e-9) if mlp else 0.5 < ratio < 2.0


def test_a_fit_of_a_dense_network_does_not_depend_on_the_order_of_the_states():
    def fitted(order):
        network, x, returns = network_and_data()
        problem = problem_of(network, x[order], returns[order], mlp=True)
        fit_gauss_newton(problem, 0.1, GaussNewtonSettings())
        return problem.parameters.read()

    th.testing.assert_close(fitted(th.arange(64)), fitted(th.randperm(64)))


@pytest.mark.parametrize("fit", ["adam", "gauss_newton"])
@pytest.mark.parametrize("mlp", [False, True])
def test_returns_may_be_of_another_precision_than_the_values(mlp, fit):
    def fitted(network, x, returns):
        problem = problem_of(network, x, returns, mlp)
        th.manual_seed(7)
        if fit == "adam":
            fit_adam(problem, adam_of(network), AdamSettings(1, 16))
        else:
            fit_gauss_newton(problem, 0.1, GaussNewtonSettings())
        return problem.parameters.read()

    for precision, other in ((th.float64, th.float32), (th.float32, th.float64)):
        network, x, returns = network_and_data()
        twin = network_and_data()[0]
        returns = returns.float()  # numbers that both have
        own = fitted(network.to(precision), x.to(precision), returns.to(other))
        assert own.dtype == precision
        th.testing.assert_close(own, fitted(twin.to(precision), x.to(precision), returns.to(precision)))


@pytest.mark.parametrize("mlp", [False, True])
def test_one_step_on_a_linear_model_is_ridge_regression(mlp):
    _, x, returns = network_and_data(50)
    network = nn.Sequential(nn.Linear(3, 1)).double()
    problem = problem_of(network, x, returns, mlp)
    phi = problem.parameters.read()
    design = th.cat([x, th.ones(50, 1, dtype=th.float64)], dim=1)
    damping = 0.2
    scales = problem.linearize()[2]
    system = design.T @ design / 50 + damping * th.diag(scales**2)
    expected = phi + th.linalg.solve(system, design.T @ (returns - design @ phi) / 50)
    settings = GaussNewtonSettings(steps=1, cg_max_steps=20, prior=0.0)
    report, damping_after = fit_gauss_newton(problem, damping, settings)
    th.testing.assert_close(problem.parameters.read(), expected)
    assert report.outcome is FitOutcome.FITTED
    # on a linear model the quadratic model is exact
    assert damping_after == pytest.approx(damping / 2)
    assert report.loss == pytest.approx(float((returns - design @ expected).square().mean()))


def test_the_prior_is_a_floor_of_the_damping_and_holds_a_fit_back():
    def fit(prior, n=50):
        network, x, returns = network_and_data(n)
        problem = problem_of(network, x, returns)
        return fit_gauss_newton(problem, 1e-9, GaussNewtonSettings(steps=1, prior=prior))

    assert fit(0.0)[1] < 1e-8
    assert fit(500.0)[1] >= 10.0 and fit(500.0, n=100)[1] >= 5.0
    assert fit(500.0)[0].loss < fit(5e4)[0].loss


def test_the_loss_never_rises():
    network, x, returns = network_and_data()
    problem, damping, losses = problem_of(network, x, returns), 0.1, []
    for _ in range(20):
        losses.append(problem.loss())
        _, damping = fit_gauss_newton(problem, damping, GaussNewtonSettings(steps=1, prior=0.0))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]


def test_damping_grows_where_no_step_lowers_the_loss():
    network, x, returns = network_and_data()
    problem = problem_of(network, x, returns)
    problem.loss = iter([1.0] + [2.0] * 100).__next__
    phi = problem.parameters.read()
    report, damping = fit_gauss_newton(problem, 0.5, GaussNewtonSettings(steps=1))
    assert report.outcome is FitOutcome.UNCHANGED
    assert damping == 1.0 and th.equal(problem.parameters.read(), phi)


@pytest.mark.parametrize("where", ["descent", "curvature"])
def test_a_solve_that_is_not_finite_ends_the_fit_and_leaves_the_damping(where):
    network, x, returns = network_and_data()
    problem = problem_of(network, x, returns)
    phi, linearize = problem.parameters.read(), problem.linearize

    def spoiled():
        descent, curvature, scales = linearize()
        if where == "descent":
            return descent * math.nan, curvature, scales
        return descent, lambda v: curvature(v) * math.nan, scales

    problem.linearize = spoiled
    report, damping = fit_gauss_newton(problem, 0.5, GaussNewtonSettings())
    assert report.outcome is FitOutcome.NON_FINITE and damping == 0.5
    assert th.equal(problem.parameters.read(), phi)


def test_tiny_errors_do_not_divide_by_zero():
    network, x, _ = network_and_data()
    network = network.float()
    for parameter in network.parameters():
        parameter.data.zero_()
    report, _ = fit_gauss_newton(problem_of(network, x.float(), th.full((64,), 1e-24)), 0.1, GaussNewtonSettings())
    assert report.outcome is FitOutcome.FITTED


def critic_and_states(activation, n, seed=0):
    """A network of the size and the start of SB3's critics."""
    th.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 1))
    return network, th.randn(n, 4)


def explained(network, x, returns):
    errors = (returns - network(x).flatten().detach()).double()
    return 1.0 - float(errors.var() / returns.double().var())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize(
    "scale, offset", [(1e-6, 0.0), (300.0, 0.0), (1e6, 0.0), (1e9, 0.0), (1e14, 0.0), (10.0, 100.0), (1e9, 100.0)]
)
@pytest.mark.parametrize("mlp", [True, False])
def test_a_fit_moves_at_any_scale_of_the_returns(mlp, scale, offset, activation):
    network, x = critic_and_states(activation, 512)
    returns = scale * (th.sin(x.sum(dim=1)) + 0.5 * x[:, 0] * x[:, 1] + offset)
    read, head = ((DenseNetwork.read([network]), x) if mlp else None), network[-1]
    parameters, damping = FlatParameters(network.parameters()), 0.1
    for _ in range(8):
        problem = CriticProblem(lambda rows: network(x[rows]), returns, parameters, mlp=read, head=head)
        report, damping = fit_gauss_newton(problem, damping, GaussNewtonSettings())
        assert report.outcome is FitOutcome.FITTED
    assert explained(network, x, returns) > 0.35


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("scale", [1e6, 1e9])
def test_a_fit_of_a_network_whose_output_layer_is_not_known_comes_to_move(scale, activation):
    network, x = critic_and_states(activation, 512)
    returns = scale * (th.sin(x.sum(dim=1)) + 0.5 * x[:, 0] * x[:, 1])
    problem, damping = problem_of(network, x, returns, mlp=True), 0.1
    for _ in range(20):
        _, damping = fit_gauss_newton(problem, damping, GaussNewtonSettings())
    assert explained(network, x, returns) > 0.2


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_small_returns_that_v_itself_bootstraps_are_fitted(scale, activation):
    """A new V is far larger than the rewards, and part of every target."""
    network, x = critic_and_states(activation, 512)
    rewards, damping = scale * (th.sin(x.sum(dim=1)) + 0.5 * x[:, 0] * x[:, 1]), 0.1
    for _ in range(8):
        returns = rewards + 0.05 * network(x).flatten().detach()
        problem = problem_of(network, x, returns, mlp=True, head=network[-1])
        _, damping = fit_gauss_newton(problem, damping, GaussNewtonSettings())
    assert explained(network, x, returns) > 0.35


def test_the_damping_of_an_archive_that_stood_still_does_not_hold_back_the_next_fit():
    network, x = critic_and_states(nn.ReLU, 512)
    returns = 1e6 * th.sin(x.sum(dim=1))
    problem = problem_of(network, x, returns, mlp=True, head=network[-1])
    _, damping = fit_gauss_newton(problem, 1e4, GaussNewtonSettings())
    assert damping < 1.0 and explained(network, x, returns) > 0.4


def test_a_small_batch_does_not_undo_what_was_learned_from_larger_ones():
    """Ten states near a goal, say, whose returns are tiny: V is right elsewhere."""
    network, x, returns = network_and_data(400)
    problem, damping = problem_of(network, x, returns, mlp=True, head=network[-1]), 0.1
    for _ in range(20):
        _, damping = fit_gauss_newton(problem, damping, GaussNewtonSettings())
    few = problem_of(network, x[:10], 1e-9 * returns[:10], mlp=True, head=network[-1])
    fit_gauss_newton(few, damping, GaussNewtonSettings(steps=1))
    assert explained(network, x, returns) > 0.5


@pytest.mark.parametrize("mlp", [False, True])
def test_a_module_that_only_looks_like_the_output_layer_is_left_alone(mlp):
    network, x, returns = network_and_data(400)
    network[-1].bias.data += 50.0
    decoy = nn.Linear(2, 1).double()
    problem = problem_of(network, x, 1e9 * returns, mlp, head=decoy)
    kept = decoy.weight.clone()
    fit_gauss_newton(problem, 0.1, GaussNewtonSettings())
    assert th.equal(decoy.weight, kept)
    first = problem_of(network, x, 1e9 * returns, mlp, head=network[0])  # V is not made constant by it
    phi = first.parameters.read()
    assert not first.make_constant(2.0 * first.loss()) or float(network(x).std()) == 0.0
    first.parameters.write(phi)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("returns", [0.0, 3.0])
def test_a_critic_that_does_not_depend_on_its_parameters_here_is_unchanged(mlp, returns):
    network, x, _ = network_and_data()
    nn.init.zeros_(network[2].weight)
    parameters = FlatParameters(network[0].parameters())
    read = (DenseNetwork.read([network]), x) if mlp else None
    problem = CriticProblem(lambda rows: network(x[rows]), th.full((64,), returns).double(), parameters, mlp=read)
    phi = parameters.read()
    report, damping = fit_gauss_newton(problem, 0.5, GaussNewtonSettings())
    assert report.outcome is FitOutcome.UNCHANGED and math.isfinite(report.loss) and math.isfinite(damping)
    assert th.equal(parameters.read(), phi)


def adam_of(network, **kwargs):
    return th.optim.Adam(network.parameters(), lr=1e-2, **kwargs)


OPTIMIZERS = {
    "adam": adam_of,
    "amsgrad": lambda network: adam_of(network, amsgrad=True, weight_decay=0.1, eps=1e-5),
    "adamw": lambda network: th.optim.AdamW(network.parameters(), lr=1e-2, fused=True),
    "rmsprop": lambda network: th.optim.RMSprop(network.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "sgd": lambda network: th.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True),
    "adagrad": lambda network: th.optim.Adagrad(network.parameters(), lr=1e-2),  # not among the flat ones
}


def plain_epoch(network, x, returns, optimizer, batch_size):
    losses = []
    for rows in th.randperm(len(x)).split(batch_size):
        loss = nn.functional.mse_loss(network(x[rows]).flatten(), returns[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("mlp", [False, True])
def test_adam_does_what_a_plain_loop_does(mlp, optimizer_of):
    (network, x, returns), (other, _, _) = network_and_data(), network_and_data()
    settings = AdamSettings(n_critic_updates=3, batch_size=10)
    own, optimizer, losses = optimizer_of(network), optimizer_of(other), []
    th.manual_seed(7)
    fit_adam(problem_of(network, x, returns, mlp), own, settings)
    # a second fit goes on from the state that the first has left
    report = fit_adam(problem_of(network, x, returns, mlp), own, settings)
    th.manual_seed(7)
    for _ in range(6):
        losses += plain_epoch(other, x, returns, optimizer, 10)
    th.testing.assert_close(FlatParameters(network.parameters()).read(), FlatParameters(other.parameters()).read())
    th.testing.assert_close(own.state_dict()["state"], optimizer.state_dict()["state"])
    assert report.loss == pytest.approx(sum(losses[21:]) / 21)


def test_what_the_flat_optimizer_leaves_alone():
    network, _, _ = network_and_data()
    parameters = FlatParameters(network.parameters())
    assert FlatOptimizer.of(adam_of(network), parameters) is not None
    assert FlatOptimizer.of(th.optim.Adagrad(network.parameters()), parameters) is None
    two_groups = th.optim.Adam([{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": 1.0}])
    assert FlatOptimizer.of(two_groups, parameters) is None
    hooked = adam_of(network)
    hooked.register_step_post_hook(lambda *_: None)
    assert FlatOptimizer.of(hooked, parameters) is None
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert FlatOptimizer.of(adam_of(network), parameters) is None
    handle.remove()
    scheduled = adam_of(network)
    scheduled.step = scheduled.step
    assert FlatOptimizer.of(scheduled, parameters) is None
    uneven = adam_of(network)
    network[2](th.randn(1, 8, dtype=th.float64)).sum().backward()
    uneven.step()
    assert FlatOptimizer.of(uneven, parameters) is None
    assert FlatOptimizer.of(uneven, FlatParameters(network[2].parameters())) is not None
    assert FlatOptimizer.of(adam_of(network), FlatParameters([])) is None
    assert FlatOptimizer.of(adam_of(network[0]), parameters) is None


def test_fits_by_layers_and_by_autograd_take_turns_on_one_optimizer():
    """As they do where a hook comes or a policy changes: each fit goes on from the state that the last one left."""
    (network, x, returns), (other, _, _) = network_and_data(), network_and_data()
    own, optimizer = adam_of(network), adam_of(other)
    th.manual_seed(7)
    for mlp in (True, False, True, False):
        fit_adam(problem_of(network, x, returns, mlp), own, AdamSettings(1, 10))
    th.manual_seed(7)
    for _ in range(4):
        plain_epoch(other, x, returns, optimizer, 10)
    th.testing.assert_close(FlatParameters(network.parameters()).read(), FlatParameters(other.parameters()).read())
    th.testing.assert_close(own.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("mlp", [False, True])
def test_adam_clips_the_gradient_when_asked(mlp):
    network, x, returns = network_and_data()
    problem = problem_of(network, x, 1e6 * returns, mlp)
    phi = problem.parameters.read()
    settings = AdamSettings(n_critic_updates=1, batch_size=64, max_grad_norm=0.5)
    fit_adam(problem, th.optim.SGD(network.parameters(), lr=1.0), settings)
    assert float((problem.parameters.read() - phi).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("kind", ["adam", "gauss_newton"])
@pytest.mark.parametrize("mlp", [False, True])
def test_a_fit_that_meets_the_not_finite_is_taken_back_whole(mlp, kind, bad):
    network, x, returns = network_and_data()
    optimizer = adam_of(network)
    fit_adam(problem_of(network, x, returns, mlp), optimizer, AdamSettings(1, 16))
    returns[3] = bad
    problem = problem_of(network, x, returns, mlp)
    phi, state = problem.parameters.read(), [s["exp_avg"].clone() for s in optimizer.state.values()]
    if kind == "adam":
        report = fit_adam(problem, optimizer, AdamSettings(2, 16))
    else:
        report, _ = fit_gauss_newton(problem, 0.1, GaussNewtonSettings())
    assert report.outcome is FitOutcome.NON_FINITE
    assert th.equal(problem.parameters.read(), phi)
    assert all(th.equal(a, s["exp_avg"]) for a, s in zip(state, optimizer.state.values(), strict=True))
