"""The GEMMs and sums around a recurrence, over all its T*B rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fusedrnn.backends.backend import Gradients, Wanted, Weights


class Recurrent(NamedTuple):
    """What a recurrence leaves behind in forward and backward, and its GEMMs take."""

    h_prev: Tensor  # [T,B,P] the h that entered each step, 0 where none was computed
    m: Tensor  # [T,B,H] the output before projection, if there is one
    dgx: Tensor  # [T,B,G*H]
    dgh: Tensor  # [T,B,G*H], the same tensor as dgx for an additive cell
    dh: Tensor  # [T,B,P] the whole gradient of each h, with a projection
    dh0: Tensor  # [B,P]
    dc0: Tensor  # [S-1,B,H]


def gradients(
    x: Tensor,
    weights: Weights,
    run: Recurrent,
    wanted: Wanted,
    product: Callable[[Tensor, Tensor], Tensor],
) -> Gradients:
    """All gradients: one GEMM or sum for each of x, weights and biases, without atomics."""
    rows_ih, rows_hh = run.dgx.flatten(0, 1), run.dgh.flatten(0, 1)
    dx = dw_ih = dw_hh = db_ih = db_hh = dw_hr = None
    if wanted.x:
        dx = product(rows_ih, weights.w_ih).view_as(x)
    if wanted.w_ih:
        dw_ih = product(rows_ih.t(), x.flatten(0, 1))
    if wanted.w_hh:
        dw_hh = product(rows_hh.t(), run.h_prev.flatten(0, 1))
    if wanted.b_ih:
        db_ih = rows_ih.sum(0)
    if wanted.b_hh:
        db_hh = db_ih.clone() if run.dgx is run.dgh and db_ih is not None else rows_hh.sum(0)
    if wanted.w_hr:
        dw_hr = product(run.dh.flatten(0, 1).t(), run.m.flatten(0, 1))
    return Gradients(dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, run.dh0, run.dc0)
