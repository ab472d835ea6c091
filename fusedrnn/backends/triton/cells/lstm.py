"""The LSTM; equations and gate order in :mod:`fusedrnn.cells.lstm`. Saved: the activated gates."""

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
    i, f = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
    g, o = tanh(gx[2] + gh[2]), sigmoid(gx[3] + gh[3])
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def backward(state, saved, dnew):
    i, f, g, o = saved
    tanh_c = tanh(f * state[1] + i * g)
    dc = dnew[1] + tanh_backward(dnew[0] * o, tanh_c)
    d = (
        sigmoid_backward(dc * g, i),
        sigmoid_backward(dc * state[1], f),
        tanh_backward(dc * i, g),
        sigmoid_backward(dnew[0] * tanh_c, o),
    )
    return d, d, (tl.zeros_like(dc), dc * f)
