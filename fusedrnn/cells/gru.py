"""GRU (Cho et al. 2014) with the reset gate after the product, as torch.nn and cuDNN; gates r z n.

``r z = s(gx + gh)``; ``n = tanh(gx_n + r * gh_n)``; ``h = (1 - z) * n + z * h_prev``.
With layer norm (Ba et al. 2016) ``gx = LN(W_ih x) + b_ih`` and ``gh = LN(W_hh h) + b_hh``, each
over all gates' units together.
"""

from __future__ import annotations

from torch import Tensor

from fusedrnn.cells.cell import Cell, Keep, keep


def step(
    gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], keep: Keep = keep
) -> tuple[Tensor, ...]:
    xr, xz, xn = gx.unbind(-2)
    hr, hz, hn = gh.unbind(-2)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    r, z, n, hn = keep(r, z, n, hn)
    return (n + z * (state[0] - n),)


GRU = Cell(
    "gru",
    gates="rzn",
    states="h",
    saved=4,
    additive=False,
    step=step,
    triton="fusedrnn.backends.triton.cells.gru",
)
