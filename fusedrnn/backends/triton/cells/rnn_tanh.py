"""The Elman RNN with tanh; equations in :mod:`fusedrnn.cells.rnn`."""

import triton
import triton.language as tl

from fusedrnn.backends.triton.cells.numeric import tanh, tanh_backward


@triton.jit
def forward(gx, gh, state):
    h = tanh(gx[0] + gh[0])
    return (h,), (h,)


@triton.jit
def backward(state, saved, dnew):
    d = (tanh_backward(dnew[0], saved[0]),)
    return d, d, (tl.zeros_like(dnew[0]),)
