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
from sb3_trpo_ext.numerics.slopes import activate

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

    def parameters_in(self, module: nn.Module) -> FlatParameters:
        """Those that take gradients, in the order that a module has them in."""
        own = {id(parameter) for parameter in self.parameters() if parameter.requires_grad}
        return FlatParameters(parameter for parameter in module.parameters() if id(parameter) in own)

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

    Tangents are valid until the next product, outputs until the next move.

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
        self._weights = [layer.weight.detach() for layer in self._layers]
        self._transposed = [weight.t() for weight in self._weights]
        self._free = free
        slots = {id(parameter): i for i, parameter in enumerate(parameters.tensors)}
        self._slots = [(slots.get(id(layer.weight)), slots.get(id(layer.bias))) for layer in self._layers]
        self._free_slot = slots.get(id(free))
        # written anew by every product and move: fresh memory at each would cost as much as the sums
        sizes = [len(layer.weight) for layer in self._layers]
        self._activations, self._slopes, self._work = (
            [inputs.new_empty(len(inputs), size) for size in sizes] for _ in range(3)
        )
        self.move(inputs)

    @th.no_grad()
    def move(self, inputs: th.Tensor) -> None:
        """Linearise anew, at these inputs (B, in) and the present θ. Earlier outputs are overwritten."""
        assert len(inputs) == len(self._work[0])
        self._inputs = [inputs.detach(), *self._activations[:-1]]
        for i, layer in enumerate(self._layers):
            out = self._activations[i]
            if layer.bias is None:
                th.mm(self._inputs[i], self._transposed[i], out=out)
            else:
                th.addmm(layer.bias, self._inputs[i], self._transposed[i], out=out)
            if layer.activation is not None:
                activate(layer.activation, out, self._slopes[i])
        self.outputs: Outputs = (self._activations[-1],)
        if self._free is not None:
            self.outputs = (self._activations[-1], self._free.detach().expand(len(inputs), -1))

    @th.no_grad()
    def jvp(self, v: th.Tensor, tangent: th.Tensor | None = None) -> Outputs:
        """v ↦ Jv.

        :param tangent: of the inputs, (B, in), where they are held by others
        """
        parts = self._parameters.split(v)
        for i, layer in enumerate(self._layers):
            weight_slot, bias_slot = self._slots[i]
            work = self._work[i]
            if tangent is None:
                work.zero_()
            else:
                th.mm(tangent, self._transposed[i], out=work)
            if weight_slot is not None:
                work.addmm_(self._inputs[i], parts[weight_slot].t())
            if bias_slot is not None:
                work.add_(parts[bias_slot])
            tangent = work if layer.activation is None else work.mul_(self._slopes[i])
        assert tangent is not None
        if self._free is None:
            return (tangent,)
        free = th.zeros_like(self._free) if self._free_slot is None else parts[self._free_slot]
        return tangent, free.expand(len(tangent), -1)

    def vjp(self, u: Outputs) -> th.Tensor:
        gradient = u[0].new_zeros(len(self._parameters))
        self.write_vjp(u, self._parameters.split(gradient))
        return gradient

    @th.no_grad()
    def write_vjp(self, u: Outputs, parts: list[th.Tensor]) -> None:
        """Write Jᵀu into tensors in the shapes of the parameters; what θ has beside the network is left alone."""
        if self._free_slot is not None:
            th.sum(u[1], dim=0, out=parts[self._free_slot])
        cotangent = u[0]
        for i in range(len(self._layers) - 1, -1, -1):
            weight_slot, bias_slot = self._slots[i]
            if self._layers[i].activation is not None:
                cotangent = th.mul(cotangent, self._slopes[i], out=self._work[i])
            if weight_slot is not None:
                th.mm(cotangent.t(), self._inputs[i], out=parts[weight_slot])
            if bias_slot is not None:
                th.sum(cotangent, dim=0, out=parts[bias_slot])
            if i > 0:
                cotangent = th.mm(cotangent, self._weights[i], out=self._work[i - 1])

    @th.no_grad()
    def block_squares(self, weights: th.Tensor | None = None) -> th.Tensor:
        """See ``Linearization.block_squares``. For networks with one output, whose gradient in W is an outer product."""
        assert self.outputs[0].shape[1:] == (1,) and self._free is None, "one output a state"
        squares = self.outputs[0].new_zeros(len(self._parameters.tensors))
        cotangent = th.ones_like(self.outputs[0])
        if weights is not None:
            cotangent = weights.sqrt().to(cotangent).unsqueeze(1)
        for i in range(len(self._layers) - 1, -1, -1):
            weight_slot, bias_slot = self._slots[i]
            if self._layers[i].activation is not None:
                cotangent = cotangent * self._slopes[i]
            lengths = cotangent.square().sum(dim=1)
            if weight_slot is not None:
                squares[weight_slot] = lengths @ self._inputs[i].square().sum(dim=1)
            if bias_slot is not None:
                squares[bias_slot] = lengths.sum()
            if i > 0:
                cotangent = cotangent @ self._weights[i]
        return squares


def _leaves(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential and not has_hooks(module):
            yield from _leaves(module)
        else:
            yield module


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or changes what this module, its own parameters included, computes forward or backward."""
    of_module = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    of_parameters = ((p._backward_hooks, p._post_accumulate_grad_hooks) for p in module.parameters(recurse=False))
    return (
        any(of_module)
        or any(any(hooks) for hooks in of_parameters)
        or "forward" in vars(module)
        or bool(nn.modules.module._has_any_global_hook())
    )
