"""Cells as users register them, each with its pair in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

import fusedrnn
from fusedrnn.backends.triton.cells.numeric import (
    sigmoid,
    sigmoid_backward,
    tanh,
    tanh_backward,
)
from fusedrnn.cells.cell import keep


def peephole_step(gx, gh, state, params, keep=keep):
    """An LSTM whose gates see c (Gers & Schmidhuber 2000): per unit three params."""
    i, f, g, o = (gx + gh).unbind(-2)
    p_i, p_f, p_o = params
    i, f, g = (i + p_i * state[1]).sigmoid(), (f + p_f * state[1]).sigmoid(), g.tanh()
    i, f, g = keep(i, f, g)
    c = f * state[1] + i * g
    (o,) = keep((o + p_o * c).sigmoid())
    return o * c.tanh(), c


@triton.jit
def peephole_forward(gx, gh, state, params):
    i = sigmoid(gx[0] + gh[0] + params[0] * state[1])
    f = sigmoid(gx[1] + gh[1] + params[1] * state[1])
    g = tanh(gx[2] + gh[2])
    c = f * state[1] + i * g
    o = sigmoid(gx[3] + gh[3] + params[2] * c)
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def peephole_backward(state, saved, dnew, params):
    i, f, g, o = saved
    c = f * state[1] + i * g
    tanh_c = tanh(c)
    d_o = sigmoid_backward(dnew[0] * tanh_c, o)
    dc = dnew[1] + tanh_backward(dnew[0] * o, tanh_c) + d_o * params[2]
    d_i = sigmoid_backward(dc * g, i)
    d_f = sigmoid_backward(dc * state[1], f)
    d = d_i, d_f, tanh_backward(dc * i, g), d_o
    dc_before = dc * f + d_i * params[0] + d_f * params[1]
    return d, d, (tl.zeros_like(c), dc_before), (d_i * state[1], d_f * state[1], d_o * c)


PEEPHOLE = fusedrnn.Cell(
    "peephole", gates="ifgo", states="hc", step=peephole_step, params=("p_i", "p_f", "p_o"),
    triton=(peephole_forward, peephole_backward),
)  # fmt: skip


def slow_step(gx, gh, state, keep=keep):
    """Three states, a step that reads h, and products of gx and gh."""
    a, b, u, v = keep(*gx.unbind(-2), *gh.unbind(-2))
    p = state[1] + a * u
    q = 0.5 * state[2] + v * b
    return (0.5 * state[0] + 0.1 * p + 0.1 * q, 0.9 * p, q)


@triton.jit
def slow_forward(gx, gh, state):
    p = state[1] + gx[0] * gh[0]
    q = 0.5 * state[2] + gh[1] * gx[1]
    return (0.5 * state[0] + 0.1 * p + 0.1 * q, 0.9 * p, q), (gx[0], gx[1], gh[0], gh[1])


@triton.jit
def slow_backward(state, saved, dnew):
    a, b, u, v = saved
    dp = 0.1 * dnew[0] + 0.9 * dnew[1]
    dq = 0.1 * dnew[0] + dnew[2]
    return (dp * u, dq * v), (dp * a, dq * b), (0.5 * dnew[0], dp, 0.5 * dq)


SLOW = fusedrnn.Cell(
    "slow", gates="ab", states="hpq", step=slow_step, saved=4, additive=False,
    triton=(slow_forward, slow_backward),
)  # fmt: skip
