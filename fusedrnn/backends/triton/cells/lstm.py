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
def output(saved, c):
    return saved[-1] * tanh(c)


@triton.jit
def backward_of_output(saved, c, dh):
    tanh_c = tanh(c)
    return sigmoid_backward(dh * tanh_c, saved[-1]), tanh_backward(dh * saved[-1], tanh_c)


@triton.jit
def backward_of_gates(state, saved, do, dc):
    i, f, g, _ = saved
    di, df = sigmoid_backward(dc * g, i), sigmoid_backward(dc * state[1], f)
    d = di, df, tanh_backward(dc * i, g), do
    return d, d, (tl.zeros_like(dc), dc * f)


@triton.jit
def backward(state, saved, dnew):
    i, f, g, _ = saved
    do, dc = backward_of_output(saved, f * state[1] + i * g, dnew[0])
    return backward_of_gates(state, saved, do, dnew[1] + dc)
