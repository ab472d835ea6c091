"""The GEMMs and sums around a recurrence, over all its T*B rows at once."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fusedrnn.backends.backend import Gradients, Wanted, Weights


class Recurrent(NamedTuple):
    """What a recurrence leaves behind in forward and backward, and its GEMMs take."""

    h_prev: Tensor  # [T,B,P] the h that entered each step, 0 where none was computed
    m: Tensor  # [T,B,H] the output before projection, if there is one
    dgx: Tensor  # [T,B,G*H]
    dgh: Tensor  # [T,B,G*H], the same tensor as dgx for an additive cell
    dh: Tensor | None  # [T,B,P] the whole gradient of each h, with a projection
    dh0: Tensor  # [B,P]
    dc0: Tensor  # [S-1,B,H]
    dparams: Tensor | None = None  # [K,H]


class Product(Protocol):
    """``a @ b (+ bias)`` of matrices, rounded once."""

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor: ...


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own."""
    return a @ b if bias is None else torch.addmm(bias, a, b)


def inputs(x: Tensor, weights: Weights, additive: bool, product: Product) -> Tensor:
    """``gx [T,B,G*H]``, with both biases if they only meet as a sum."""
    bias = weights.b_ih
    if additive and weights.b_hh is not None:
        bias = weights.b_hh if bias is None else bias + weights.b_hh
    gx = product(x.flatten(0, 1), weights.w_ih.t(), bias)
    return gx.view(*x.shape[:2], gx.shape[1])


def gradients(
    x: Tensor, weights: Weights, run: Recurrent, wanted: Wanted, product: Product
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
    if wanted.w_hr and run.dh is not None:
        dw_hr = product(run.dh.flatten(0, 1).t(), run.m.flatten(0, 1))
    return Gradients(
        dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, run.dparams, *(None,) * 4, run.dh0, run.dc0
    )
