"""The LSTM with peepholes; equations and gate order in :mod:`fusedrnn.cells.lstm`.

Saved: the activated gates.
"""

import triton
import triton.language as tl

from fusedrnn.backends.triton.cells.numeric import (
    sigmoid,
    sigmoid_backward,
    tanh,
    tanh_backward,
)


@triton.jit
def forward(gx, gh, state, params):
    i = sigmoid(gx[0] + gh[0] + params[0] * state[1])
    f = sigmoid(gx[1] + gh[1] + params[1] * state[1])
    g = tanh(gx[2] + gh[2])
    c = f * state[1] + i * g
    o = sigmoid(gx[3] + gh[3] + params[2] * c)
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def backward(state, saved, dnew, params):
    i, f, g, o = saved
    c = f * state[1] + i * g
    tanh_c = tanh(c)
    do = sigmoid_backward(dnew[0] * tanh_c, o)
    dc = dnew[1] + tanh_backward(dnew[0] * o, tanh_c) + do * params[2]
    di = sigmoid_backward(dc * g, i)
    df = sigmoid_backward(dc * state[1], f)
    d = di, df, tanh_backward(dc * i, g), do
    dc_prev = dc * f + di * params[0] + df * params[1]
    return d, d, (tl.zeros_like(c), dc_prev), (di * state[1], df * state[1], do * c)
