"""bfloat16 on the CPU, where the engine has AMX tiles: stored as it is outside."""

from __future__ import annotations

import pytest
import torch

import fusedrnn
from fusedrnn.backends import native

pytestmark = pytest.mark.skipif("amx" not in native.isas(), reason="needs AMX")

CELLS = list(native.native_cells())
T, B, I, H = 3, 2, 5, 4  # noqa: E741


def r(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def forward_arguments(cell="lstm", **changes):
    facts = native.native_cells()[cell]
    gates = facts.gates * H
    given = {
        "x": r(T, B, I), "w_ih": r(gates, I), "w_hh": r(gates, H), "b_ih": r(gates),
        "b_hh": r(gates), "w_hr": None, "params": r(facts.params, H) if facts.params else None,
        "h0": r(B, H), "c0": r(1, B, H) if facts.states > 1 else None, "lengths": None,
        "resets": None, "h_reset": None, "c_reset": None, "dropout": None, "renew_h": None,
        "renew_c": None, "norm_ih": None, "norm_hh": None, "norm_c": None, "norm_c_bias": None,
        "cell": CELLS.index(cell), "reverse": False, "training": True, "cell_states": False,
        "rate_h": 1.0, "rate_c": 1.0,
    }  # fmt: skip
    return {**given, **changes}


def backward_arguments(cell, want_gates):
    given = forward_arguments(cell)
    _, _, _, _, *run, kept = torch.ops.fusedrnn.recurrence_forward(**given)
    masks = given["lengths"], given["resets"], *(None,) * 7
    upstream = r(T, B, H), None, None, None
    weights = (given[name] for name in ("x", "w_ih", "w_hh", "w_hr", "params"))
    how = given["cell"], False, False, 1.0, 1.0
    return *upstream, *weights, *run, *masks, kept, *how, *(True,) * 5, False, want_gates


@pytest.mark.parametrize("cell", ["lstm_peephole", "gru"])
def test_opcheck(cell):
    tests = "test_schema", "test_faketensor"
    ops = torch.ops.fusedrnn
    args = tuple(forward_arguments(cell).values())
    torch.library.opcheck(ops.recurrence_forward.default, args, test_utils=tests)
    for want_gates in (False, True):
        args = backward_arguments(cell, want_gates)
        torch.library.opcheck(ops.recurrence_backward.default, args, test_utils=tests)


WRONG = {
    "dropout": ({"dropout": r(B, H, dtype=torch.float32)}, "dropout is float32|neither dropout"),
    "zoneout": ({"rate_c": 0.9}, "neither dropout nor zoneout in bfloat16"),
    "norm": ({"norm_ih": r(4 * H), "norm_hh": r(4 * H)}, "no norms in bfloat16"),
    "resets into states": ({"h_reset": r(H), "c_reset": r(1, H)}, "into zeros in bfloat16"),
    "h0": ({"h0": r(B, H, dtype=torch.float32)}, "h0 is float32, expected bfloat16"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=list(WRONG))
def test_bad_arguments(changes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn.recurrence_forward(**forward_arguments(**changes))


def test_late_gates_have_no_kernel():
    with pytest.raises(RuntimeError, match=r"no kernels for that of gru_reset_before on amx"):
        torch.ops.fusedrnn.recurrence_forward(**forward_arguments("gru_reset_before"))


def test_explain():
    values = {
        "bfloat16": fusedrnn.LSTM(I, H),
        "float32": fusedrnn.LSTM(I, H, recurrent_dropout=0.5),
    }
    for dtype, layer in values.items():
        assert f"on amx, values in {dtype}" in str(fusedrnn.explain(layer, r(T, B, I)))


def flat(layer, x):
    x = x.clone().requires_grad_()
    y, (h, c) = layer(x)
    (y.float().square().sum() + h.sum() + c.sum()).backward()
    return y.detach(), h.detach(), c.detach(), x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("shape", [(9, 1, 7, 33), (5, 33, 40, 70), (40, 40, 9, 17)], ids=str)
def test_threads_change_no_bit(shape):
    """By units, by rows, and by chunks of rows that no tile holds whole."""
    steps, batch, width, hidden = shape
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        torch.manual_seed(0)
        layer = fusedrnn.LSTM(width, hidden, dtype=torch.bfloat16)
        found.append(flat(layer, r(steps, batch, width)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 20, 32])
def test_one_row_does_not_reach_another(row, value):
    """Whatever it holds, though tiles are read beyond the ends of rows and of arrays."""
    layer, x = fusedrnn.LSTM(7, 33, dtype=torch.bfloat16), r(5, 33, 7)
    y, _ = layer(x)
    x[:, row] = value
    others = [b for b in range(33) if b != row]
    assert torch.equal(layer(x)[0][:, others], y[:, others])


@pytest.mark.parametrize("proj", [0, 8])
def test_empty_batch(proj):
    layer = fusedrnn.LSTM(5, 20, proj_size=proj, dtype=torch.bfloat16, backend="cpu")
    y, *_ = flat(layer, r(3, 0, 5))
    assert y.shape == (3, 0, proj or 20) and not layer.weight_hh_l0.grad.any()
    with torch.no_grad():
        assert layer(r(3, 0, 5))[0].shape == y.shape


def test_saturated_gates():
    """Gates as large as they come are 0 and 1, and NaN stays NaN."""
    layer = fusedrnn.LSTM(1, 16, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([1.0, -1, 1, 1]).repeat_interleave(16)[:, None])
        layer.weight_hh_l0.zero_()
    for value, h in ((3e38, 1.0), (1e4, 1.0), (-3e38, 0.0), (float("nan"), float("nan"))):
        y, (_, c) = layer(torch.full((1, 1, 1), value, dtype=torch.bfloat16))
        expected = torch.full((16,), h).tanh()
        torch.testing.assert_close(
            y.float().flatten(), expected, rtol=2**-8, atol=0, equal_nan=True
        )
        assert torch.equal(c.isnan().flatten(), expected.isnan())
