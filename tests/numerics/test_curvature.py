import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.numerics import curvature
from sb3_trpo_ext.numerics.curvature import AutogradLinearization, damped, gauss_newton_product, hessian_product
from sb3_trpo_ext.numerics.dense import ELEMENTWISE, DenseLinearization, DenseNetwork
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.numerics.slopes import activate
from tests.cases import dense


def network_of(activation, bias=True):
    return nn.Sequential(nn.Linear(3, 5, bias=bias), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 2)).double()


def jacobian(outputs, parameters):
    """Row by row: (outputs, P)."""
    rows = [
        parameters.flatten(th.autograd.grad(o, parameters.tensors, retain_graph=True, allow_unused=True))
        for o in outputs.reshape(-1)
    ]
    return th.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_products_of_dense_networks_agree_with_the_jacobian(activation, bias):
    network, x = network_of(activation, bias), th.randn(6, 3, dtype=th.float64)
    parameters = FlatParameters(network.parameters())
    J = jacobian(network(x), parameters)
    v, u = th.randn(len(parameters), dtype=th.float64), th.randn(6, 2, dtype=th.float64)
    read = DenseNetwork.read([network])
    assert read is not None
    for linearization in (DenseLinearization(read, x, parameters), AutogradLinearization([network(x)], parameters)):
        th.testing.assert_close(linearization.outputs[0], network(x).detach())
        th.testing.assert_close(linearization.jvp(v)[0].reshape(-1), J @ v)
        th.testing.assert_close(linearization.vjp((u,)), u.reshape(-1) @ J)


@pytest.mark.parametrize(
    "activation",
    [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.ELU(0.4), nn.ELU(-1.0)],
    ids=repr,
)
def test_common_activations_need_no_graph_for_their_slopes(activation, monkeypatch):
    z = th.tensor([-800.0, -2.0, -0.0, 0.0, 1e-9, 3.0, 800.0, th.nan], dtype=th.float64)
    free = z.clone().requires_grad_()
    expected = activation(free.clone())
    (expected_slope,) = th.autograd.grad(expected.sum(), free)
    monkeypatch.setattr(th.autograd, "grad", lambda *_, **__: pytest.fail("a graph"))
    slope = th.empty_like(z)
    activate(activation, z, slope)
    th.testing.assert_close(z, expected.detach(), equal_nan=True)
    th.testing.assert_close(slope[:-1], expected_slope[:-1])


def test_a_part_of_the_layers_and_a_free_output():
    network, x, log_std = network_of(nn.Tanh), th.randn(6, 3, dtype=th.float64), nn.Parameter(th.randn(2).double())
    parameters = FlatParameters([log_std, network[2].weight, network[4].bias])
    linearization = DenseLinearization(DenseNetwork.read([network]), x, parameters, free=log_std)
    outputs = th.cat([network(x), log_std.expand(6, 2)], dim=1)
    J = jacobian(outputs, parameters)
    v, u = th.randn(len(parameters), dtype=th.float64), th.randn(6, 4, dtype=th.float64)
    th.testing.assert_close(th.cat(linearization.jvp(v), dim=1).reshape(-1), J @ v)
    th.testing.assert_close(linearization.vjp(u.split(2, dim=1)), u.reshape(-1) @ J)


def test_sums_of_squares_by_tensor_agree_with_the_jacobian(monkeypatch):
    monkeypatch.setattr(curvature, "_PROBES", 4000)
    network, x = nn.Sequential(*network_of(nn.Tanh)[:4], nn.Linear(4, 1).double()), th.randn(6, 3, dtype=th.float64)
    parameters = FlatParameters([network[0].bias, network[2].weight, network[0].weight, network[4].bias])
    squares = jacobian(network(x), parameters).square().sum(dim=0)
    expected = th.stack([part.sum() for part in parameters.split(squares)])
    exact = DenseLinearization(DenseNetwork.read([network]), x, parameters).block_squares()
    th.testing.assert_close(exact, expected)
    estimated = AutogradLinearization([network(x)], parameters).block_squares()
    th.testing.assert_close(estimated, expected, rtol=0.1, atol=0.0)


def test_an_output_without_a_graph_has_a_zero_row():
    network, x = network_of(nn.Tanh), th.randn(4, 3, dtype=th.float64)
    parameters = FlatParameters(network.parameters())
    constant = th.ones(4, 3, dtype=th.float64)
    linearization = AutogradLinearization([constant, network(x)], parameters)
    tangents = linearization.jvp(th.randn(len(parameters), dtype=th.float64))
    assert tangents[0].shape == (4, 3) and not tangents[0].any() and tangents[1].any()


def test_gauss_newton_product_is_JtMJ():
    network, x = network_of(nn.Tanh), th.randn(6, 3, dtype=th.float64)
    parameters = FlatParameters(network.parameters())
    J, M = jacobian(network(x), parameters), th.tensor([2.0, 5.0], dtype=th.float64)
    linearization = AutogradLinearization([network(x)], parameters)
    product = dense(lambda v: gauss_newton_product(linearization, lambda t: (t[0] * M,), v), len(parameters))
    th.testing.assert_close(product, J.T @ th.diag(M.repeat(6)) @ J)


def test_hessian_product_and_damping():
    x = nn.Parameter(th.tensor([1.0, 2.0], dtype=th.float64))
    unused = nn.Parameter(th.ones(1, dtype=th.float64))
    parameters = FlatParameters([x, unused])
    product = damped(hessian_product(lambda: x[0] ** 3 * x[1] ** 2, parameters), 0.5)
    expected = th.tensor([[24.5, 12.0, 0.0], [12.0, 2.5, 0.0], [0.0, 0.0, 0.5]], dtype=th.float64)
    th.testing.assert_close(dense(product, 3), expected)


class Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    "modules",
    [
        [Custom(2, 2)],
        [nn.Linear(2, 2), nn.Dropout()],
        [nn.Linear(2, 2), nn.LayerNorm(2)],
        [nn.Tanh(), nn.Linear(2, 2)],
        [nn.Linear(2, 2), nn.Tanh(), nn.Tanh()],
        [],
        [nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))],
    ],
)
def test_anything_but_a_plain_chain_is_not_read(modules):
    assert DenseNetwork.read(modules) is None


def test_a_layer_that_serves_twice_is_left_to_autograd():
    layer = nn.Linear(2, 2)
    assert DenseNetwork.read([layer, nn.Tanh(), layer]) is None


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward_pre": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward_pre": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "gradient": lambda layer: layer.weight.register_hook(lambda _: None),
    "accumulated_gradient": lambda layer: layer.bias.register_post_accumulate_grad_hook(lambda _: None),
    "of_all_modules": lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_hook_keeps_a_layer_from_being_read(register):
    layer = nn.Linear(2, 2)
    assert DenseNetwork.read([layer]) is not None
    handle = register(layer)
    assert DenseNetwork.read([layer]) is None and DenseNetwork.read([nn.Sequential(nn.Linear(2, 2), layer)]) is None
    handle.remove()
    assert DenseNetwork.read([layer]) is not None
