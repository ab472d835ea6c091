"""The accuracy bound itself: wrong kernels of the kinds that happen must fail it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedrnn.backends import Reference, reference
from fusedrnn.cells import CELLS, GRU, LSTM
from fusedrnn.cells.cell import keep
from fusedrnn.testing import (
    Case,
    OnStored,
    assert_as_accurate,
    assert_stored,
    differentiate,
    make_inputs,
    run_case,
    to_tf32,
    unrounded,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class _Round(torch.autograd.Function):
    """Rounds to another dtype and back, forward or backward."""

    @staticmethod
    def forward(ctx, c, forward, dtype):
        ctx.forward_too, ctx.to = forward, dtype
        return c.to(dtype).to(c.dtype) if forward else c.clone()

    @staticmethod
    def backward(ctx, dc):
        return (dc if ctx.forward_too else dc.to(ctx.to).to(dc.dtype)), None, None


def rounded(forward, dtype=torch.bfloat16):
    def step(gx, gh, state, keep=keep):
        return LSTM.step(gx, gh, (state[0], _Round.apply(state[1], forward, dtype)), keep)

    return replace(LSTM, step=step)


def drop_gate_bias(inputs):
    b_hh = inputs.weights.b_hh.clone()
    b_hh[: b_hh.shape[0] // 3] = 0
    return replace(inputs, weights=inputs.weights._replace(b_hh=b_hh))


BUGS = {
    "one gate's b_hh dropped": drop_gate_bias,
    "h0 ignored": lambda i: replace(i, h0=torch.zeros_like(i.h0)),
    "last dh dropped": lambda i: replace(i, grads={**i.grads, "h_n": 0 * i.grads["h_n"]}),
    "two batch rows swapped": lambda i: replace(i, x=i.x[:, [1, 0, *range(2, i.x.shape[1])]]),
}


def outcome(case, wrong_inputs=None, wrong_case=None):
    inputs = make_inputs(case)
    if case.cell is LSTM:  # forget bias +4: the state lives through the whole sequence
        inputs.weights.b_ih[case.H : 2 * case.H] += 4
    ref = run_case(case, inputs, Reference())
    ref64 = run_case(case, inputs.to(torch.float64), Reference())
    out = run_case(wrong_case or case, (wrong_inputs or (lambda i: i))(inputs), Reference())
    assert_as_accurate(case, out, ref, ref64)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))
def test_wrong_inputs_fail(bug, dtype):
    case = Case(GRU, T=9, B=5, I=4, H=19, dtype=dtype)
    outcome(case)
    with pytest.raises(AssertionError, match="error of"):
        outcome(case, bug)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["c in 16 bit", "dc in 16 bit"])
def test_16_bit_states_fail(forward, dtype):
    case = Case(LSTM, T=1000, B=2, I=3, H=16, dtype=dtype)
    outcome(case)
    with pytest.raises(AssertionError, match="error of"):
        outcome(case, wrong_case=replace(case, cell=rounded(forward)))


class Storing(OnStored):
    """A right backend, which stores what it makes."""

    def __init__(self, case, inputs, operand):
        def zeros(size, dtype=case.dtype):
            return torch.zeros(case.T, case.B, size, dtype=dtype)

        gates, out = len(case.cell.gates) * case.H, case.P or case.H
        wide = reference.compute_dtype(case.dtype)
        stored = {
            "gx": zeros(gates),
            "h_prev": zeros(out),
            **{f"c_prev {j}": zeros(case.H, wide) for j in range(len(case.cell.states) - 1)},
            **{f"saved {r}": zeros(case.H) for r in range(case.cell.saved)},
            "dgx": zeros(gates),
            "dgh": zeros(gates),
            **({"m": zeros(case.H), "dh": zeros(out)} if case.P else {}),
            **({"late": zeros(case.H)} if case.cell.late else {}),
        }
        if case.layer_norm:
            stored |= {name: zeros(gates) for name in ("wx", "hats ih", "hats hh", "dwx", "dwh")}
            stored |= {"hats c": zeros(case.H)} if "c" in case.cell.states else {}
        super().__init__(case, inputs, stored, operand)

    def take(self, name, t, made, columns=slice(None)):
        super().take(name, t, made, columns)
        self.stored[name][t][:, columns] = made
        return self.stored[name][t][:, columns].to(made.dtype)


class HalfSums(Storing):
    def product(self, a, w):
        return _Round.apply(super().product(a, w), True, self.case.dtype)


class DroppedEnd(Storing):
    def product(self, a, w):
        return super().product(a[:, :-1], w[:, :-1])


class TruncatedH(Storing):
    def exchange(self, name, t, made, columns=slice(None)):
        if name == "h_prev":
            made = made * (1 - torch.finfo(self.case.dtype).eps / 2)
        return super().exchange(name, t, made, columns)


def wrong_plane():
    def step(gx, gh, state, keep=keep):
        def keep_f_for_o(*saved):
            i, f, g, _ = keep(*saved)
            return i, f, g, f

        return LSTM.step(gx, gh, state, keep_f_for_o)

    return replace(LSTM, step=step)


def stored_outcome(case, backend=Storing, wrong_cell=None, operands=(unrounded, unrounded)):
    inputs = make_inputs(case)
    storing = backend(replace(case, cell=wrong_cell or case.cell), inputs, operands[0])
    wide = inputs.to(reference.compute_dtype(case.dtype))
    out = differentiate(case, wide, storing)
    out = {name: t.to(case.dtype) for name, t in out.items()}
    assert_stored(case, inputs, out, storing.stored, operands[1])


HALVES = [torch.bfloat16, torch.float16]
STORED_BUGS = {
    "c in 16 bits": lambda dtype: {"wrong_cell": rounded(True, dtype)},
    "dc in 16 bits": lambda dtype: {"wrong_cell": rounded(False, dtype)},
    "do from f": lambda dtype: {"wrong_cell": wrong_plane()},
    "sums in 16 bits": lambda dtype: {"backend": HalfSums},
    "end of k dropped": lambda dtype: {"backend": DroppedEnd},
    "h truncated where it is read": lambda dtype: {"backend": TruncatedH},
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("feature", [{}, dict(lengths=True, resets=True, reverse=True)], ids=str)
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_right_storage_passes(cell, feature, dtype):
    for proj in (0, 7) if cell is LSTM else (0,):
        stored_outcome(Case(cell, T=5, B=4, I=3, H=19, P=proj, dtype=dtype, **feature))
    if cell.name.startswith(("lstm", "gru")) and not cell.late:
        stored_outcome(Case(cell, T=5, B=4, I=3, H=19, dtype=dtype, layer_norm=True, **feature))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bug", STORED_BUGS.values(), ids=list(STORED_BUGS))
def test_wrong_storage_fails(bug, dtype):
    case = Case(LSTM, T=3, B=2, I=3, H=19, dtype=dtype)
    with pytest.raises(AssertionError, match=r"values of .* are wrong"):
        stored_outcome(case, **bug(dtype))


def test_operands_not_in_tf32_fail():
    case = Case(GRU, T=3, B=2, I=3, H=19)
    stored_outcome(case, operands=(to_tf32, to_tf32))
    with pytest.raises(AssertionError, match=r"values of .* are wrong"):
        stored_outcome(case, operands=(unrounded, to_tf32))


class UnroundedGradients(Storing):
    def product(self, a, w):
        full = a @ w.t()
        return full + (super().product(a, w) - full).detach()


def test_operands_of_gradients_not_in_tf32_fail():
    case = Case(GRU, T=3, B=2, I=3, H=19)
    with pytest.raises(AssertionError, match=r"values of .* are wrong"):
        stored_outcome(case, UnroundedGradients, operands=(to_tf32, to_tf32))
