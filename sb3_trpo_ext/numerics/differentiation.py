"""Derivatives of a function of θ: which kernels can be differentiated twice, and differences where none can."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch as th
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_trpo_ext.numerics.parameters import FlatParameters

T = TypeVar("T")
Tensors = tuple[th.Tensor, ...]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Around a forward pass whose graph is to be differentiated twice: kernels that can be, where torch has some.

    Attention goes without its fused kernels, and what ``torch.compile`` made runs as it was written.
    """
    with th.enable_grad(), sdpa_kernel(SDPBackend.MATH), as_written():
        yield


def as_written() -> AbstractContextManager[None]:
    """Around passes through modules whose parts may have been made by ``torch.compile``: without it, hooks included."""
    if "torch._dynamo" in sys.modules and hasattr(th.compiler, "set_stance"):  # from torch 2.6 on
        return th.compiler.set_stance("force_eager")
    return nullcontext()


def central_difference(function: Callable[[], Tensors], parameters: FlatParameters, v: th.Tensor) -> Tensors:
    """The derivative of a function of θ along v, (f(θ + hv) − f(θ − hv)) / 2h; θ is restored bit for bit."""
    theta, length = parameters.read(), float(v.double().norm())
    if length == 0.0:
        return tuple(th.zeros_like(part) for part in function())
    # what rounding and the third derivative leave is least near the cube root of the precision
    h = th.finfo(theta.dtype).eps ** (1 / 3) * max(1.0, float(theta.double().square().mean().sqrt())) / length
    try:
        parameters.write(theta + h * v)
        ahead = function()
        parameters.write(theta - h * v)
        behind = function()
    finally:
        parameters.write(theta)
    return tuple((after - before) / (2.0 * h) for after, before in zip(ahead, behind, strict=True))


def unless_impossible(exact: Callable[[], T], other: Callable[[], T]) -> T:
    """``exact()``, or ``other()`` where that asks autograd for a derivative that torch does not have."""
    try:
        return exact()
    except RuntimeError as error:
        if isinstance(error, th.cuda.OutOfMemoryError):
            raise
    return other()


def numbers_saved(function: Callable[[], Any], module: nn.Module) -> int:
    """Numbers, of four bytes, that autograd keeps of a function for its backward pass, the module's own apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}

    def see(tensor: th.Tensor) -> th.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with th.enable_grad(), th.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        result = function()  # alive until all is counted, so that no address serves twice
    del result
    return sum(sizes.values()) // 4


def has_functions_of_users(outputs: Iterable[th.Tensor]) -> bool:
    """Whether the graph has functions with a backward written in Python, which may not be differentiable itself."""
    pending = [output.grad_fn for output in outputs]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node, th.autograd.function.BackwardCFunction):
            return True
        following = {} if node is None else {edge for edge, _ in node.next_functions}
        pending += [edge for edge in following if edge not in seen]
        seen |= set(following)
    return False
