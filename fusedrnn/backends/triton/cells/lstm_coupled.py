"""The LSTM with coupled gates; equations and gate order in :mod:`fusedrnn.cells.lstm`.

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
def forward(gx, gh, state):
    f, g, o = sigmoid(gx[0] + gh[0]), tanh(gx[1] + gh[1]), sigmoid(gx[2] + gh[2])
    c = f * state[1] + (1 - f) * g
    return (o * tanh(c), c), (f, g, o)


@triton.jit
def backward_of_gates(state, saved, do, dc):
    f, g, _ = saved
    d = sigmoid_backward(dc * (state[1] - g), f), tanh_backward(dc * (1 - f), g), do
    return d, d, (tl.zeros_like(dc), dc * f)


@triton.jit
def backward(state, saved, dnew):
    f, g, _ = saved
    do, dc = backward_of_output(saved, f * state[1] + (1 - f) * g, dnew[0])
    return backward_of_gates(state, saved, do, dnew[1] + dc)
