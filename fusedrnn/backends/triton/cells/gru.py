"""The GRU; equations and gate order in :mod:`fusedrnn.cells.gru`. Saved: r, z, n and ``gh_n``."""

import triton

from fusedrnn.backends.triton.cells.numeric import (
    sigmoid,
    sigmoid_backward,
    tanh,
    tanh_backward,
)


@triton.jit
def forward(gx, gh, state):
    r, z = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
    n = tanh(gx[2] + r * gh[2])
    return (n + z * (state[0] - n),), (r, z, n, gh[2])


@triton.jit
def backward(state, saved, dnew):
    r, z, n, hn = saved
    dn = tanh_backward(dnew[0] * (1 - z), n)
    dr = sigmoid_backward(dn * hn, r)
    dz = sigmoid_backward(dnew[0] * (state[0] - n), z)
    return (dr, dz, dn), (dr, dz, dn * r), (dnew[0] * z,)
