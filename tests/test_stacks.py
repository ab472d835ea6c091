"""Inference on the CPU: all layers of a direction by one op."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import fusedrnn
from fusedrnn.backends import by_name, native

pytestmark = pytest.mark.skipif(not native.isas(), reason="no native library")

LAYERS = {
    "lstm": fusedrnn.LSTM,
    "lstm-no-bias": partial(fusedrnn.LSTM, bias=False),
    "lstm-projection": partial(fusedrnn.LSTM, proj_size=3),
    "lstm-peephole": partial(fusedrnn.LSTM, peephole=True),
    "lstm-coupled": partial(fusedrnn.LSTM, coupled_gates=True),
    "gru": fusedrnn.GRU,
    "gru-reset-before": partial(fusedrnn.GRU, reset_after=False),
    "rnn": fusedrnn.RNN,
    "relu": partial(fusedrnn.RNN, nonlinearity="relu"),
    "learned": partial(fusedrnn.LSTM, initial_state="learned"),
}
OTHERS = {
    "both directions": (partial(fusedrnn.GRU, bidirectional=True), {}),
    "layer norm": (partial(fusedrnn.LSTM, layer_norm=True), {}),
    "zoneout": (partial(fusedrnn.LSTM, zoneout=0.5), {}),
    "float16": (partial(fusedrnn.GRU, dtype=torch.float16), {}),
    "cell states": (fusedrnn.LSTM, {"return_cell_states": True}),
    "states at resets": (
        partial(fusedrnn.LSTM, initial_state="random"),
        {"resets": torch.ones(4, 3, dtype=torch.bool)},
    ),
}


def flat(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in flat(part)]


@pytest.fixture
def alone(monkeypatch):
    """No layer runs by itself."""

    def forward(self, call, training):
        raise AssertionError("a layer ran by itself")

    def forbid():
        monkeypatch.setattr(native.Native, "forward", forward)

    return forbid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("make", LAYERS.values(), ids=list(LAYERS))
def test_what_training_gives(alone, make, layers, masked, dtype):
    """To the bit."""
    layer = make(5, 7, num_layers=layers, batch_first=True, dtype=dtype)
    x, options = torch.randn(3, 4, 5, dtype=dtype), {}
    if masked:
        options = {"lengths": [4, 0, 2]}
        if layer.initial_state == "zeros":
            options["resets"] = torch.rand(3, 4) < 0.5
    expected = flat(layer(x, **options))
    alone()
    with torch.inference_mode():
        found = flat(layer(x, **options))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert [t.is_contiguous() for t in found] == [t.is_contiguous() for t in expected]


@pytest.mark.parametrize("make", [fusedrnn.LSTMCell, fusedrnn.GRUCell, fusedrnn.RNNCell])
def test_cells(alone, make):
    cell, x = make(5, 7), torch.randn(3, 5)
    expected = flat(cell(x))
    alone()
    with torch.no_grad():
        found = flat(cell(x))
    assert all(map(torch.equal, found, expected))


def test_frozen_layers(alone):
    """Without gradients to find, whatever the mode."""
    layer = fusedrnn.GRU(5, 7).requires_grad_(False)
    alone()
    layer(torch.randn(4, 3, 5))
    with pytest.raises(AssertionError, match="a layer ran by itself"):
        layer(torch.randn(4, 3, 5, requires_grad=True))


@pytest.mark.parametrize("make, options", OTHERS.values(), ids=list(OTHERS))
def test_the_rest_runs_layer_by_layer(alone, make, options):
    layer = make(5, 7).eval()
    x = torch.randn(4, 3, 5, dtype=layer.weight_ih_l0.dtype)
    alone()
    with torch.no_grad(), pytest.raises(AssertionError, match="a layer ran by itself"):
        layer(x, **options)


def test_dropout_runs_layer_by_layer(alone):
    layer, x = fusedrnn.GRU(5, 7, num_layers=2, dropout=0.5), torch.randn(4, 3, 5)
    alone()
    with torch.no_grad():
        layer.eval()(x)
        with pytest.raises(AssertionError, match="a layer ran by itself"):
            layer.train()(x)


def arguments(cell="lstm", layers=2, hidden=4):
    """Of the op."""
    r, facts = torch.randn, native.native_cells()[cell]
    gates = facts.gates * hidden
    weights = [
        t for size in (5, *(hidden,) * (layers - 1))
        for t in (r(gates, size), r(gates, hidden), r(gates), r(gates))
    ]  # fmt: skip
    c0 = r(layers, 2, hidden) if facts.states > 1 else None
    index = list(native.native_cells()).index(cell)
    return [r(3, 2, 5), weights, r(layers, 2, hidden), c0, None, None, index, True, False]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell):
    torch.library.opcheck(
        torch.ops.fusedrnn.stack_forward.default,
        arguments(cell),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


WRONG = {
    "no weights": (1, lambda w: [], "got 0 weights, expected 4 for each layer"),
    "a weight too few": (1, lambda w: w[:-1], "got 7 weights, expected 4"),
    "w_ih": (1, lambda w: [w[0][:, 1:].contiguous(), *w[1:]], r"w_ih has shape \[16, 4\]"),
    "w_hh": (1, lambda w: [*w[:5], w[5][4:], *w[6:]], "output size is 4 without w_hr"),
    "another H": (1, lambda w: [*w[:4], *arguments(hidden=3)[1][4:]], r"w_ih has shape|w_hh has"),
    "b_hh": (1, lambda w: [*w[:7], w[7][1:]], r"b_hh has shape \[15\], expected \[16\]"),
    "h0": (2, lambda h: h[:1], r"h0 has shape \[1, 2, 4\], expected \[2, 2, 4\]"),
    "c0": (3, lambda c: None, "c0 is missing, but lstm has 2"),
    "dtype of c0": (3, lambda c: c.double(), "c0 is float64, expected float32"),
    "x": (0, lambda x: x[0], "x has 2 dimensions"),
    "lengths": (4, lambda _: torch.ones(3, dtype=torch.int64), r"lengths has shape \[3\]"),
    "cell": (6, lambda _: 99, "cell is 99"),
}


@pytest.mark.parametrize("place, change, message", WRONG.values(), ids=list(WRONG))
def test_bad_arguments(place, change, message):
    given = arguments()
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn.stack_forward(*given)


def test_a_stack_is_of_the_engine_alone():
    for name in ("cudnn", "cuda", "triton", "reference"):
        request = fusedrnn.backends.Request(
            fusedrnn.cells.LSTM, torch.float32, torch.device("cpu"), 8, 0
        )
        assert not by_name(name).runs_stack(request)
