"""Gradients through time, against loops that keep every state as a leaf of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

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
    for loss, got in (
        (lambda out: out[0][-1], r"shape \[2, 4\]"),
        (lambda out: out[0].sum().item(), "float"),
        (lambda out: out[0].sum().detach(), r"shape \[\]"),
    ):
        with pytest.raises(
            ValueError, match=f"the loss should be a scalar with a graph, got {got}"
        ):
            function(fusedrnn.GRU(3, 4), x, loss)
    if function is omega:
        with pytest.raises(TypeError, match="takes a padded tensor, got PackedSequence"):
            omega(fusedrnn.GRU(3, 4), pack_sequence([x[:, 0]]), lambda out: out[0].data.sum())


@pytest.mark.parametrize("kind", [fusedrnn.LSTM, nn.LSTM], ids=str)
def test_packed(kind):
    """Rows of equal length, as the padded ones; of other lengths, none beyond the end."""
    layer, x = kind(3, 5, 2, bidirectional=True), torch.randn(6, 2, 3)
    whole = gradient_flow(layer, x, lambda out: out[0].square().sum() + out[1][1].sum())
    packed = pack_sequence([x[:, 0], x[:, 1]])
    flow = gradient_flow(layer, packed, lambda out: out[0].data.square().sum() + out[1][1].sum())
    torch.testing.assert_close(flow.h, whole.h)
    torch.testing.assert_close(flow.c, whole.c)
    alone = gradient_flow(layer, x[:4, :1], lambda out: out[0].sum())
    packed = pack_sequence([x[:, 1], x[:4, 0]])

    def of_second_row(out):
        return nn.utils.rnn.pad_packed_sequence(out[0])[0][:, 1].sum()

    flow = gradient_flow(layer, packed, of_second_row)
    torch.testing.assert_close(flow.h[:, :, :4], alone.h)
    assert not flow.h[:, :, 4:].any()


def test_only_the_module_is_looked_at():
    """And by its own call, with hooks, weight norm and all; not what the loss runs."""
    layer, x = fusedrnn.LSTM(3, 5), torch.randn(4, 2, 3)
    after = fusedrnn.Recurrent(LSTM, 5, 2, backend="reference")
    flow = gradient_flow(layer, x, lambda out: after(out[0])[0].sum())
    assert flow.h.shape == (1, 1, 4)
    plain = gradient_flow(layer, x, lambda out: out[0].sum())
    layer.register_forward_hook(lambda _, __, out: (2 * out[0], out[1]))
    torch.testing.assert_close(gradient_flow(layer, x, lambda out: out[0].sum()).h, 2 * plain.h)
    layer = nn.utils.parametrizations.weight_norm(fusedrnn.LSTM(3, 5), "weight_hh_l0")
    omega(layer, x, lambda out: out[0].sum()).backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad.any()


def test_without_gradients():
    """Frozen, and under no_grad, which omega's result does not heed."""
    layer, x = fusedrnn.GRU(3, 5, 2), torch.randn(4, 2, 3)
    expected = gradient_flow(layer, x, lambda out: out[0].sum())
    value = omega(layer, x, lambda out: out[0].sum())
    with torch.no_grad():
        torch.testing.assert_close(omega(layer, x, lambda out: out[0].sum()), value)
        layer.requires_grad_(False)
        flow = gradient_flow(layer, x, lambda out: out[0].sum())
    torch.testing.assert_close(flow.h, expected.h)
    assert not x.requires_grad


def test_nan_stays():
    layer, x = fusedrnn.GRU(3, 5), torch.randn(4, 2, 3)
    assert omega(layer, x, lambda out: out[0].sum() * torch.nan).isnan()
    assert omega(layer, x[:, :0], lambda out: out[0].sum()) == 0
