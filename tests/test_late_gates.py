"""Cells whose last gates see h only as the others leave it: GRU(reset_after=False), and users'."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import fusedrnn
from fusedrnn.backends import Call, Noise, Sequence, Weights, by_name, native
from fusedrnn.cells import GRU_RESET_BEFORE
from fusedrnn.recurrence import recurrence

FEATURES = {
    "plain": {},
    "nobias": {"bias": False},
    "2xbi": {"num_layers": 2, "bidirectional": True},
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu" and not native.isas():
        pytest.skip("no native library")
    return request.param


def assert_same_gradients(y, expected, leaves):
    weigh = torch.randn_like(y)
    found = [torch.autograd.grad(out, leaves, weigh) for out in (y, expected)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def by_hand(module, x, suffix, h):
    """One layer and direction of one row, ``x [T,I]``, each gate by its own block of weights."""
    weights = dict(module.named_parameters())
    of_x = weights[f"weight_ih{suffix}"].chunk(3)
    of_h = weights[f"weight_hh{suffix}"].chunk(3)
    biases = [
        weights[f"{name}{suffix}"].chunk(3) if module.bias else (0, 0, 0)
        for name in ("bias_ih", "bias_hh")
    ]
    out = []
    for x_t in x:

        def reach(k, h, x_t=x_t):
            return of_x[k] @ x_t + biases[0][k] + of_h[k] @ h + biases[1][k]

        r, z = (1 / (1 + torch.exp(-reach(k, h))) for k in (0, 1))
        h = (1 - z) * torch.tanh(reach(2, r * h)) + z * h
        out.append(h)
    return torch.stack(out)


def layers_by_hand(module, x):
    for layer in range(module.num_layers):
        ways = []
        for direction in range(2 if module.bidirectional else 1):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            turned = x.flip(0) if direction else x
            zeros = x.new_zeros(module.hidden_size)
            rows = [by_hand(module, turned[:, b], suffix, zeros) for b in range(x.shape[1])]
            y = torch.stack(rows, 1)
            ways.append(y.flip(0) if direction else y)
        x = torch.cat(ways, -1)
    return x


@pytest.mark.parametrize("options", FEATURES.values(), ids=list(FEATURES))
def test_equations(options, backend):
    """Outputs and every gradient, of one row at a time."""
    module = fusedrnn.GRU(3, 5, reset_after=False, dtype=torch.float64, backend=backend, **options)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    y, h_n = module(x)
    expected = layers_by_hand(module, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h_n[-1], expected[0 if module.bidirectional else -1, :, -5:])
    assert_same_gradients(y, expected, [x, *module.parameters()])


def test_it_is_not_the_other_gru():
    module = fusedrnn.GRU(3, 5, reset_after=False)
    other = fusedrnn.GRU(3, 5)
    other.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 3)
    first, then = (module(x)[0] - other(x)[0]).abs().amax((1, 2))[[0, 1]]
    assert first > 0  # by b_hn, which one resets and the other does not
    with torch.no_grad():
        module.bias_hh_l0.zero_()
        other.bias_hh_l0.zero_()
    first, then = (module(x)[0] - other(x)[0]).abs().amax((1, 2))[[0, 1]]
    assert first < 1e-6 < 1e-4 < then


def test_dropout_and_zoneout_by_hand(backend):
    """What is dropped of h stays out of both products, and is still carried by z."""
    cell, steps, batch, hidden = GRU_RESET_BEFORE, 5, 3, 6
    torch.set_default_dtype(torch.float64)
    try:
        weights = Weights(*(torch.randn(3 * hidden, n) for n in (2, hidden)), None, None)
        leaves = [torch.randn(steps, batch, 2), *weights[:2], torch.randn(batch, hidden)]
    finally:
        torch.set_default_dtype(torch.float32)
    leaves = [t.requires_grad_() for t in leaves]
    x, w_ih, w_hh, h0 = leaves
    dropout = (torch.rand(batch, hidden) < 0.6).double() / 0.6
    renew = (torch.rand(steps, batch, hidden) < 0.7).to(torch.uint8)
    call = Call(cell, x, Weights(w_ih, w_hh, None, None), h0, None, Sequence(), False, False,
                Noise(dropout, renew))  # fmt: skip
    y, _ = recurrence(by_name(backend), call)
    h, expected = h0, []
    for t in range(steps):
        dropped = h * dropout
        xr, xz, xn = F.linear(x[t], w_ih).chunk(3, -1)
        r, z = xr + dropped @ w_hh[:hidden].t(), xz + dropped @ w_hh[hidden : 2 * hidden].t()
        n = torch.tanh(xn + (r.sigmoid() * dropped) @ w_hh[2 * hidden :].t())
        new = (1 - z.sigmoid()) * n + z.sigmoid() * h
        h = torch.where(renew[t].bool(), new, h)
        expected.append(h)
    expected = torch.stack(expected)
    torch.testing.assert_close(y, expected)
    assert_same_gradients(y, expected, leaves)


def test_second_derivatives():
    module = fusedrnn.GRU(2, 3, reset_after=False, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    params = dict(module.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(params, values, strict=True)), (x,))[0]

    assert torch.autograd.gradgradcheck(run, (x, *params.values()))


def test_what_other_layers_can():
    module = fusedrnn.GRU(3, 5, 2, bidirectional=True, reset_after=False)
    assert repr(module) == "GRU(3, 5, num_layers=2, bidirectional=True, reset_after=False)"
    x = torch.randn(4, 2, 3)
    y, h_n = module(x)
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x)[0], y) and repr(same) == repr(module)
    again = fusedrnn.functional.gru(
        x, None, list(module.parameters()), num_layers=2, bidirectional=True, reset_after=False
    )
    assert torch.equal(again[0], y) and torch.equal(again[1], h_n)
    lengths = torch.tensor([4, 2])
    y, h_n = module(x, lengths=lengths)
    for b, length in enumerate(lengths):
        alone = module(x[:length, b : b + 1])
        torch.testing.assert_close(y[:length, b], alone[0][:, 0])
        torch.testing.assert_close(h_n[:, b], alone[1][:, 0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), module(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cell_module():
    cell = fusedrnn.GRUCell(3, 5, reset_after=False)
    assert repr(cell) == "GRUCell(3, 5, reset_after=False)"
    layer = fusedrnn.GRU(3, 5, reset_after=False)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    x, h = torch.randn(4, 2, 3), torch.zeros(2, 5)
    y, _ = layer(x)
    for t in range(4):
        h = cell(x[t], h)
        torch.testing.assert_close(h, y[t])


def test_errors():
    for make in (fusedrnn.GRU, fusedrnn.GRUCell):
        with pytest.raises(ValueError, match="layer_norm=True needs reset_after=True"):
            make(3, 5, reset_after=False, layer_norm=True)
        with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
            make(3, 5, reset_after=1)
        with pytest.raises(ValueError, match=r"has reset_after=False, which torch\.nn has not"):
            fusedrnn.to_torch(make(3, 5, reset_after=False))
    params = list(fusedrnn.GRU(3, 5).parameters())
    with pytest.raises(ValueError, match="layer_norm=True needs reset_after=True"):
        fusedrnn.functional.gru(
            torch.randn(4, 2, 3), None, params, reset_after=False, layer_norm=True
        )


def minimal_step(gx, gh, state, product):
    """The minimal gated unit (Zhou et al. 2016)."""
    xf, xn = gx.unbind(-2)
    f = (xf + gh.squeeze(-2)).sigmoid()
    return (torch.lerp(state[0], (xn + product(f).squeeze(-2)).tanh(), f),)


def test_a_cell_of_a_user():
    minimal = fusedrnn.Cell("minimal", gates="fn", states="h", step=minimal_step, late=1)
    module = fusedrnn.Recurrent(minimal, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y, _ = module(x)
    w, u, b_x, b_h = (p.chunk(2) for p in module.parameters())
    h = x.new_zeros(2, 4)
    for t in range(5):
        f = (x[t] @ w[0].t() + b_x[0] + h @ u[0].t() + b_h[0]).sigmoid()
        n = (x[t] @ w[1].t() + b_x[1] + (f * h) @ u[1].t() + b_h[1]).tanh()
        h = (1 - f) * h + f * n
        torch.testing.assert_close(y[t], h)
