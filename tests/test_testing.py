"""The accuracy bound itself: wrong kernels of the kinds that happen must fail it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedrnn.backends import Reference
from fusedrnn.cells import GRU, LSTM
from fusedrnn.testing import Case, assert_as_accurate, make_inputs, run_case

pytestmark = pytest.mark.usefixtures("one_thread")


class _Round(torch.autograd.Function):
    """Rounds to bfloat16 and back, forward or backward."""

    @staticmethod
    def forward(ctx, c, forward):
        ctx.forward_too = forward
        return c.to(torch.bfloat16).to(c.dtype) if forward else c.clone()

    @staticmethod
    def backward(ctx, dc):
        return (dc if ctx.forward_too else dc.to(torch.bfloat16).to(dc.dtype)), None


def rounded(forward):
    def step(gx, gh, state):
        h, c = LSTM.step(gx, gh, (state[0], _Round.apply(state[1], forward)))
        return h, c

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
