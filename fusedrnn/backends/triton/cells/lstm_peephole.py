"""The LSTM with peepholes; equations and gate order in :mod:`fusedrnn.cells.lstm`.

Saved: the activated gates.
"""

import triton
import triton.language as tl

from fusedrnn.backends.triton.cells.lstm import backward_of_output
from fusedrnn.backends.triton.cells.lstm import output as output
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
def backward_of_gates(state, saved, do, dc, params):
    i, f, g, _ = saved
    c = f * state[1] + i * g
    dc += do * params[2]
    di, df = sigmoid_backward(dc * g, i), sigmoid_backward(dc * state[1], f)
    d = di, df, tanh_backward(dc * i, g), do
    dc_prev = dc * f + di * params[0] + df * params[1]
    return d, d, (tl.zeros_like(dc), dc_prev), (di * state[1], df * state[1], do * c)


@triton.jit
def backward(state, saved, dnew, params):
    i, f, g, _ = saved
    do, dc = backward_of_output(saved, f * state[1] + i * g, dnew[0])
    return backward_of_gates(state, saved, do, dnew[1] + dc, params)
