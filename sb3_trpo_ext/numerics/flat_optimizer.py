"""A torch optimizer on some of its parameters, seen as one flat vector."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch as th
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_trpo_ext.numerics.parameters import FlatParameters

ELEMENTWISE_OPTIMIZERS: tuple[type[th.optim.Optimizer], ...] = (
    th.optim.Adam,
    th.optim.AdamW,
    th.optim.RMSprop,
    th.optim.SGD,
)
"""Optimizers that treat every number alike, whichever tensor it belongs to."""


class FlatOptimizer:
    """An optimizer of the same class, settings and state as a given one, on θ (P,) as a single tensor.

    For optimizers that treat every number alike this takes the same steps, in a fraction of the calls.
    The given optimizer's own state changes with :meth:`write_back` alone.

    :param optimizer: the given one
    :param parameters: θ, some of its parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: FlatParameters) -> None:
        self._original = optimizer
        self._parameters = parameters
        self.theta = nn.Parameter(parameters.read())
        self.theta.grad = th.zeros_like(self.theta)
        self._parts = parameters.split(self.theta.detach())
        self.gradient = parameters.split(self.theta.grad)
        """``theta.grad`` in the shapes of the parameters."""
        self._flat = _twin(optimizer, self.theta)
        states = [optimizer.state.get(parameter, {}) for parameter in parameters.tensors]
        if states[0]:
            self._flat.state[self.theta] = {
                name: parameters.flatten(state[name] for state in states) if _is_elementwise(name, value) else _copy(value)
                for name, value in states[0].items()
            }

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer, parameters: FlatParameters) -> FlatOptimizer | None:
        """The flat twin, or None where it might take other steps: classes that are not elementwise or are
        not torch's own, several parameter groups, hooks, or parameters with different histories."""
        held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        is_plain = (
            type(optimizer) in ELEMENTWISE_OPTIMIZERS
            and len(optimizer.param_groups) == 1
            and all(id(parameter) in held for parameter in parameters.tensors)
            and "step" not in vars(optimizer)
            and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            and not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
            and len({(parameter.device, parameter.dtype) for parameter in parameters.tensors}) == 1
        )
        return cls(optimizer, parameters) if is_plain and _have_one_history(optimizer, parameters) else None

    @th.no_grad()
    def step(self) -> None:
        """One step along ``theta.grad``, seen by the parameters."""
        self._flat.step()
        for parameter, part in zip(self._parameters.tensors, self._parts, strict=True):
            parameter.copy_(part)

    def write_back(self) -> None:
        """Give the optimizer the state that these steps have left."""
        state = self._flat.state[self.theta]
        parts = {name: self._parameters.split(value) for name, value in state.items() if _is_elementwise(name, value)}
        for i, parameter in enumerate(self._parameters.tensors):
            self._original.state[parameter] = {
                name: _copy(parts[name][i] if name in parts else value) for name, value in state.items()
            }


def _twin(optimizer: th.optim.Optimizer, theta: nn.Parameter) -> th.optim.Optimizer:
    """An optimizer of the same class and settings; on a CPU in one kernel where the settings leave that open."""
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    if theta.device.type == "cpu" and settings.get("fused", False) is None and settings.get("foreach") is None:
        with suppress(RuntimeError):  # a torch that has no such kernel
            type(optimizer)([theta], lr=0.0, fused=True)  # type: ignore[call-arg]
            settings["fused"] = True
    twin = type(optimizer)([theta], lr=0.0)  # type: ignore[call-arg]
    twin.param_groups[0].update(settings)
    return twin


def _is_elementwise(name: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state has one number for each of the parameter's."""
    return name != "step" and isinstance(value, th.Tensor)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, th.Tensor) else value


def _have_one_history(optimizer: th.optim.Optimizer, parameters: FlatParameters) -> bool:
    """Whether all of θ has taken the same number of steps, with the same kinds of memory."""

    def history(parameter: nn.Parameter) -> dict[str, Any]:
        state = optimizer.state.get(parameter, {})
        return {name: None if _is_elementwise(name, value) else float(value or 0) for name, value in state.items()}

    return all(history(parameter) == history(parameters.tensors[0]) for parameter in parameters.tensors)
