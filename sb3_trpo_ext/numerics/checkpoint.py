"""Parameters with what an optimizer remembers of them, to come back to."""

from __future__ import annotations

import copy
from types import TracebackType

import torch as th

from sb3_trpo_ext.numerics.parameters import FlatParameters


class Checkpoint:
    """θ and an optimizer's state of it as they are now; :meth:`restore` brings both back bit for bit.

    As a context it restores on any exception, an interrupt included.

    :param parameters: θ; the optimizer's other parameters are left alone
    :param optimizer: any of torch's
    """

    def __init__(self, parameters: FlatParameters, optimizer: th.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self.theta = parameters.read()
        self._memory = [copy.deepcopy(optimizer.state.get(parameter)) for parameter in parameters.tensors]

    def restore(self) -> None:
        self._parameters.write(self.theta)
        for parameter, memory in zip(self._parameters.tensors, self._memory, strict=True):
            if memory is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter] = copy.deepcopy(memory)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self.restore()
