"""Values to come back to: of tensors, and of parameters with what an optimizer remembers of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch as th

from sb3_trpo_ext.numerics.parameters import FlatParameters


class Copies:
    """Values of tensors of any kind as they are now.

    :param tensors_of: the tensors, always as many; asked anew each time, as modules may put others in their buffers' places
    """

    def __init__(self, tensors_of: Callable[[], Iterable[th.Tensor]]) -> None:
        self._tensors_of = tensors_of
        self._values = [tensor.detach().clone() for tensor in tensors_of()]

    def _pairs(self) -> Iterator[tuple[th.Tensor, th.Tensor]]:
        yield from zip(self._tensors_of(), self._values, strict=True)

    @th.no_grad()
    def restore(self) -> None:
        """Write them back, bit for bit."""
        for tensor, value in self._pairs():
            tensor.copy_(value)

    def differ(self) -> bool:
        """Whether any of the tensors has other values by now."""
        return any(not th.equal(tensor, value) for tensor, value in self._pairs())

    @th.no_grad()
    def go_back(self, fraction: float) -> None:
        """Go back that far from the present values to these; whole numbers stay."""
        for tensor, value in self._pairs():
            if tensor.is_floating_point():
                tensor.lerp_(value, fraction)

    @contextmanager
    def put_in_place(self) -> Iterator[None]:
        """Context in which the tensors have these values, and after which they have those of its start."""
        present = Copies(self._tensors_of)
        try:
            self.restore()
            yield
        finally:
            present.restore()


class Checkpoint:
    """θ and an optimizer's state of it as they are now; :meth:`restore` brings both back bit for bit.

    As a context it restores on any exception, an interrupt included.

    :param parameters: θ; the optimizer's other parameters are left alone
    :param optimizer: any of torch's
    :param buffers: other tensors that are to come back with them, as for :class:`Copies`
    """

    def __init__(
        self, parameters: FlatParameters, optimizer: th.optim.Optimizer, buffers: Callable[[], Iterable[th.Tensor]] = tuple
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._buffers = Copies(buffers)
        self.theta = parameters.read()
        self._memory = [copy.deepcopy(optimizer.state.get(parameter)) for parameter in parameters.tensors]

    def restore(self) -> None:
        self._parameters.write(self.theta)
        self._buffers.restore()
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
