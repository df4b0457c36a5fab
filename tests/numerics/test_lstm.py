"""LSTMs on sequences with resets: torch's own, asked one state at a time, is the oracle."""

import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.numerics import lstm as module
from sb3_trpo_ext.numerics.curvature import AutogradLinearization
from sb3_trpo_ext.numerics.dense import DenseNetwork
from sb3_trpo_ext.numerics.lstm import RecurrentLinearization, Segments, is_plain_lstm, run_lstm, run_to_ends
from sb3_trpo_ext.numerics.parameters import FlatParameters

N, T, D, H = 3, 13, 4, 5
RESETS = {
    "none": [],
    "at_starts": [0, T],
    "anywhere": [0, 3, 4, T - 1, T + 6, 2 * T, 2 * T + 1, 2 * T + 2, 3 * T - 1],
    "everywhere": list(range(N * T)),
}


class Case:
    """An LSTM with a head on sequences, in double precision."""

    def __init__(self, resets="anywhere", layers=2, bias=True):
        self.lstm = nn.LSTM(D, H, num_layers=layers, bias=bias).double()
        self.head = nn.Sequential(nn.Linear(H, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.x = th.randn(N * T, D).double()
        self.resets = th.zeros(N * T, dtype=th.bool)
        self.resets[RESETS[resets]] = True
        self.state = th.randn(N, layers, H).double(), th.randn(N, layers, H).double()
        self.segments = Segments.of(self.resets, N)

    @property
    def parameters(self):
        return FlatParameters([*self.lstm.parameters(), *self.head.parameters()])

    def one_by_one(self, x):
        """Outputs, and the states after each row."""
        outputs, states = [], []
        for row in range(N * T):
            if row % T == 0:
                state = tuple(part[row // T].unsqueeze(1) for part in self.state)
            if self.resets[row]:
                state = tuple(th.zeros_like(part) for part in state)
            output, state = self.lstm(x[row].view(1, 1, D), state)
            outputs.append(output.view(H))
            states.append([part[:, 0] for part in state])
        return th.stack(outputs), states


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("fewest", [1, 4])
def test_outputs_gradients_and_last_states(resets, fewest, monkeypatch):
    monkeypatch.setattr(module, "_FEWEST", fewest)
    case = Case(resets)
    wanted, states = case.one_by_one(case.x)
    outputs = run_lstm(case.lstm, case.x, case.segments, case.state)
    th.testing.assert_close(outputs, wanted, rtol=1e-12, atol=1e-14)
    weights = th.randn_like(wanted)
    gradients = (th.autograd.grad((out * weights).sum(), list(case.lstm.parameters())) for out in (outputs, wanted))
    for found, exact in zip(*gradients, strict=True):
        th.testing.assert_close(found, exact, rtol=1e-10, atol=1e-13)
    without_graph, ends = run_to_ends(case.lstm, case.x, case.segments, case.state)
    th.testing.assert_close(without_graph, wanted.detach(), rtol=1e-12, atol=1e-14)
    # every sequence ends with a piece, and every piece but the last of each is followed by a reset
    inner = {row for row in RESETS[resets] if row % T}
    assert sorted(case.segments.last.tolist()) == sorted({row - 1 for row in inner} | {T - 1, 2 * T - 1, 3 * T - 1})
    for piece, row in enumerate(case.segments.last.tolist()):
        for part, exact in zip(ends, states[row], strict=True):
            th.testing.assert_close(part[piece], exact.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("layers, bias", [(1, True), (2, True), (2, False)])
def test_the_jacobian_by_hand_is_that_of_the_graph(resets, layers, bias):
    case = Case(resets, layers, bias)
    free = nn.Parameter(th.randn(2).double())
    parameters = FlatParameters([free, *case.parameters.tensors])
    network = DenseNetwork.read([case.head])
    ours = RecurrentLinearization(case.lstm, network, case.x, case.segments, case.state, parameters, free)
    outputs = [case.head(case.one_by_one(case.x)[0]), free.expand(N * T, -1)]
    theirs = AutogradLinearization(outputs, parameters)
    v = th.randn(len(parameters)).double()
    u = tuple(th.randn_like(output) for output in ours.outputs)
    for found, exact in zip((*ours.outputs, *ours.jvp(v)), (*theirs.outputs, *theirs.jvp(v)), strict=True):
        th.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)
    th.testing.assert_close(ours.vjp(u), theirs.vjp(u), rtol=1e-10, atol=1e-12)
    th.testing.assert_close(ours.block_squares(), theirs.block_squares(), rtol=1e-9, atol=0.0)


def test_inputs_that_are_learned():
    case = Case()
    first = nn.Linear(D, D).double()
    parameters = FlatParameters([*first.parameters(), *case.parameters.tensors])
    network = DenseNetwork.read([case.head])
    ours = RecurrentLinearization(case.lstm, network, first(case.x), case.segments, case.state, parameters)
    theirs = AutogradLinearization([case.head(case.one_by_one(first(case.x))[0])], parameters)
    v, u = th.randn(len(parameters)).double(), (th.randn(N * T, 2).double(),)
    th.testing.assert_close(ours.jvp(v)[0], theirs.jvp(v)[0], rtol=1e-11, atol=1e-13)
    th.testing.assert_close(ours.vjp(u), theirs.vjp(u), rtol=1e-10, atol=1e-12)


def test_no_second_derivative_of_an_lstm_is_asked_for(monkeypatch):
    """cuDNN has none: a graph of a backward pass would be the first sign of it."""
    case, grad = Case(), th.autograd.grad

    def first_order(*args, create_graph=False, **kwargs):
        assert not create_graph
        return grad(*args, **kwargs)

    monkeypatch.setattr(th.autograd, "grad", first_order)
    network = DenseNetwork.read([case.head])
    ours = RecurrentLinearization(case.lstm, network, case.x, case.segments, case.state, case.parameters)
    assert ours.vjp(ours.jvp(th.ones(len(case.parameters)).double())).any()


def test_what_is_written_out_is_torchs_own_lstm():
    class Mine(nn.LSTM):
        pass

    assert is_plain_lstm(nn.LSTM(D, H, num_layers=2, dropout=0.5, bias=False))
    others = [nn.LSTM(D, H, proj_size=2), nn.LSTM(D, H, bidirectional=True), nn.LSTM(D, H, batch_first=True), Mine(D, H)]
    assert not any(map(is_plain_lstm, [*others, nn.GRU(D, H)]))


def test_pieces_of_a_block_are_of_about_one_length():
    resets = th.zeros(400, dtype=th.bool)
    resets[::10] = True
    segments = Segments.of(resets.index_fill(0, th.arange(10, 200, 10), False), 2)
    assert [len(part) for part in (segments.blocks, segments.sizes)] == [2, 200]
    assert sum(rows.numel() for _, rows, _ in segments.blocks) < 2 * 400
