"""The GRU whose reset gate comes before the product; equations and gate order in
:mod:`fusedrnn.cells.gru`. Saved: the activated gates."""

import triton

from fusedrnn.backends.triton.cells.numeric import (
    sigmoid,
    sigmoid_backward,
    tanh,
    tanh_backward,
)


@triton.jit
def factor(gx, gh, state):
    return sigmoid(gx[0] + gh[0])


@triton.jit
def forward(gx, gh, state):
    z, n = sigmoid(gx[1] + gh[1]), tanh(gx[2] + gh[2])
    return (n + z * (state[0] - n),), (factor(gx, gh, state), z, n)


@triton.jit
def backward_of_late(state, saved, dnew):
    _, z, n = saved
    return (tanh_backward(dnew[0] * (1 - z), n),)


@triton.jit
def backward(state, saved, dnew, dfactor):
    r, z, n = saved
    dz = sigmoid_backward(dnew[0] * (state[0] - n), z)
    d = (sigmoid_backward(dfactor, r), dz) + backward_of_late(state, saved, dnew)
    return d, d, (dnew[0] * z,)
