"""The LSTM with coupled gates and peepholes; equations in :mod:`fusedrnn.cells.lstm`.

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
    f = sigmoid(gx[0] + gh[0] + params[0] * state[1])
    g = tanh(gx[1] + gh[1])
    c = f * state[1] + (1 - f) * g
    o = sigmoid(gx[2] + gh[2] + params[1] * c)
    return (o * tanh(c), c), (f, g, o)


@triton.jit
def backward_of_gates(state, saved, do, dc, params):
    f, g, _ = saved
    c = f * state[1] + (1 - f) * g
    dc += do * params[1]
    df = sigmoid_backward(dc * (state[1] - g), f)
    d = df, tanh_backward(dc * (1 - f), g), do
    return d, d, (tl.zeros_like(dc), dc * f + df * params[0]), (df * state[1], do * c)


@triton.jit
def backward(state, saved, dnew, params):
    f, g, _ = saved
    do, dc = backward_of_output(saved, f * state[1] + (1 - f) * g, dnew[0])
    return backward_of_gates(state, saved, do, dnew[1] + dc, params)
