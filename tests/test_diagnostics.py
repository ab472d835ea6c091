"""Gradients through time, against loops that keep every state as a leaf of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn.cells import LSTM
from fusedrnn.diagnostics import gradient_flow, omega

CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


def pair(kind, hidden=5):
    """A layer and torch.nn's cell with the same weights, in float64."""
    layer = getattr(fusedrnn, kind)(3, hidden, dtype=torch.float64)
    cell = CELLS[kind](3, hidden, dtype=torch.float64)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    return layer, cell


def loop(kind, cell, x, loss):
    """The states of each step, and the gradients to them."""
    states, state = [], None
    for x_t in x:
        new = cell(x_t, state)
        new = new if kind == "LSTM" else (new,)
        states.append(new)
        state = new if kind == "LSTM" else new[0]
    value = loss(torch.stack([s[0] for s in states]))
    flat = [s for step in states for s in step]
    found = torch.autograd.grad(value, flat, allow_unused=True, retain_graph=True)
    pairs = zip(flat, found, strict=True)
    given = iter([torch.zeros_like(s) if g is None else g for s, g in pairs])
    return states, [[next(given) for _ in step] for step in states]


@pytest.mark.parametrize("kind", CELLS)
def test_gradient_flow(kind):
    layer, cell = pair(kind)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    flow = gradient_flow(layer, x, lambda out: out[0][4].square().sum())
    _, grads = loop(kind, cell, x, lambda y: y[4].square().sum())
    expected = torch.stack([torch.stack([g.norm() for g in step]) for step in grads])
    torch.testing.assert_close(flow.h[0, 0], expected[:, 0])
    assert not flow.h[0, 0, 5:].any() and (flow.h[0, 0, :5] > 0).all()
    if kind == "LSTM":
        torch.testing.assert_close(flow.c[0, 0], expected[:, 1])
    else:
        assert flow.c is None


def test_layers_directions_and_layouts():
    layer = fusedrnn.LSTM(3, 5, 2, bidirectional=True, batch_first=True, backend="cpu")
    x = torch.randn(2, 6, 3)
    flow = gradient_flow(layer, x, lambda out: out[0][:, 2, :5].sum())
    assert flow.h.shape == flow.c.shape == (2, 2, 6)
    assert not flow.h[1, 0, 3:].any() and (flow.h[1, 0, :3] > 0).all()
    assert not flow.h[1, 1].any() and (flow.h[0, 1] > 0).all()
    assert not flow.h[0, 0, 3:].any() and (flow.h[0, 0, :3] > 0).all()
    assert layer.backend == "cpu" and all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(3, 5), lambda: fusedrnn.Recurrent(LSTM, 3, 5),
     lambda: fusedrnn.LSTM(3, 5, proj_size=2)],
    ids=["torch.nn", "Recurrent", "projection"],
)  # fmt: skip
def test_other_layers(make):
    flow = gradient_flow(make(), torch.randn(4, 2, 3), lambda out: out[0].sum())
    assert flow.h.shape == flow.c.shape == (1, 1, 4) and (flow.h > 0).all()
    omega(make(), torch.randn(4, 2, 3), lambda out: out[0].sum()).backward()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    layer = fusedrnn.LSTM(3, 5, 2, bidirectional=True)
    gradient_flow(layer, torch.randn(4, 2, 3), lambda out: out[0].sum()).plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", CELLS)
def test_omega(kind):
    """Its value and its gradients, by one step after the other from constant states."""
    layer, cell = pair(kind)
    x = torch.randn(6, 3, 3, dtype=torch.float64)

    def loss(y):
        return y[4].square().sum() + y[2, 0].sum()  # nothing reaches the last state

    got = omega(layer, x, lambda out: loss(out[0]))
    got.backward()
    states, grads = loop(kind, cell, x, loss)
    expected = 0
    for t in range(1, 6):
        before = [s.detach().requires_grad_() for s in states[t - 1]]
        after = cell(x[t], before if kind == "LSTM" else before[0])
        after = after if kind == "LSTM" else (after,)
        upstream = [g.detach() for g in grads[t]]
        found = torch.autograd.grad(after, before, upstream, create_graph=True)
        for b in range(3):
            given = torch.cat([g[b] for g in upstream]).norm()
            if given > 0:
                ratio = torch.cat([g[b] for g in found]).norm() / given
                expected = expected + (ratio - 1) ** 2 / 3
    expected.backward()
    torch.testing.assert_close(got, expected)
    for name, parameter in cell.named_parameters():
        torch.testing.assert_close(getattr(layer, f"{name}_l0").grad, parameter.grad)


def test_omega_of_two_directions_is_that_of_each():
    both = fusedrnn.GRU(3, 5, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    got = omega(both, x, lambda out: out[0].square().sum())
    total = 0
    for end, along in (("", x), ("_reverse", x.flip(0))):
        one = fusedrnn.GRU(3, 5, dtype=torch.float64)
        one.load_state_dict({n: both.state_dict()[n + end] for n in one.state_dict()})
        total = total + omega(one, along, lambda out: out[0].square().sum())
    torch.testing.assert_close(got, total)


def test_omega_where_nothing_passes():
    """A step that passes nothing on counts 1, and its gradient is zero, not NaN."""
    layer = fusedrnn.RNN(3, 4, nonlinearity="relu")
    nn.init.zeros_(layer.weight_hh_l0)
    value = omega(layer, torch.randn(3, 2, 3), lambda out: out[0].sum())
    value.backward()
    assert value == 2
    assert all(p.grad is None or not p.grad.isnan().any() for p in layer.parameters())


@pytest.mark.parametrize("function", [gradient_flow, omega])
def test_errors(function):
    x = torch.zeros(4, 2, 3)
    with pytest.raises(TypeError, match="expected a recurrent layer, got Linear"):
        function(nn.Linear(3, 4), x, lambda out: out[0].sum())
    with pytest.raises(ValueError, match=r"the loss should be a scalar, got shape \[2, 4\]"):
        function(fusedrnn.GRU(3, 4), x, lambda out: out[0][-1])
