"""Cells as users register them, each with its pair in Triton."""

from __future__ import annotations

import triton

import fusedrnn
from fusedrnn.cells.cell import keep


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
