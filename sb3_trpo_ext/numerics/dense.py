"""Chains of linear layers and elementwise activations, and their Jacobian products by hand.

The networks of most SB3 policies are such chains. Written out layer by layer, a product costs what
its matrix products cost, without the bookkeeping of a general graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch as th
from torch import nn

from sb3_trpo_ext.numerics.curvature import Outputs
from sb3_trpo_ext.numerics.parameters import FlatParameters

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.Tanh,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.Softplus,
    nn.Hardtanh,
    nn.ReLU6,
)


@dataclass(frozen=True)
class DenseLayer:
    """a ↦ σ(W a + b); ``activation`` is None for the identity."""

    weight: th.Tensor
    bias: th.Tensor | None
    activation: nn.Module | None


@dataclass(frozen=True)
class DenseNetwork:
    """A chain of dense layers on vectors."""

    layers: tuple[DenseLayer, ...]

    @classmethod
    def read(cls, modules: Iterable[nn.Module]) -> DenseNetwork | None:
        """The chain that the modules form when called in turn, or None if they are anything else.

        Only the plain torch classes count: a subclass, a hook or a parametrization may compute
        something different; a parameter that serves two layers is left to autograd.
        """
        layers: list[DenseLayer] = []
        for module in _leaves(modules):
            if has_hooks(module):
                return None
            if type(module) is nn.Linear:
                layers.append(DenseLayer(module.weight, module.bias, None))
            elif type(module) in ELEMENTWISE and layers and layers[-1].activation is None:
                layers[-1] = DenseLayer(layers[-1].weight, layers[-1].bias, module)
            elif type(module) is not nn.Identity:
                return None
        network = cls(tuple(layers))
        is_tied = len({id(p) for p in network.parameters()}) < len(network.parameters())
        return network if layers and not is_tied else None

    def parameters(self) -> list[th.Tensor]:
        return [p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None]

    def __call__(self, inputs: th.Tensor) -> th.Tensor:
        """Outputs (B, out) for inputs (B, in), with a graph if autograd is on."""
        activations = inputs
        for layer in self.layers:
            activations = nn.functional.linear(activations, layer.weight, layer.bias)
            if layer.activation is not None:
                activations = layer.activation(activations)
        return activations


class DenseLinearization:
    """The Jacobian of a dense network's outputs in θ, by layer-wise tangent and cotangent passes.

    Tangents are valid until the next product.

    :param network: the chain
    :param inputs: (B, in), held fixed
    :param parameters: θ; layers that are not in it are constants
    :param free: a parameter (D,) that is an output of its own for every state (a Gaussian's
        ``log_std``), appended as a second output (B, D)
    """

    def __init__(
        self,
        network: DenseNetwork,
        inputs: th.Tensor,
        parameters: FlatParameters,
        free: nn.Parameter | None = None,
    ) -> None:
        self._parameters = parameters
        self._layers = network.layers
        self._free = free
        self._slot = {id(parameter): i for i, parameter in enumerate(parameters.tensors)}
        self._inputs: list[th.Tensor] = []  # a₀ … of each layer
        self._slopes: list[th.Tensor | None] = []  # σ′(z) of each layer, None for the identity
        activations = inputs.detach()
        for layer in self._layers:
            self._inputs.append(activations)
            with th.no_grad():
                z = nn.functional.linear(activations, layer.weight, layer.bias)
            activations, slope = _activate(layer.activation, z)
            self._slopes.append(slope)
        # written anew by every product: fresh memory at each would cost as much as the sums
        self._work = [th.empty_like(a) for a in (*self._inputs[1:], activations)]
        self.outputs: Outputs = (activations,)
        if free is not None:
            self.outputs = (activations, free.detach().expand(len(activations), -1))

    @th.no_grad()
    def jvp(self, v: th.Tensor) -> Outputs:
        parts = self._parameters.split(v)
        tangent: th.Tensor | None = None
        for layer, a, slope, work in zip(self._layers, self._inputs, self._slopes, self._work, strict=True):
            d_weight, d_bias = self._part(parts, layer.weight), self._part(parts, layer.bias)
            if tangent is None:
                work.zero_()
            else:
                th.mm(tangent, layer.weight.t(), out=work)
            if d_weight is not None:
                work.addmm_(a, d_weight.t())
            if d_bias is not None:
                work.add_(d_bias)
            tangent = work if slope is None else work.mul_(slope)
        assert tangent is not None
        if self._free is None:
            return (tangent,)
        d_free = self._part(parts, self._free)
        free = th.zeros_like(self._free) if d_free is None else d_free
        return tangent, free.expand(len(tangent), -1)

    @th.no_grad()
    def vjp(self, u: Outputs) -> th.Tensor:
        gradient = u[0].new_zeros(len(self._parameters))
        parts = self._parameters.split(gradient)
        if self._free is not None and (d_free := self._part(parts, self._free)) is not None:
            th.sum(u[1], dim=0, out=d_free)
        cotangent = u[0]
        for i in range(len(self._layers) - 1, -1, -1):
            layer, a, slope = self._layers[i], self._inputs[i], self._slopes[i]
            if slope is not None:
                cotangent = th.mul(cotangent, slope, out=self._work[i])
            if (d_weight := self._part(parts, layer.weight)) is not None:
                th.mm(cotangent.t(), a, out=d_weight)
            if (d_bias := self._part(parts, layer.bias)) is not None:
                th.sum(cotangent, dim=0, out=d_bias)
            if i > 0:
                cotangent = th.mm(cotangent, layer.weight, out=self._work[i - 1])
        return gradient

    def _part(self, parts: list[th.Tensor], parameter: th.Tensor | None) -> th.Tensor | None:
        slot = self._slot.get(id(parameter))
        return None if slot is None else parts[slot]


def _leaves(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential and not has_hooks(module):
            yield from _leaves(module)
        else:
            yield module


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _activate(activation: nn.Module | None, z: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
    """σ(z) and σ′(z), both without a graph."""
    if activation is None:
        return z, None
    if type(activation) is nn.Tanh:
        a = th.tanh(z)
        return a, 1.0 - a * a
    with th.enable_grad():
        z = z.requires_grad_()
        # a copy, because activations may work in place
        a = activation(z.clone())
        (slope,) = th.autograd.grad(a.sum(), z)
    return a.detach(), slope
