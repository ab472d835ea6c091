"""The LSTM with coupled gates and peepholes; equations in :mod:`fusedrnn.cells.lstm`.

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
    f = sigmoid(gx[0] + gh[0] + params[0] * state[1])
    g = tanh(gx[1] + gh[1])
    c = f * state[1] + (1 - f) * g
    o = sigmoid(gx[2] + gh[2] + params[1] * c)
    return (o * tanh(c), c), (f, g, o)


@triton.jit
def backward(state, saved, dnew, params):
    f, g, o = saved
    c = f * state[1] + (1 - f) * g
    tanh_c = tanh(c)
    do = sigmoid_backward(dnew[0] * tanh_c, o)
    dc = dnew[1] + tanh_backward(dnew[0] * o, tanh_c) + do * params[1]
    df = sigmoid_backward(dc * (state[1] - g), f)
    d = df, tanh_backward(dc * (1 - f), g), do
    return d, d, (tl.zeros_like(c), dc * f + df * params[0]), (df * state[1], do * c)
