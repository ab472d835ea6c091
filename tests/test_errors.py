"""Bad input: torch.nn's error where torch.nn has one, one sentence of ours elsewhere."""

from __future__ import annotations

import pytest
import torch
from against_torch import CELLS, LAYERS, flatten, make_hx, twins
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import functional

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 6, 3, 5, 4  # noqa: E741
randn = torch.randn


def hx(layer, *shape, dtype=torch.float32, device=None):
    """A state of one shape, in the LSTM twice."""
    state = torch.zeros(shape, dtype=dtype, device=device)
    return (state, state.clone()) if layer.mode == "LSTM" else state


def packed(batch=B, dtype=torch.float32, features=I):
    x = randn(T, batch, features, dtype=dtype)
    return pack_padded_sequence(x, [T - b for b in range(batch)])


def unsorted(batch=B):
    return pack_padded_sequence(randn(T, batch, I), [*range(1, batch + 1)], enforce_sorted=False)


# What torch.nn rejects: the arguments of a call. L = 2, D = 2.
LAYER_CALLS = {
    "1-D": lambda m: (randn(I),),
    "4-D": lambda m: (randn(1, T, B, I),),
    "0-D": lambda m: (randn(()),),
    "features": lambda m: (randn(T, B, I + 1),),
    "unbatched features": lambda m: (randn(T, I + 1),),
    "T0": lambda m: (randn(0, B, I),),
    "T0 hx": lambda m: (randn(0, B, I), make_hx(m, B)),
    "float64": lambda m: (randn(T, B, I).double(),),
    "float16": lambda m: (randn(T, B, I).half(),),
    "int64": lambda m: (torch.ones(T, B, I, dtype=torch.int64),),
    "float64 hx": lambda m: (randn(T, B, I).double(), hx(m, 4, B, H)),
    "hx batch": lambda m: (randn(T, B, I), make_hx(m, B + 1)),
    "hx layers": lambda m: (randn(T, B, I), hx(m, 3, B, H)),
    "hx hidden": lambda m: (randn(T, B, I), hx(m, 4, B, H + 1)),
    "hx 2-D": lambda m: (randn(T, B, I), make_hx(m, None)),
    "hx 4-D": lambda m: (randn(T, B, I), hx(m, 1, 4, B, H)),
    "unbatched hx 3-D": lambda m: (randn(T, I), make_hx(m, 1)),
    "unbatched hx 1-D": lambda m: (randn(T, I), hx(m, H)),
    "unbatched hx layers": lambda m: (randn(T, I), hx(m, 3, H)),
    "packed features": lambda m: (packed(features=I + 1),),
    "packed hx layers": lambda m: (packed(), hx(m, 3, B, H)),
    "packed hx hidden": lambda m: (packed(), hx(m, 4, B, H + 1)),
    "packed hx batch": lambda m: (packed(), make_hx(m, B - 1)),
    "input None": lambda m: (None,),
    "input list": lambda m: ([[1.0]],),
    "input tuple": lambda m: ((randn(T, I), randn(T, I)),),
}
LSTM_CALLS = {
    "hx tensor": lambda m: (randn(T, B, I), randn(4, B, H)),
    "hx stacked": lambda m: (randn(T, B, I), randn(2, 4, B, H)),
    "hx unbatched tensor": lambda m: (randn(T, I), randn(4, H)),
    "hx one": lambda m: (randn(T, B, I), (randn(4, B, H),)),
    "hx empty": lambda m: (randn(T, B, I), ()),
    "hx three": lambda m: (randn(T, B, I), (randn(4, B, H),) * 3),
    "hx h None": lambda m: (randn(T, B, I), (None, randn(4, B, H))),
    "hx c None": lambda m: (randn(T, B, I), (randn(4, B, H), None)),
    "hx c hidden": lambda m: (randn(T, B, I), (randn(4, B, H), randn(4, B, H + 1))),
    "hx c batch": lambda m: (randn(T, B, I), (randn(4, B, H), randn(4, 1, H))),
    "hx c 2-D": lambda m: (randn(T, B, I), (randn(4, B, H), randn(4, H))),
    "packed hx tensor": lambda m: (packed(), randn(4, B, H)),
    "packed hx three": lambda m: (packed(), (randn(4, B, H),) * 3),
    "packed hx c hidden": lambda m: (packed(), (randn(4, B, H), randn(4, B, H + 1))),
}
OTHER_CALLS = {
    "hx tuple": lambda m: (randn(T, B, I), (randn(4, B, H), randn(4, B, H))),
    "hx one-tuple": lambda m: (randn(T, B, I), (randn(4, B, H),)),
}
# Types are torch.nn's, messages too unless Python or a kernel wrote them.
FOREIGN = ("object has no attribute", "index out of range", "argument", "must have", "mat1")


def both_raise(ours, theirs, *args, words=True):
    with pytest.raises(Exception) as expected:
        theirs(*args)
    with pytest.raises(type(expected.value)) as got:
        ours(*args)
    assert type(got.value) is type(expected.value)
    if words and not any(text in str(expected.value) for text in FOREIGN):
        assert str(got.value) == str(expected.value)


CALLS = [(kind, name) for kind in LAYERS if kind != "LSTM-proj" for name in LAYER_CALLS]
CALLS += [("LSTM", name) for name in LSTM_CALLS] + [("GRU", name) for name in OTHER_CALLS]
CALLS += [("RNN-tanh", name) for name in OTHER_CALLS]


@pytest.mark.parametrize(("kind", "name"), CALLS)
def test_layer_calls(kind, name):
    ours, theirs = twins(kind, I, H, 2, bidirectional=True)
    x = randn(T, B, I)
    expected = flatten(ours(x))
    args = (LAYER_CALLS | LSTM_CALLS | OTHER_CALLS)[name](theirs)
    ours_alone = kind == "LSTM" and "packed hx" in name  # torch.nn's LSTM does not check it
    both_raise(ours, theirs, *args, words=not ours_alone)
    torch.testing.assert_close(flatten(ours(x)), expected, rtol=0, atol=0)  # still usable
    flatten(ours(x))["out.0"].sum().backward()


@pytest.mark.parametrize("batch_first", [False, True])
def test_projected_states(batch_first):
    ours, theirs = twins("LSTM-proj", I, H, batch_first=batch_first)
    x = randn(B, T, I) if batch_first else randn(T, B, I)
    for shapes in ([(1, B, H), (1, B, H)], [(1, B, 3), (1, B, 3)], [(1, T, 3), (1, T, H)]):
        both_raise(ours, theirs, x, tuple(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_checks_that_torch_omits(kind):
    """torch.nn's LSTM takes a state of too large a batch, and the wrong dtype up to a kernel."""
    ours, _ = twins(kind, I, H)
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 3, .\), got \[1, 4, .\]"):
        ours(packed(), make_hx(ours, B + 1))
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 3, .\), got \[1, 4, .\]"):
        ours(unsorted(), make_hx(ours, B + 1))
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match"):
        ours(packed(dtype=torch.float64))


CELL_CALLS = {
    "3-D": lambda: (randn(1, B, I), randn(B, H)),
    "0-D": lambda: (randn(()),),
    "features": lambda: (randn(B, I + 1),),
    "features hx": lambda: (randn(B, I + 1), randn(B, H)),
    "unbatched features": lambda: (randn(I + 1), randn(H)),
    "batch": lambda: (randn(B, I), randn(B + 1, H)),
    "hidden": lambda: (randn(B, I), randn(B, H + 1)),
    "unbatched hidden": lambda: (randn(I), randn(H + 1)),
    "hx 3-D": lambda: (randn(B, I), randn(1, B, H)),
    "hx 0-D": lambda: (randn(B, I), randn(())),
    "hx 1-D": lambda: (randn(B, I), randn(H)),
    "unbatched hx 2-D": lambda: (randn(I), randn(1, H)),
    "dtype": lambda: (randn(B, I).double(), randn(B, H)),
    "hx dtype": lambda: (randn(B, I), randn(B, H).double()),
    "None": lambda: (None,),
    "tuple": lambda: ((randn(B, I),),),
}


@pytest.mark.parametrize("name", CELL_CALLS)
@pytest.mark.parametrize("kind", CELLS)
def test_cell_calls(kind, name):
    ours, theirs = twins(kind, I, H)
    args = CELL_CALLS[name]()
    if kind == "LSTMCell" and len(args) == 2:
        args = args[0], (args[1], args[1].clone())
    both_raise(ours, theirs, *args)
    assert flatten(ours(randn(B, I)))


LSTM_CELL_CALLS = {
    "tensor": lambda: (randn(B, I), randn(B, H)),
    "stacked": lambda: (randn(B, I), randn(2, B, H)),
    "one": lambda: (randn(B, I), (randn(B, H),)),
    "empty": lambda: (randn(B, I), ()),
    "three": lambda: (randn(B, I), (randn(B, H),) * 3),
    "c None": lambda: (randn(B, I), (randn(B, H), None)),
    "c hidden": lambda: (randn(B, I), (randn(B, H), randn(B, H + 1))),
    "c batch": lambda: (randn(B, I), (randn(B, H), randn(B + 1, H))),
}


@pytest.mark.parametrize("name", LSTM_CELL_CALLS)
def test_lstm_cell_calls(name):
    ours, theirs = twins("LSTMCell", I, H)
    both_raise(ours, theirs, *LSTM_CELL_CALLS[name]())


@pytest.mark.parametrize("kind", ["RNNCell-tanh"])
def test_unknown_nonlinearity_of_a_cell(kind):
    ours, theirs = twins(kind, I, H)
    ours.nonlinearity = theirs.nonlinearity = "foo"
    both_raise(ours, theirs, randn(B, I))


@pytest.mark.parametrize("kind", LAYERS)
def test_devices(kind):
    ours, _ = twins(kind, I, H)
    x = randn(T, B, I)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same devi"):
        ours(x.to("meta"))
    meta = torch.utils._pytree.tree_map(lambda t: t.to("meta"), make_hx(ours, B))
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device"):
        ours(x, meta)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same devi"):
        ours.to("meta")(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_state_of_another_dtype(kind):
    ours, _ = twins(kind, I, H)
    state = torch.utils._pytree.tree_map(torch.Tensor.double, make_hx(ours, B))
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        ours(randn(T, B, I), state)


def test_backends():
    layer = fusedrnn.LSTM(I, H, dtype=torch.complex64, backend="cpu")
    with pytest.raises(RuntimeError, match=r"^backend 'cpu' (is not built|computes in float16)"):
        layer(randn(T, B, I, dtype=torch.complex64))
    with pytest.raises(ValueError, match="unknown backend 'x', expected one of"):
        with fusedrnn.backend(["reference", "x"]):
            pass
    layer.backend = "y"
    with pytest.raises(ValueError, match="unknown backend 'y'"):
        layer(randn(T, B, I, dtype=torch.complex64))


# Changes to a valid call of functional.lstm, gru or rnn, and the sentence they get.
FUNCTION_CALLS = {
    "params": (lambda p: {"params": p[:-1]}, "params should hold 4 tensors for each of 2 layers"),
    "biases": (lambda p: {"has_biases": False}, "params should hold 2 tensors for each of 2"),
    "layers": (lambda p: {"num_layers": 3}, "params should hold 4 tensors for each of 3 layers"),
    "layers 0": (lambda p: {"num_layers": 0, "params": []}, "num_layers"),
    "2-D": (lambda p: {"x": randn(T, I)}, "x should be 3-D, got 2-D"),
    "features": (lambda p: {"x": randn(T, B, I + 1)}, r"w_ih of layer 0 should have shape \[.*, 6"),
    "w_hh": (lambda p: {"params": [p[0], p[1][:, 1:], *p[2:]]}, "of layer 0 should have shape"),
    "rows": (lambda p: {"params": [p[0][1:], *p[1:]]}, "w_ih of layer 0 should have shape"),
    "1-D": (lambda p: {"params": [p[2], *p[1:]]}, "w_ih of layer 0 should have shape"),
    "w_hh 1-D": (lambda p: {"params": [p[0], p[2], *p[2:]]}, "w_hh of layer 0 should have shape"),
    "layer 1": (lambda p: {"params": [*p[:8], p[0], *p[9:]]}, "w_ih of layer 1 should have shape"),
    "bias": (lambda p: {"params": [*p[:3], p[3][1:], *p[4:]]}, "b_hh of layer 0 should have shape"),
    "hx batch": (lambda p: {"hx": (4, B + 1, H)}, r"h_0 should have shape \[4, 3, 4\], got \[4, 4"),
    "hx layers": (lambda p: {"hx": (2, B, H)}, r"h_0 should have shape \[4, 3, 4\], got \[2, 3"),
    "hx 2-D": (lambda p: {"hx": (4, H)}, r"h_0 should have shape \[4, 3, 4\], got \[4, 4\]"),
    "dropout": (lambda p: {"dropout": 1.5}, r"dropout should be a probability in \[0, 1\]"),
    "backend": (lambda p: {"backend": "x"}, "unknown backend 'x', expected one of"),
    "dtype": (lambda p: {"x": randn(T, B, I).double()}, "not the same dtype.*float64 and param"),
    "one dtype": (lambda p: {"params": [*p[:-1], p[-1].double()]}, "not the same dtype"),
    "device": (lambda p: {"x": randn(T, B, I, device="meta")}, "not at the same device.*at meta"),
    "one device": (lambda p: {"params": [*p[:-1], p[-1].to("meta")]}, "not at the same device"),
    "T0": (lambda p: {"x": randn(0, B, I)}, "Expected sequence length to be larger than 0 in RNN"),
}


@pytest.mark.parametrize("name", FUNCTION_CALLS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_function_calls(kind, name):
    change, sentence = FUNCTION_CALLS[name]
    layer = getattr(fusedrnn, kind.upper())(I, H, 2, bidirectional=True)
    call = {"x": randn(T, B, I), "hx": None, "params": list(layer.parameters()), "num_layers": 2}
    call |= {"bidirectional": True}
    before = [p.clone() for p in call["params"]]
    call |= change(call["params"])
    if isinstance(call["hx"], tuple):
        call["hx"] = hx(layer, *call["hx"])
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        getattr(functional, kind)(**call)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_function_calls_of_one_kind():
    x, params = randn(T, B, I), list(fusedrnn.LSTM(I, H).parameters())
    state = randn(1, B, H)
    for bad in (state, (state,), (state,) * 3):
        with pytest.raises(TypeError, match="hx should be a tuple of two tensors"):
            functional.lstm(x, bad, params)
    with pytest.raises(ValueError, match=r"c_0 should have shape \[1, 3, 4\], got \[1, 3, 5\]"):
        functional.lstm(x, (state, randn(1, B, H + 1)), params)
    with pytest.raises(ValueError, match="params should hold 5 tensors"):
        functional.lstm(x, None, params, proj_size=2)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'x'"):
        functional.rnn(x, None, params, nonlinearity="x")
    for function in (functional.gru, functional.rnn):
        with pytest.raises(TypeError, match="hx should be a tensor, got tuple"):
            function(x, (state,), list(fusedrnn.GRU(I, H).parameters()))
