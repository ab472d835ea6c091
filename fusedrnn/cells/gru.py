"""GRU (Cho et al. 2014), gates r z n.

``r z = s(gx + gh)``; ``h = (1 - z) * n + z * h_prev``. The reset gate comes after the product, as
in torch.nn and cuDNN, ``n = tanh(gx_n + r * gh_n)``, or before it, as in the paper, ``n = tanh(gx_n
+ W_hn (r * h_prev) + b_hn)``.
With layer norm (Ba et al. 2016) ``gx = LN(W_ih x) + b_ih`` and ``gh = LN(W_hh h) + b_hh``, each
over all gates' units together.
"""

from __future__ import annotations

from torch import Tensor

from fusedrnn.cells.cell import Cell, Keep, Product, keep


def step(
    gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], keep: Keep = keep
) -> tuple[Tensor, ...]:
    xr, xz, xn = gx.unbind(-2)
    hr, hz, hn = gh.unbind(-2)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    r, z, n, hn = keep(r, z, n, hn)
    return (n + z * (state[0] - n),)


def step_reset_before(
    gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], product: Product, keep: Keep = keep
) -> tuple[Tensor, ...]:
    xr, xz, xn = gx.unbind(-2)
    hr, hz = gh.unbind(-2)
    r, z = keep((xr + hr).sigmoid(), (xz + hz).sigmoid())
    (n,) = keep((xn + product(r).squeeze(-2)).tanh())
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
GRU_RESET_BEFORE = Cell(
    "gru_reset_before",
    gates="rzn",
    states="h",
    step=step_reset_before,
    late=1,
    triton="fusedrnn.backends.triton.cells.gru_reset_before",
)


def gru(*, reset_after: bool) -> Cell:
    return GRU if reset_after else GRU_RESET_BEFORE
