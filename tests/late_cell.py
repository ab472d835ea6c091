"""A cell with late gates as users register one: the name of its module stands for its functions in
Triton. Gate n is late and bounded by a number of each unit."""

from __future__ import annotations

import triton

import fusedrnn
from fusedrnn.backends.triton.cells import numeric
from fusedrnn.cells.cell import keep


def step(gx, gh, state, params, product, keep=keep):
    xf, xn = gx.unbind(-2)
    f = (xf + gh.squeeze(-2) + params[0] * state[0]).sigmoid()
    hn = product(f).squeeze(-2)
    f, n, hn = keep(f, (xn + params[0] * hn).tanh(), hn)
    return (state[0] + f * (n - state[0]),)


@triton.jit
def factor(gx, gh, state, params):
    return numeric.sigmoid(gx[0] + gh[0] + params[0] * state[0])


@triton.jit
def forward(gx, gh, state, params):
    f = factor(gx, gh, state, params)
    n = numeric.tanh(gx[1] + params[0] * gh[1])
    return (state[0] + f * (n - state[0]),), (f, n, gh[1])


@triton.jit
def backward_of_late(state, saved, dnew, params):
    f, n, _ = saved
    return (numeric.tanh_backward(dnew[0] * f, n) * params[0],)


@triton.jit
def backward(state, saved, dnew, dfactor, params):
    f, n, hn = saved
    df = numeric.sigmoid_backward(dnew[0] * (n - state[0]) + dfactor, f)
    dn = numeric.tanh_backward(dnew[0] * f, n)
    before = dnew[0] * (1 - f) + df * params[0]
    return (df, dn), (df, dn * params[0]), (before,), (df * state[0] + dn * hn,)


BOUNDED = fusedrnn.Cell(
    "bounded", gates="fn", states="h", step=step, params=("p",), saved=3, additive=False, late=1,
    triton="late_cell",
)  # fmt: skip
