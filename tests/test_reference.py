"""The oracle: against torch.nn and finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn.backends import Reference
from fusedrnn.cells import CELLS, LSTM
from fusedrnn.recurrence import recurrence
from fusedrnn.testing import Case, make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

FUNCTIONS = {
    "LSTM": (nn.LSTM, fusedrnn.reference.lstm, {}),
    "LSTM-proj": (nn.LSTM, fusedrnn.reference.lstm, {"proj_size": 3}),
    "GRU": (nn.GRU, fusedrnn.reference.gru, {}),
    "RNN-tanh": (nn.RNN, fusedrnn.reference.rnn, {"nonlinearity": "tanh"}),
    "RNN-relu": (nn.RNN, fusedrnn.reference.rnn, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("layers", [1, 3], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_equals_torch(kind, bias, layers, bidirectional):
    torch_class, function, extra = FUNCTIONS[kind]
    options = {"num_layers": layers, "bidirectional": bidirectional, **extra}
    layer = torch_class(4, 6, bias=bias, dtype=torch.float64, **options)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    _, hx = layer(x)
    is_lstm = torch_class is nn.LSTM
    states = tuple(torch.randn_like(s, requires_grad=True) for s in (hx if is_lstm else (hx,)))
    hx = states if is_lstm else states[0]
    params = list(layer.parameters())
    leaves = [x, *states, *params]

    def flat(result):
        y, s = result
        return [y, *(s if is_lstm else (s,))]

    expected = flat(layer(x, hx))
    got = flat(function(x, hx, params, has_biases=bias, **options))
    grads = [torch.randn_like(e) for e in expected]
    expected += torch.autograd.grad(expected, leaves, grads)
    got += torch.autograd.grad(got, leaves, grads)
    for e, g in zip(expected, got, strict=True):
        depth = 8 * torch.finfo(e.dtype).eps * e.abs().max() * 4 * 6 * 5
        assert (e - g).abs().max() <= depth


FEATURES = [{}, {"reverse": True}, {"lengths": True, "reverse": True}, {"resets": True},
            {"resets": True, "reverse": True, "lengths": True}]  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "-".join(f) or "plain")
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("proj", [0, 2], ids=["", "proj"])
def test_gradcheck(cell, features, proj):
    if proj and cell is not LSTM:
        pytest.skip("only the LSTM has a projection")
    cells = cell is LSTM
    case = Case(cell, 4, 3, 2, 3, P=proj, dtype=torch.float64, cell_states=cells, **features)
    inputs = make_inputs(case)
    tensors = [inputs.x, *inputs.weights, inputs.h0, inputs.c0]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]

    def run(x, *others):
        *weights, h0, c0 = others
        weights = type(inputs.weights)(*weights)
        call = inputs.call(case)._replace(x=x, weights=weights, h0=h0, c0=c0)
        return recurrence(Reference(), call)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-tanh"])
def test_lengths_are_what_packing_means(kind):
    torch_class, function, extra = FUNCTIONS[kind]
    layer = torch_class(4, 6, bidirectional=True, dtype=torch.float64)
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    lengths = [3, 7, 1]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, state = layer(packed)
    y, _ = nn.utils.rnn.pad_packed_sequence(y)
    got, got_state = function(
        x, None, list(layer.parameters()), bidirectional=True, lengths=lengths, **extra
    )
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(got_state, state)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-tanh"])
def test_resets_are_what_cutting_means(kind):
    torch_class, function, extra = FUNCTIONS[kind]
    layer = torch_class(4, 6, bidirectional=True, dtype=torch.float64)
    params = list(layer.parameters())
    x = torch.randn(7, 1, 4, dtype=torch.float64)
    resets = torch.zeros(7, 1, dtype=torch.bool)
    resets[[2, 5]] = True
    got, _ = function(x, None, params, bidirectional=True, resets=resets, **extra)
    pieces = [layer(piece)[0] for piece in (x[:2], x[2:5], x[5:])]
    torch.testing.assert_close(got, torch.cat(pieces))


def test_complex():
    layer = nn.LSTM(3, 4, dtype=torch.complex64)
    x = torch.randn(5, 2, 3, dtype=torch.complex64)
    y, _ = fusedrnn.functional.lstm(x, None, list(layer.parameters()))
    torch.testing.assert_close(y, layer(x)[0])
