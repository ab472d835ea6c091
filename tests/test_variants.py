"""Variants as modules: their equations, parameters, and all that plain layers can do."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

VARIANTS = {
    "peephole": {"peephole": True},
    "coupled": {"coupled_gates": True},
    "coupled-peephole": {"peephole": True, "coupled_gates": True},
    "layer-norm": {"layer_norm": True},
    "all": {"layer_norm": True, "peephole": True, "coupled_gates": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.fixture(autouse=True)
def _needs_the_engine(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cpu":
        if not fusedrnn.backends.native.isas():
            pytest.skip("no native library")


def gates_of(variant):
    return "fgo" if "coupled_gates" in variant else "ifgo"


def normed(weights, what, suffix, x):
    """``x`` with layer norm, if the layer has it there."""
    gain = weights.get(f"{what}{suffix}")
    bias = weights.get(f"{what}_bias{suffix}")
    return x if gain is None else F.layer_norm(x, x.shape, gain, bias)


def shaken(module):
    """With no gain at 1, nor any bias at 0."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def by_hand(module, x, suffix, state):
    """One layer and direction of one row, ``x [T,I]``, each gate by its own block of weights."""
    weights = dict(module.named_parameters())
    w_ih, w_hh = weights[f"weight_ih{suffix}"], weights[f"weight_hh{suffix}"]
    bias = weights[f"bias_ih{suffix}"] + weights[f"bias_hh{suffix}"]
    peephole = weights.get(f"weight_peephole{suffix}")
    gates, hidden = gates_of({"coupled_gates": True} if module.coupled_gates else {}), len(state[1])

    def rows(gate):
        return slice(gates.index(gate) * hidden, (gates.index(gate) + 1) * hidden)

    def seen(gate, c):
        """What a gate gets through its peephole."""
        if peephole is None:
            return 0
        index = gates.replace("g", "").index(gate)
        return peephole[index * hidden : (index + 1) * hidden] * c

    h, c = state
    out, cells = [], []
    for x_t in x:
        of_x = normed(weights, "norm_ih", suffix, w_ih @ x_t)
        of_h = normed(weights, "norm_hh", suffix, w_hh @ h)
        pre = {k: of_x[rows(k)] + of_h[rows(k)] + bias[rows(k)] for k in gates}
        f = 1 / (1 + torch.exp(-(pre["f"] + seen("f", c))))
        i = 1 - f if "i" not in gates else 1 / (1 + torch.exp(-(pre["i"] + seen("i", c))))
        c = f * c + i * torch.tanh(pre["g"])
        h = torch.tanh(normed(weights, "norm_c", suffix, c)) / (
            1 + torch.exp(-(pre["o"] + seen("o", c)))
        )
        if module.proj_size:
            h = weights[f"weight_hr{suffix}"] @ h
        out.append(h)
        cells.append(c)
    return torch.stack(out), torch.stack(cells)


@backends
@variants
@pytest.mark.parametrize("proj", [0, 2], ids=["", "proj"])
def test_equations(variant, proj, backend):
    """Outputs, cell states and every gradient, of one row at a time."""
    module = fusedrnn.LSTM(3, 5, proj_size=proj, dtype=torch.float64, backend=backend, **variant)
    shaken(module)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(1, 2, proj or 5, dtype=x.dtype), torch.randn(1, 2, 5, dtype=x.dtype)
    y, (h_n, c_n), c = module(x, hx, return_cell_states=True)
    rows = [by_hand(module, x[:, b], "_l0", (hx[0][0, b], hx[1][0, b])) for b in range(2)]
    expected_y, expected_c = (torch.stack(t, 1) for t in zip(*rows, strict=True))
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(c, expected_c)
    torch.testing.assert_close(h_n[0], expected_y[-1])
    torch.testing.assert_close(c_n[0], expected_c[-1])
    weigh = torch.randn_like(y), torch.randn_like(c)
    leaves = [x, *module.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y, c), leaves, weigh),
        torch.autograd.grad((expected_y, expected_c), leaves, weigh),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@backends
def test_peephole_in_numbers(backend):
    """Two steps of one unit, worked out with the calculator."""
    module = fusedrnn.LSTM(1, 1, peephole=True, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.tensor([[0.5], [-0.3], [0.8], [0.1]]))
        module.weight_hh_l0.copy_(torch.tensor([[0.2], [0.4], [-0.6], [0.7]]))
        module.bias_ih_l0.copy_(torch.tensor([0.1, 1.0, 0.0, -0.2]))
        module.bias_hh_l0.zero_()
        module.weight_peephole_l0.copy_(torch.tensor([0.9, -0.5, 0.3]))  # i f o
    y, (_, c_n) = module(torch.tensor([[[1.0]], [[-2.0]]], dtype=torch.float64))

    def s(v):
        return 1 / (1 + math.exp(-v))

    c1 = s(0.6) * math.tanh(0.8)
    h1 = s(-0.1 + 0.3 * c1) * math.tanh(c1)
    i2 = s(-0.9 + 0.2 * h1 + 0.9 * c1)
    f2 = s(1.6 + 0.4 * h1 - 0.5 * c1)
    c2 = f2 * c1 + i2 * math.tanh(-1.6 - 0.6 * h1)
    h2 = s(-0.4 + 0.7 * h1 + 0.3 * c2) * math.tanh(c2)
    expected = torch.tensor([h1, h2], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), expected, atol=1e-7, rtol=0)  # of weights in float32
    assert abs(c_n.item() - c2) < 1e-7


@variants
def test_parameters(variant):
    """After torch.nn's own, which a seed gives the same values where they have the same shapes."""
    torch.manual_seed(0)
    module = fusedrnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2, **variant)
    torch.manual_seed(0)
    plain = nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    gates, peepholes = len(gates_of(variant)), len(gates_of(variant)) - 1
    own = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"] if "peephole" in variant else []
    own = [f"weight_peephole{suffix}" for suffix in own]
    if "layer_norm" in variant:
        ends = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
        names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")
        own += [name + end for end in ends for name in names]
    assert list(module.state_dict()) == list(plain.state_dict()) + own
    assert [len(w) for w in module.all_weights] == [5] * 4
    for name, p in module.named_parameters():
        if name.startswith("norm"):
            assert p.shape == (5 if name.startswith("norm_c") else 5 * gates,)
            assert (p == (0 if name.startswith("norm_c_bias") else 1)).all()
            continue
        assert p.abs().max() <= 5**-0.5 and p.any()
        if name in own:
            assert p.shape == (peepholes * 5,)
        elif name.startswith("weight_hr"):
            assert p.shape == (2, 5)
        else:
            assert len(p) == gates * 5
            assert gates == 3 or torch.equal(p, plain.state_dict()[name])
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    assert module.mode == "LSTM"


FEATURES = {
    "lengths": {"lengths": [4, 0, 6]},
    "resets": {"resets": torch.rand(6, 3, generator=torch.Generator().manual_seed(3)) < 0.4},
    "cell-states": {"return_cell_states": True},
}


@variants
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("proj", [0, 2], ids=["", "proj"])
def test_backends_agree(variant, feature, proj):
    """Two layers, two directions; the reference is checked by the other tests."""
    if not fusedrnn.backends.native.isas():
        pytest.skip("no native library")
    module = shaken(fusedrnn.LSTM(3, 5, 2, bidirectional=True, proj_size=proj, **variant)).double()
    x = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("reference", "cpu"):
        with fusedrnn.backend(backend):
            y, (h_n, c_n), *c = module(x, **feature)
        outputs = y, h_n, c_n, *c
        torch.manual_seed(1)
        grads = torch.autograd.grad(
            outputs, [x, *module.parameters()], [torch.randn_like(o) for o in outputs]
        )
        found.append([*outputs, *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@backends
@variants
def test_lengths_are_what_packing_means(variant, backend):
    module = fusedrnn.LSTM(
        3, 5, 2, batch_first=True, bidirectional=True, backend=backend, **variant
    )
    x, lengths = torch.randn(3, 6, 3), [4, 1, 6]
    y, state = module(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed_y, packed_state = module(packed)
    torch.testing.assert_close(pad_packed_sequence(packed_y, batch_first=True)[0], y)
    torch.testing.assert_close(packed_state, state)
    for b, n in enumerate(lengths):
        alone, (h_n, c_n) = module(x[b, :n])
        torch.testing.assert_close(alone, y[b, :n])
        torch.testing.assert_close((h_n, c_n), (state[0][:, b], state[1][:, b]))


@variants
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_cells(variant, bias):
    """A cell stepped by hand is the layer."""
    cell = shaken(fusedrnn.LSTMCell(3, 5, bias=bias, **variant))
    layer = fusedrnn.LSTM(3, 5, bias=bias, **variant)
    assert [f"{name}_l0" for name in cell.state_dict()] == list(layer.state_dict())
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    x, state, out = torch.randn(4, 2, 3), None, []
    for x_t in x:
        state = cell(x_t, state)
        out.append(state[0])
    y, (h_n, c_n) = layer(x)
    torch.testing.assert_close(torch.stack(out), y)
    torch.testing.assert_close(state, (h_n[0], c_n[0]))
    (torch.stack(out).square().sum() + state[1].sum()).backward()
    (y.square().sum() + c_n.sum()).backward()
    for ours, theirs in zip(cell.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@variants
def test_what_other_layers_can(variant):
    module = fusedrnn.LSTM(3, 5, 2, bidirectional=True, initial_state="learned", **variant)
    x = torch.randn(4, 2, 3, requires_grad=True)
    y, state = module(x)
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x)[0], y) and repr(same) == repr(module)
    other = fusedrnn.LSTM(3, 5, 2, bidirectional=True, initial_state="learned", **variant)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], y)
    params = list(module.parameters())[:-2]  # without h0 and c0, which are zeros yet
    again = fusedrnn.functional.lstm(x, None, params, num_layers=2, bidirectional=True, **variant)
    assert torch.equal(again[0], y) and torch.equal(again[1][1], state[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
    fusedrnn.init.orthogonal_(module)
    for block in module.weight_hh_l0.split(5):
        torch.testing.assert_close(block @ block.t(), torch.eye(5))


@variants
def test_compiled(variant):
    module = fusedrnn.LSTM(3, 5, **variant)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3)
    found = []
    for run in (module, compiled):
        y, _ = run(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@variants
def test_second_derivatives(variant):
    module = fusedrnn.LSTM(2, 3, dtype=torch.float64, **variant)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    params = dict(module.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(params, values, strict=True)), (x,))[0]

    assert torch.autograd.gradgradcheck(run, (x, *params.values()))


def test_norm_of_numbers_with_an_offset():
    """The variance of a row lies about its mean: an offset of all of W_ih x, beside which float32
    keeps few digits, costs these digits and no more."""
    if not fusedrnn.backends.native.isas():
        pytest.skip("no native library")
    layer = fusedrnn.LSTM(1, 40, bias=False, layer_norm=True)
    x = torch.randn(5, 3, 1)
    with torch.no_grad():
        layer.weight_ih_l0.add_(1000.0)  # a common offset of x * 1000
    with fusedrnn.backend("reference"):
        expected, _ = layer.double()(x.double())
    y, _ = layer.float()(x)
    error = (y - expected).abs().max()
    std = layer.weight_ih_l0.std().item()
    # Less the square of the mean, squares would have an error of (1000 / std)^2 eps.
    assert error < 4 * torch.finfo(torch.float32).eps * 1000 / std, error


def gru_by_hand(module, x, h):
    weights = dict(module.named_parameters())
    w_ih, w_hh, b_ih, b_hh = (weights[f"{n}_l0"] for n in (
        "weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
    out = []
    for x_t in x:
        of_x = normed(weights, "norm_ih", "_l0", w_ih @ x_t) + b_ih
        of_h = normed(weights, "norm_hh", "_l0", w_hh @ h) + b_hh
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3), of_h.chunk(3)
        z = torch.sigmoid(xz + hz)
        h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        out.append(h)
    return torch.stack(out)


@backends
def test_layer_norm_of_a_gru(backend):
    """Outputs and every gradient, of one row at a time; and its cell."""
    module = fusedrnn.GRU(3, 5, layer_norm=True, dtype=torch.float64, backend=backend)
    assert list(module.state_dict())[4:] == ["norm_ih_l0", "norm_hh_l0"]
    shaken(module)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 5, dtype=torch.float64)
    y, h_n = module(x, h)
    expected = torch.stack([gru_by_hand(module, x[:, b], h[0, b]) for b in range(2)], 1)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h_n[0], expected[-1])
    leaves, weigh = [x, *module.parameters()], torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, weigh),
        torch.autograd.grad(expected, leaves, weigh),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    cell = fusedrnn.GRUCell(3, 5, layer_norm=True, dtype=torch.float64, backend=backend)
    assert [f"{name}_l0" for name in cell.state_dict()] == list(module.state_dict())
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    torch.testing.assert_close(cell(x[0], h[0]), y[0])
    params = list(module.parameters())
    again, _ = fusedrnn.functional.gru(x, h, params, layer_norm=True, backend=backend)
    assert torch.equal(again, y)
    with pytest.raises(ValueError, match=r"GRU has layer_norm=True, which torch\.nn has not"):
        fusedrnn.to_torch(module)
    assert repr(cell) == f"GRUCell(3, 5, layer_norm=True, backend={backend!r})"


@backends
def test_layer_norm_of_what_is_all_the_same(backend):
    """No variance: what is normalised is zero, and so are the gradients through it."""
    layer = fusedrnn.LSTM(3, 4, layer_norm=True, backend=backend)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            layer.get_parameter(name).fill_(0.5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    y, _ = layer(x)
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.isfinite().all(), name
    assert y.isfinite().all() and x.grad.abs().max() < 1e-3


def test_forget_gate_of_coupled_gates():
    for module in (
        fusedrnn.LSTM(3, 5, coupled_gates=True, forget_bias=2.0),
        fusedrnn.LSTMCell(3, 5, coupled_gates=True, forget_bias=2.0),
    ):
        f, g, o = next(p for n, p in module.named_parameters() if n.startswith("bias_ih")).split(5)
        assert (f == 2).all() and torch.cat((g, o)).abs().max() <= 5**-0.5


def test_errors_and_repr():
    with pytest.raises(TypeError, match="peephole should be of type bool, got: int"):
        fusedrnn.LSTM(3, 4, peephole=1)
    with pytest.raises(TypeError, match="coupled_gates should be of type bool, got: str"):
        fusedrnn.LSTMCell(3, 4, coupled_gates="yes")
    with pytest.raises(RuntimeError, match=r"normalises no complex numbers, got torch\.complex64"):
        module = fusedrnn.LSTM(3, 4, layer_norm=True, dtype=torch.complex64)
        module(torch.randn(2, 1, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="layer_norm should be of type bool, got: int"):
        fusedrnn.GRU(3, 4, layer_norm=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_norm'"):
        fusedrnn.RNN(3, 4, layer_norm=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'peephole'"):
        fusedrnn.GRU(3, 4, peephole=True)
    module = fusedrnn.LSTM(3, 4, peephole=True, coupled_gates=True)
    assert repr(module) == "LSTM(3, 4, peephole=True, coupled_gates=True)"
    assert repr(fusedrnn.LSTMCell(3, 4, peephole=True)) == "LSTMCell(3, 4, peephole=True)"

    x, params = torch.randn(2, 1, 3), list(module.parameters())
    with pytest.raises(ValueError, match="params should hold 5 tensors for each of 1 layers"):
        fusedrnn.functional.lstm(x, None, params[:-1], peephole=True, coupled_gates=True)
    with pytest.raises(ValueError, match=r"p_f, p_o .* one tensor of shape \[8\], got \[4\]"):
        wrong = [*params[:-1], params[-1][:4]]
        fusedrnn.functional.lstm(x, None, wrong, peephole=True, coupled_gates=True)
    with pytest.raises(ValueError, match=r"w_hh of layer 0 should have shape \[12, 3\], got"):
        fusedrnn.functional.lstm(x, None, params[:-1])


@variants
def test_not_for_torch(variant):
    name = "|".join(variant)
    for module in (fusedrnn.LSTM(3, 4, **variant), fusedrnn.LSTMCell(3, 4, **variant)):
        model = nn.Sequential(fusedrnn.GRU(3, 4), module)
        with pytest.raises(
            ValueError, match=rf"1 \(LSTM.*\) has ({name})=True, which torch.nn has"
        ):
            fusedrnn.to_torch(model)
        assert type(model[0]) is fusedrnn.GRU
    plain = nn.LSTM(3, 4)
    plain.peephole = True
    with pytest.raises(ValueError, match="LSTM has an attribute peephole, as ours have"):
        fusedrnn.convert(plain)
