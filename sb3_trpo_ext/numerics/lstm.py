"""LSTMs on sequences that are cut where memory is reset, and their Jacobian products without second derivatives.

The pieces, longest first, are one ragged batch, so time is the only loop. Jv is written out by hand, in that order: of
all its matrix products, the one with the recurrent weights alone has to be in the loop. Jᵀu is one backward pass of
torch's LSTM, which takes pieces of about the same length together, padded. So no fused kernel is asked for a second
derivative, which cuDNN has not and others have at a price.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch as th
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from sb3_trpo_ext.numerics.curvature import GeneralLinearization, Outputs, estimated_block_squares, pulled_back
from sb3_trpo_ext.numerics.dense import DenseLinearization, DenseNetwork
from sb3_trpo_ext.numerics.parameters import FlatParameters

_LEAST_FILLED, _FEWEST = 0.7, 2
"""How much shorter than its longest piece those of a block may be, and how many pieces it has before that counts."""

State = tuple[th.Tensor, th.Tensor]
"""Hidden and cell states of n sequences, each (n, layers, H)."""


@dataclass(frozen=True)
class Segments:
    """Sequences of T states, rows of a batch, cut where memory is reset into S pieces, the longest first.

    :param first: the row that each piece begins with, (S,)
    :param lengths: of the pieces, (S,), on the CPU
    :param sequence: which sequence each piece is of, (S,)
    :param keeps: 1 for pieces that begin with the memory of their sequence, 0 for those that begin anew, (S,)
    """

    first: th.Tensor
    lengths: th.Tensor
    sequence: th.Tensor
    keeps: th.Tensor

    @classmethod
    def of(cls, resets: th.Tensor, count: int) -> Segments:
        """The pieces of ``count`` sequences.

        :param resets: whether memory is reset before a state, (B,), sequence after sequence
        """
        device, resets = resets.device, resets.to("cpu", th.bool)
        begins = resets.clone()
        begins[:: len(resets) // count] = True
        first = begins.nonzero().flatten()
        lengths = th.diff(first, append=th.tensor([len(resets)], device="cpu"))
        rank = th.argsort(lengths, descending=True, stable=True)
        first, lengths = first[rank], lengths[rank]
        return cls(first.to(device), lengths, (first // (len(resets) // count)).to(device), (~resets[first]).to(device))

    @property
    def last(self) -> th.Tensor:
        """The row that each piece ends with, (S,)."""
        return self.first + self.lengths.to(self.first) - 1

    @cached_property
    def sizes(self) -> list[int]:
        """How many pieces are at least so long, by time."""
        return self._alive(0, len(self.lengths)).sum(dim=1).tolist()

    @cached_property
    def order(self) -> th.Tensor:
        """The rows by time since the start of their piece, then by piece, (B,)."""
        return self._rows(0, len(self.lengths))[self._alive(0, len(self.lengths)).to(self.first.device)]

    @cached_property
    def back(self) -> th.Tensor:
        """Where each row is in that order, (B,)."""
        return _inverse(self.order)

    @cached_property
    def blocks(self) -> list[tuple[slice, th.Tensor, th.Tensor]]:
        """Pieces of about the same length; their rows (time, pieces), padded with their last ones; which are no padding."""
        lengths, found, start = self.lengths.tolist(), [], 0
        for stop in range(1, len(lengths) + 1):
            is_apart = stop == len(lengths) or (stop - start >= _FEWEST and lengths[stop] < _LEAST_FILLED * lengths[start])
            if is_apart:
                alive = self._alive(start, stop).flatten().nonzero().flatten().to(self.first.device)
                found.append((slice(start, stop), self._rows(start, stop), alive))
                start = stop
        return found

    @cached_property
    def back_from_blocks(self) -> th.Tensor:
        """Where each row is among those of all blocks without padding, (B,)."""
        return _inverse(th.cat([rows.flatten()[alive] for _, rows, alive in self.blocks]))

    def _alive(self, start: int, stop: int) -> th.Tensor:
        """Whether pieces have a state at a time, (time, pieces)."""
        lengths = self.lengths[start:stop]
        return th.arange(int(lengths[0]), device="cpu")[:, None] < lengths

    def _rows(self, start: int, stop: int) -> th.Tensor:
        """The rows of pieces by time, the last one from there on, (time, pieces)."""
        lengths = self.lengths[start:stop]
        times = th.minimum(th.arange(int(lengths[0]), device="cpu")[:, None], lengths - 1)
        return self.first[start:stop] + times.to(self.first.device)

    def initial(self, state: State) -> State:
        """States that the pieces begin with, (S, layers, H), from those of the sequences."""
        h, c = (part[self.sequence] * self.keeps.to(part)[:, None, None] for part in state)
        return h, c


def _inverse(permutation: th.Tensor) -> th.Tensor:
    inverse = th.empty_like(permutation)
    inverse[permutation] = th.arange(len(permutation), device=permutation.device)
    return inverse


def run_lstm(lstm: nn.LSTM, inputs: th.Tensor, segments: Segments, state: State) -> th.Tensor:
    """Outputs (B, H) for inputs (B, ·), with a graph if autograd is on.

    :param state: before the first state of each sequence
    """
    if not th.is_grad_enabled():
        return run_to_ends(lstm, inputs, segments, state)[0]
    h, c = segments.initial(state)
    outputs = []
    with differentiable_twice():
        for pieces, rows, alive in segments.blocks:
            initial = (h[pieces].transpose(0, 1).contiguous(), c[pieces].transpose(0, 1).contiguous())
            outputs.append(lstm(inputs[rows], initial)[0].flatten(0, 1)[alive])
    return th.cat(outputs)[segments.back_from_blocks]


def run_to_ends(lstm: nn.LSTM, inputs: th.Tensor, segments: Segments, state: State) -> tuple[th.Tensor, State]:
    """Outputs (B, H), and the states after each piece; without a graph, which would cost T² here."""
    with th.no_grad():
        packed = PackedSequence(inputs[segments.order], th.tensor(segments.sizes, device="cpu"))
        h, c = (part.transpose(0, 1).contiguous() for part in segments.initial(state))
        outputs, (h, c) = lstm(packed, (h, c))
    return outputs.data[segments.back], (h.transpose(0, 1), c.transpose(0, 1))


def differentiable_twice() -> AbstractContextManager[None]:
    """Context in which recurrent layers have graphs of any use: those of cuDNN have no backward pass in evaluation mode,
    and no second derivative."""
    return th.backends.cudnn.flags(enabled=th.backends.cudnn.enabled and not th.is_grad_enabled())


def is_plain_lstm(lstm: object) -> bool:
    """Whether a module is an LSTM as written out here: torch's own class, one direction, without projections."""
    return type(lstm) is nn.LSTM and not (lstm.bidirectional or lstm.batch_first or lstm.proj_size)


class RecurrentLinearization:
    """The Jacobian in θ of a dense network's outputs on top of an LSTM's.

    :param lstm: see :func:`is_plain_lstm`
    :param inputs: of the LSTM, (B, in), with a graph if they depend on θ
    :param state: of the LSTM before the first state of each sequence
    :param parameters: θ
    :param free: as for :class:`DenseLinearization`
    """

    def __init__(
        self,
        lstm: nn.LSTM,
        network: DenseNetwork,
        inputs: th.Tensor,
        segments: Segments,
        state: State,
        parameters: FlatParameters,
        free: nn.Parameter | None = None,
    ) -> None:
        self._parameters, self._segments = parameters, segments
        self._features = GeneralLinearization(lambda: [inputs], parameters) if inputs.requires_grad else None
        with th.enable_grad():
            latent = run_lstm(lstm, inputs, segments, state)
            self._graph = [network(latent)] if free is None else [network(latent), free.expand(len(latent), -1)]
        self._dense = DenseLinearization(network, latent, parameters, free)
        self.outputs: Outputs = self._dense.outputs
        h, c = segments.initial(state)
        x = inputs.detach()[segments.order]
        self._layers = []
        for i, weights in enumerate(lstm.all_weights):
            self._layers.append(_Tangents(weights, x, h[:, i], c[:, i], segments.sizes, parameters))
            x = self._layers[-1].outputs

    @th.no_grad()
    def jvp(self, v: th.Tensor) -> Outputs:
        parts = self._parameters.split(v)
        tangent = None if self._features is None else self._features.jvp(v)[0][self._segments.order]
        for layer in self._layers:
            tangent = layer.jvp(parts, tangent)
        assert tangent is not None
        return self._dense.jvp(v, tangent[self._segments.back])

    def vjp(self, u: Outputs) -> th.Tensor:
        return pulled_back(self._graph, self._parameters, u)

    def block_squares(self, weights: th.Tensor | None = None) -> th.Tensor:
        """Estimated: see :func:`~sb3_trpo_ext.numerics.curvature.estimated_block_squares`."""
        return estimated_block_squares(self, self._parameters, weights)


class _Tangents:
    """Jv of one LSTM layer on a ragged batch: a = x Wᵢᵀ + h₋ Wₕᵀ + b; c = σ(f) c₋ + σ(i) tanh(g); h = σ(o) tanh(c).

    :param weights: Wᵢ, Wₕ and, if there are any, two biases
    :param inputs: (B, in), in the order of :class:`Segments`
    :param h, c: before each piece, (S, H)
    """

    def __init__(
        self,
        weights: list[nn.Parameter],
        inputs: th.Tensor,
        h: th.Tensor,
        c: th.Tensor,
        sizes: list[int],
        parameters: FlatParameters,
    ) -> None:
        slots = {id(parameter): i for i, parameter in enumerate(parameters.tensors)}
        self._slots = [slots.get(id(weight)) for weight in weights]
        self._w_inputs, self._w_hidden = (weight.detach() for weight in weights[:2])
        self._recurrent = self._w_hidden.t()
        self._inputs, self._sizes = inputs, sizes
        self._forward(h, c, sum(bias.detach() for bias in weights[2:]))

    def _forward(self, h: th.Tensor, c: th.Tensor, bias: th.Tensor | int) -> None:
        n_units, sizes = h.shape[1], self._sizes
        gates = self._inputs @ self._w_inputs.t() + bias
        cells, self.outputs = (gates.new_empty(len(gates), n_units) for _ in range(2))
        before = []
        for a, cell, out in zip(gates.split(sizes), cells.split(sizes), self.outputs.split(sizes), strict=True):
            h, c = h[: len(a)], c[: len(a)]
            before.append((h, c))
            a.addmm_(h, self._recurrent)
            i, f, g, o = a.chunk(4, dim=1)
            a[:, : 2 * n_units].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            h = th.mul(o, th.addcmul(i * g, f, c, out=cell).tanh(), out=out)
            c = cell
        self._hidden, cells_before = (th.cat(parts) for parts in zip(*before, strict=True))
        self._slopes(gates, cells, cells_before)

    def _slopes(self, gates: th.Tensor, cells: th.Tensor, cells_before: th.Tensor) -> None:
        """Derivatives of c and h in the gates, of c in c₋ and of h in c; what the loops of the products take by time."""
        i, f, g, o = gates.chunk(4, dim=1)
        squashed = cells.tanh_()
        of_cell = o * (1.0 - squashed.square())
        parts = (g * i * (1.0 - i), cells_before * f * (1.0 - f), i * (1.0 - g.square()), squashed * o * (1.0 - o))
        slopes, forgets = th.stack(parts, dim=1), f.contiguous()
        # written anew by every product
        self._gates = th.empty_like(slopes)
        self._rows = list(zip(*(part.split(self._sizes) for part in (self._gates, slopes, forgets, of_cell)), strict=True))

    def jvp(self, parts: list[th.Tensor], inputs_tangent: th.Tensor | None) -> th.Tensor:
        """Tangents of h, (B, H)."""
        n_units = self.outputs.shape[1]
        gates = self._gates.view(len(self.outputs), -1)
        if inputs_tangent is None:
            gates.zero_()
        else:
            th.mm(inputs_tangent, self._w_inputs.t(), out=gates)
        for slot, factor in zip(self._slots, (self._inputs, self._hidden, None, None), strict=False):
            if slot is not None:
                gates.add_(parts[slot]) if factor is None else gates.addmm_(factor, parts[slot].t())
        tangents = th.empty_like(self.outputs)
        h: th.Tensor | None = None
        c = tangents.new_zeros(self._sizes[0], n_units)
        for (a, slopes, forgets, of_cell), out in zip(self._rows, tangents.split(self._sizes), strict=True):
            if h is not None:
                a.view(len(a), -1).addmm_(h[: len(a)], self._recurrent)
            a.mul_(slopes)
            c = th.addcmul(a[:, :3].sum(dim=1), forgets, c[: len(a)])
            h = th.addcmul(a[:, 3], of_cell, c, out=out)
        return tangents
