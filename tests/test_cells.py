"""Cells of users: fusedrnn.Cell and fusedrnn.Recurrent."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import functional
from fusedrnn.backends import by_name, native, reference
from fusedrnn.cells import CELLS, LSTM, PLAIN, by_key
from fusedrnn.testing import Case, check_case


def minimal_step(gx, gh, state):
    f, g = (gx + gh).unbind(-2)
    return (torch.lerp(g.tanh(), state[0], f.sigmoid()),)


def leaky_step(gx, gh, state, params):
    """Two states, a param of each unit."""
    c = params[0].sigmoid() * state[1] + (gx + gh).squeeze(-2)
    return c.tanh(), c


MINIMAL = fusedrnn.Cell("minimal", gates="fg", states="h", step=minimal_step)
LEAKY = fusedrnn.Cell("leaky", gates="c", states="hc", step=leaky_step, params=("leak",))


@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_the_package_s_own_cells(cell):
    """As torch.nn's layers, by the same parameters."""
    kind = cell.name.split("_")[0].upper()
    options = {"nonlinearity": cell.name.split("_")[1]} if kind == "RNN" else {}
    theirs = getattr(nn, kind)(3, 5, num_layers=2, bidirectional=True, **options)
    ours = fusedrnn.Recurrent(cell, 3, 5, num_layers=2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 3)
    (y, state), (expected, expected_state) = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("cell", [MINIMAL, LEAKY], ids=lambda c: c.name)
def test_against_a_loop(cell, layers, bidirectional):
    """Written once more, with F.linear for each step."""
    module = fusedrnn.Recurrent(
        cell, 3, 5, layers, batch_first=True, bidirectional=bidirectional, dtype=torch.float64
    )
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    y, final = module(x)
    final = (final,) if len(cell.states) == 1 else final
    inputs, ends = x.unbind(1), []
    for layer in range(layers):
        directions = []
        for end in ("", "_reverse") if bidirectional else ("",):
            get = lambda name: getattr(module, f"{name}_l{layer}{end}")  # noqa: B023, E731
            state, out = (x.new_zeros(2, 5),) * len(cell.states), []
            for x_t in reversed(inputs) if end else inputs:
                gx = nn.functional.linear(x_t, get("weight_ih"), get("bias_ih"))
                gh = nn.functional.linear(state[0], get("weight_hh"), get("bias_hh"))
                gx, gh = (g.unflatten(-1, (len(cell.gates), 5)) for g in (gx, gh))
                params = ([get(name) for name in cell.params],) if cell.params else ()
                state = cell.step(gx, gh, state, *params)
                out.append(state[0])
            directions.append(out[::-1] if end else out)
            ends.append(state)
        inputs = [torch.cat(both, -1) for both in zip(*directions, strict=True)]
    torch.testing.assert_close(y, torch.stack(inputs, 1))
    for k, states in enumerate(zip(*ends, strict=True)):
        torch.testing.assert_close(final[k], torch.stack(states))


@pytest.mark.parametrize("cell", [MINIMAL, LEAKY], ids=lambda c: c.name)
def test_gradients_of_all_parameters(cell):
    module = fusedrnn.Recurrent(cell, 2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)
    options = {"lengths": [4, 2], "resets": torch.rand(4, 2) < 0.3}

    def run(*values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, named, (x,), options)[0]

    assert torch.autograd.gradcheck(run, values)
    assert len(names) == 4 + len(cell.params)


def test_cell_states_and_initial_states():
    module = fusedrnn.Recurrent(LEAKY, 3, 5)
    x, hx = torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    y, (h_n, c_n), c = module(x, hx, return_cell_states=True)
    assert torch.equal(y[-1:], h_n) and torch.equal(c[-1:], c_n)
    y_2, final = module(x[2:], module(x[:2], hx)[1])
    torch.testing.assert_close((y_2, *final), (y[2:], h_n, c_n))


def test_options_of_layers():
    """Dropout between layers, no biases, resets by rows, a state alone, autocast."""
    module = fusedrnn.Recurrent(LEAKY, 3, 5, 2, bias=False, batch_first=True, dropout=0.5)
    assert not any("bias" in name for name, _ in module.named_parameters())
    x, resets = torch.randn(2, 6, 3), torch.zeros(2, 6, dtype=torch.bool)
    resets[1, 4] = True
    torch.manual_seed(0)
    dropped = module(x)[0]
    y, _ = module.eval()(x, resets=resets)
    assert not torch.allclose(dropped, module(x)[0])
    torch.testing.assert_close(y[0], module(x)[0][0])
    torch.testing.assert_close(y[1, 4:], module(x[1:, 4:])[0][0])

    module, hx = fusedrnn.Recurrent(MINIMAL, 3, 5), torch.randn(1, 2, 5)
    y, h_n = module(torch.randn(4, 2, 3), hx)
    assert torch.equal(h_n, y[-1:])
    with torch.autocast("cpu", torch.bfloat16):
        module = fusedrnn.Recurrent(LEAKY, 3, 5)
        y, (h_n, c_n) = module(torch.randn(4, 2, 3))
        y.float().sum().backward()
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    assert module.leak_l0.grad.dtype == torch.float32 and module.leak_l0.grad.any()


def test_a_name_may_come_again():
    """As in a notebook: either keeps its equations, and the key by which ops find them."""
    again = fusedrnn.Cell("minimal", gates="fg", states="h", step=lambda gx, gh, state: (
        -minimal_step(gx, gh, state)[0],
    ))  # fmt: skip
    first = fusedrnn.Recurrent(MINIMAL, 3, 4)
    second = fusedrnn.Recurrent(again, 3, 4)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 2, 3)
    torch.testing.assert_close(first(x)[0], -second(x)[0])
    assert by_key(MINIMAL.key) is MINIMAL and by_key(again.key) is again


def test_a_cell_with_the_name_of_ours_is_not_ours():
    impostor = fusedrnn.Cell("lstm", gates="ifgo", states="hc", step=LSTM.step)
    module, x = fusedrnn.Recurrent(impostor, 3, 4), torch.randn(5, 2, 3)
    explanation = fusedrnn.explain(module, x)
    assert explanation.backend == "reference"
    assert "lstm" in explanation.reasons["cpu"] or "not built" in explanation.reasons["cpu"]
    module(x)[0].sum().backward()


def test_copies_and_compiles():
    module, x = fusedrnn.Recurrent(LEAKY, 3, 5), torch.randn(4, 2, 3)
    y, _ = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], y) and other.cell.key == LEAKY.key
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], y)


def test_a_pickled_cell_is_registered_where_it_is_loaded(monkeypatch):
    pickled = pickle.dumps(LEAKY)
    monkeypatch.setattr("fusedrnn.cells.cell._registered", {})
    assert by_key(pickle.loads(pickled).key) == LEAKY


def test_repr():
    assert repr(fusedrnn.Recurrent(MINIMAL, 3, 5)) == "Recurrent(minimal, 3, 5)"
    module = fusedrnn.Recurrent(LEAKY, 3, 5, 2, batch_first=True, backend="cpu")
    assert repr(module) == "Recurrent(leaky, 3, 5, num_layers=2, batch_first=True, backend='cpu')"


def step(*_):
    raise AssertionError("is not run")


BAD_CELLS = {
    "no gates": (dict(gates="", states="h"), "gates should be distinct and not empty, got ''"),
    "gates twice": (dict(gates="aa", states="h"), "gates should be distinct .* got 'aa'"),
    "h not first": (dict(gates="a", states="ch"), "states should begin with h, got 'ch'"),
    "no states": (dict(gates="a", states=""), "states should be distinct and not empty, got ''"),
    "params twice": (dict(gates="a", states="h", params=("p", "p")), "params should be distinct"),
    "params of torch.nn": (dict(gates="a", states="h", params=("bias_ih",)), "'bias_ih'"),
    "triton": (dict(gates="a", states="h", triton=3), "two functions or a module's name, got 3"),
    "one function": (dict(gates="a", states="h", triton=(step,)), "should be two functions"),
    "late": (dict(gates="a", states="h", late=1), r"late should be an integer in \[0, 1\), got 1"),
    "late float": (dict(gates="ab", states="h", late=1.0), "late should be an integer"),
    "saved": (
        dict(gates="a", states="h", saved=-1),
        "saved should be an integer, not negative, got -1",
    ),
}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(gates=["a"]), "gates should be a string, got"),
        (dict(name=5), "name should be a string, got 5"),
        (dict(step=None), "step should be a function, got None"),
        (dict(params="leak"), "params should be a tuple of names, got 'leak'"),
        (dict(params=("a.b",)), "params should be a tuple of names"),
    ],
    ids=str,
)
def test_cells_of_wrong_kinds(arguments, message):
    with pytest.raises(TypeError, match=message):
        fusedrnn.Cell(**(dict(name="bad", gates="a", states="h", step=step) | arguments))


@pytest.mark.parametrize("arguments, message", BAD_CELLS.values(), ids=list(BAD_CELLS))
def test_bad_cells(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedrnn.Cell("bad", step=step, **arguments)


BAD_STEPS = {
    "a gate too many": (lambda gx, gh, state: ((gx + gh).tanh(),), r"got \[\[2, 1, 4\]\]"),
    "no tuple": (lambda gx, gh, state: (gx + gh).squeeze(-2), "got Tensor"),
    "nothing": (lambda gx, gh, state: None, "got NoneType"),
    "a state too many": (lambda gx, gh, state: (state[0], state[0]), r"\[2, 4\], \[2, 4\]\]"),
}


@pytest.mark.parametrize("step, message", BAD_STEPS.values(), ids=list(BAD_STEPS))
def test_bad_steps(step, message):
    cell = fusedrnn.Cell("bad", gates="a", states="h", step=step)
    with pytest.raises(ValueError, match=r"a tuple of 1 tensors, of shape \[2, 4\].*" + message):
        fusedrnn.Recurrent(cell, 3, 4)


BAD_LAYERS = {
    "cell": (dict(cell="lstm"), TypeError, "cell should be a fusedrnn.Cell, got str"),
    "float": (dict(hidden_size=4.0), TypeError, "hidden_size should be of type int, got: float"),
    "bool dropout": (dict(dropout=True), ValueError, r"probability in \[0, 1\], got True"),
    "hidden_size": (dict(hidden_size=0), ValueError, "hidden_size must be greater than zero"),
    "num_layers": (dict(num_layers=0), ValueError, "num_layers must be greater than zero, got 0"),
    "dropout": (dict(dropout=2.0), ValueError, r"probability in \[0, 1\], got 2.0"),
    "backend": (dict(backend="gpu"), ValueError, "unknown backend 'gpu'"),
}


@pytest.mark.parametrize("change, error, message", BAD_LAYERS.values(), ids=list(BAD_LAYERS))
def test_bad_layers(change, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.Recurrent(**(dict(cell=LEAKY, input_size=3, hidden_size=4) | change))


BAD_INPUTS = {
    "2-D": (torch.zeros(5, 3), {}, ValueError, "x should be 3-D, got 2-D"),
    "size": (torch.zeros(5, 2, 7), {}, RuntimeError, r"input_size\. Expected 3, got 7"),
    "no tensor": (None, {}, TypeError, "input should be a tensor, got NoneType"),
    "no state": (torch.zeros(5, 2, 3), {"hx": 5}, TypeError, "a tuple of 2 tensors, got int"),
    "one state": (
        torch.zeros(5, 2, 3),
        {"hx": torch.zeros(1, 2, 4)},
        TypeError,
        "hx should be a tuple of 2 tensors, got 1 tensors",
    ),
    "state": (
        torch.zeros(5, 2, 3),
        {"hx": (torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))},
        ValueError,
        r"c_0 should have shape \[1, 2, 4\], got \[1, 2, 5\]",
    ),
    "dtype": (torch.zeros(5, 2, 3).double(), {}, RuntimeError, "not the same dtype"),
    "backend": (torch.zeros(5, 2, 3), {}, RuntimeError, "no kernel for the cell leaky"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(name):
    x, others, error, message = BAD_INPUTS[name]
    wish = "cpu" if name == "backend" else None
    if wish and not native.isas():
        pytest.skip("no native library")
    with pytest.raises(error, match=message):
        fusedrnn.Recurrent(LEAKY, 3, 4, backend=wish)(x, **others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", [MINIMAL, LEAKY], ids=lambda c: c.name)
def test_the_reference_in_every_dtype(cell, dtype):
    check_case(Case(cell, 5, 3, 4, 7, dtype=dtype, lengths=True, resets=True), by_name("reference"))


# ---- The cell alone.


def test_cell_update_is_a_step_of_torch_nn():
    cell, x = nn.LSTMCell(3, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    h, c = torch.randn(2, 2, 5, dtype=torch.float64)
    gates = nn.functional.linear(x, cell.weight_ih, cell.bias_ih)
    gates = gates + nn.functional.linear(h, cell.weight_hh, cell.bias_hh)
    new = fusedrnn.functional.lstm_cell_update(gates, c)
    torch.testing.assert_close(new, cell(x, (h, c)))
    inputs = gates.detach().requires_grad_(), c.requires_grad_()
    assert torch.autograd.gradcheck(fusedrnn.functional.lstm_cell_update, inputs)


def test_cell_update_of_a_convolution():
    gates, c = torch.randn(2, 4 * 3, 5, 6), torch.randn(2, 3, 5, 6)
    h, c_new = fusedrnn.functional.lstm_cell_update(gates, c)
    at = (slice(None), slice(None), 2, 3)
    expected = fusedrnn.functional.lstm_cell_update(gates[at], c[at])
    torch.testing.assert_close((h[at], c_new[at]), expected)


LSTMS = [cell for cell in CELLS.values() if cell.name.startswith("lstm")]


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request):
    if request.param not in native.isas():
        pytest.skip(f"this machine cannot run {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    yield
    native.set_isa(before)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 9001), (0, 4)], ids=str)
@pytest.mark.parametrize("cell", LSTMS, ids=lambda c: c.name)
def test_cell_update_on_the_cpu(isa, cell, shape, dtype):
    """Within the rounding of what is stored, and that of the few operations between."""
    rows, units = shape
    gates, c = torch.randn(rows, len(cell.gates), units), torch.randn(rows, units)
    params = torch.randn(len(cell.params), units) if cell.params else None
    upstream = torch.randn(2, rows, units).to(dtype).double()
    inputs = [t.to(dtype) for t in (gates, c, params) if t is not None]
    found = []
    for name, precision in (("reference", torch.float64), ("cpu", dtype)):
        leaves = [t.to(precision).requires_grad_() for t in inputs]
        h, c_new = functional.update(cell, *leaves[:2], *(leaves[2:] or [None]), (name,))
        grads = torch.autograd.grad((h, c_new), leaves, tuple(upstream.to(precision)))
        found.append([h, c_new, *grads])
    for exact, ours in zip(*found, strict=True):
        assert ours.dtype == dtype
        size = exact.abs().max().item() if exact.numel() else 0
        sums = max(1, rows) * 16 * torch.finfo(reference.compute_dtype(dtype)).eps
        rtol = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=sums * size)


@pytest.mark.parametrize("cell", LSTMS, ids=lambda c: c.name)
def test_ops_of_the_cell_update(cell):
    if not native.isas():
        pytest.skip("no native library")
    index = list(native.native_cells()).index(cell.name)
    gates, c = torch.randn(2, len(cell.gates), 3), torch.randn(2, 3)
    params = torch.randn(len(cell.params), 3) if cell.params else None
    tests = "test_schema", "test_faketensor"
    ops = torch.ops.fusedrnn
    torch.library.opcheck(ops.cell_update.default, (gates, c, params, index), test_utils=tests)
    args = gates, c, params, None, c, index
    torch.library.opcheck(ops.cell_update_backward.default, args, test_utils=tests)
    for wrong in ((gates[:1], c, params), (gates, c[0], params), (gates.double(), c, params)):
        with pytest.raises(RuntimeError, match=r"has shape|dimensions|expected float64"):
            ops.cell_update(*wrong, index)
    with pytest.raises(RuntimeError, match="gru has no step of its own"):
        ops.cell_update(torch.randn(2, 3, 3), c, None, list(native.native_cells()).index("gru"))


def test_cell_update_in_loops_of_users():
    """Under autocast, where c stays in float32; compiled; channels last."""
    update = fusedrnn.functional.lstm_cell_update
    w, x = torch.randn(20, 5), torch.randn(4, 2, 20)

    def loop(x):
        h, c = torch.zeros(2, 5), torch.zeros(2, 5)
        for gx in x:
            h, c = update(gx + h.to(w.dtype) @ w.t(), c)
        return h, c

    with torch.autocast("cpu", torch.bfloat16):
        h, c = update(nn.functional.linear(torch.zeros(2, 5), w), torch.zeros(2, 5))
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loop(x))
    gates, c = torch.randn(2, 12, 5, 6), torch.randn(2, 3, 5, 6)
    last = (t.to(memory_format=torch.channels_last) for t in (gates, c))
    torch.testing.assert_close(update(*last), update(gates, c))


BAD_UPDATES = {
    "gates": ((2, 15), (2, 5), ValueError, r"\[B,4\*H,\*\] for c \[B,H,\*\], got \[2, 15\] and"),
    "rows": ((3, 20), (2, 5), ValueError, r"got \[3, 20\] and \[2, 5\]"),
    "positions": ((2, 20, 3), (2, 5, 4), ValueError, r"got \[2, 20, 3\] and \[2, 5, 4\]"),
    "1-D": ((20,), (5,), ValueError, r"got \[20\] and \[5\]"),
    "dtype": ((2, 20), (2, 5), RuntimeError, "c should be torch.float64 on cpu as gates are"),
    "integers": ((2, 20), (2, 5), RuntimeError, "gates should be floating-point, got torch.int64"),
    "backend": ((2, 20), (2, 5), RuntimeError, "backend 'cuda' has no cell update"),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_cell_updates(name):
    of_gates, of_c, error, message = BAD_UPDATES[name]
    gates, c = torch.zeros(of_gates), torch.zeros(of_c)
    gates = gates.double() if name == "dtype" else gates
    gates = gates.long() if name == "integers" else gates
    wish = "cuda" if name == "backend" else None
    with pytest.raises(error, match=message):
        fusedrnn.functional.lstm_cell_update(gates, c, backend=wish)
