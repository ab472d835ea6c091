"""The LSTM with coupled gates; equations and gate order in :mod:`fusedrnn.cells.lstm`.

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
def forward(gx, gh, state):
    f, g, o = sigmoid(gx[0] + gh[0]), tanh(gx[1] + gh[1]), sigmoid(gx[2] + gh[2])
    c = f * state[1] + (1 - f) * g
    return (o * tanh(c), c), (f, g, o)


@triton.jit
def backward(state, saved, dnew):
    f, g, o = saved
    tanh_c = tanh(f * state[1] + (1 - f) * g)
    dc = dnew[1] + tanh_backward(dnew[0] * o, tanh_c)
    d = (
        sigmoid_backward(dc * (state[1] - g), f),
        tanh_backward(dc * (1 - f), g),
        sigmoid_backward(dnew[0] * tanh_c, o),
    )
    return d, d, (tl.zeros_like(dc), dc * f)
