"""The GEMMs and sums around a recurrence, over all its T*B rows at once."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fusedrnn.backends.backend import Gradients, Wanted, Weights
from fusedrnn.backends.reference import NORM_EPSILON, compute_dtype


class Normalised(NamedTuple):
    """What layer norm makes of rows ``[T,B,N]``."""

    hats: Tensor  # [T,B,N] without mean, over their standard deviation
    scale: Tensor  # [T,B] one over it, in the dtype of computation


class Norms(NamedTuple):
    """Of a recurrence whose products are normalised."""

    of_x: Normalised  # W_ih x
    of_h: Normalised  # W_hh h
    dproduct: Tensor  # [T,B,G*H] the gradient of W_hh h


class Recurrent(NamedTuple):
    """What a recurrence leaves behind in forward and backward, and its GEMMs take; what has no time
    may be in the dtype of computation."""

    h_prev: Tensor  # [T,B,P] the h that entered each step, 0 where none was computed
    m: Tensor  # [T,B,H] the output before projection, if there is one
    dgx: Tensor  # [T,B,G*H]
    dgh: Tensor  # [T,B,G*H], the same tensor as dgx for an additive cell
    dh: Tensor | None  # [T,B,P] the whole gradient of each h, with a projection
    dh0: Tensor  # [B,P]
    dc0: Tensor  # [S-1,B,H]
    dparams: Tensor | None = None  # [K,H]
    norms: Norms | None = None
    late: tuple[Tensor, int] | None = None  # [T,B,P] what the last rows of W_hh see, and how many
    dreset: tuple[Tensor | None, Tensor | None] = None, None  # [P], [S-1,H], if states enter there


class Product(Protocol):
    """``a @ b (+ bias)`` of matrices, rounded once; ``wide``: not to 16 bits."""

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, wide: bool = False
    ) -> Tensor: ...


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """PyTorch's own."""
    if not wide:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    dtype = compute_dtype(a.dtype)
    if a.is_cuda and a.numel() > 0 and b.numel() > 0:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def inputs(x: Tensor, weights: Weights, additive: bool, product: Product) -> Tensor:
    """``gx [T,B,G*H]``, with both biases if they only meet as a sum; without, if it has yet to be
    normalised."""
    bias = None if weights.norm_ih is not None else _bias(weights, additive)
    gx = product(x.flatten(0, 1), weights.w_ih.t(), bias)
    return gx.view(*x.shape[:2], gx.shape[1])


def _bias(weights: Weights, additive: bool) -> Tensor | None:
    bias = weights.b_ih
    if additive and weights.b_hh is not None:
        bias = weights.b_hh if bias is None else bias + weights.b_hh
    return bias


def normalised(gx: Tensor, weights: Weights, additive: bool) -> tuple[Tensor, Normalised]:
    """``LN(gx) * norm_ih`` and the biases that :func:`inputs` left out."""
    bias, wide = _bias(weights, additive), compute_dtype(gx.dtype)
    assert weights.norm_ih is not None
    hats, _, scale = torch.native_layer_norm(gx.to(wide), gx.shape[2:], None, None, NORM_EPSILON)
    found = Normalised(hats.to(gx.dtype), scale.squeeze(-1))
    gx = hats * weights.norm_ih if bias is None else torch.addcmul(bias, hats, weights.norm_ih)
    return gx.to(found.hats.dtype), found


def of_normalised(d: Tensor, of: Normalised, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised and of the gain, from ``d`` of both together."""
    dx, dgain = _of_layer_norm(d, of, gain, True)
    return (dx * of.scale.unsqueeze(-1)).to(d.dtype), dgain


def _of_layer_norm(d: Tensor, of: Normalised, gain: Tensor, want_x: bool) -> tuple[Tensor, Tensor]:
    """That of the hats, in the dtype of computation, is less what passes through mean and scale."""
    wide = of.scale.dtype
    none, one = (torch.full_like(of.scale, n).unsqueeze(-1) for n in (0, 1))
    dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
        d.to(wide), of.hats.to(wide), d.shape[2:], none, one, gain.to(wide), None,
        (want_x, True, False),
    )  # fmt: skip
    return dx, dgain


def scaled(upstream: tuple[Tensor | None, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """The gradients of a run's outputs as its backward should get them, and what they were
    multiplied by, if at all: in float16, where those of gates may be too small to be told from 0, a
    power of two that brings the largest one to between 1/2 and 1, or 1 if it is not smaller."""
    given = [d for d in upstream if d is not None and d.numel() > 0]
    if not given or given[0].dtype != torch.float16:
        return None, upstream
    largest = torch.stack([torch.linalg.vector_norm(d, math.inf) for d in given]).amax()
    # 2^e has the exponent field e + 127. The scale, too, must be a number of float16.
    field = (largest.float().view(torch.int32) >> 23).clamp(127 - 16, 127 - 1)
    scale = ((253 - field) << 23).view(torch.float32)
    return scale, tuple(None if d is None else d * scale for d in upstream)


def gradients(
    x: Tensor,
    weights: Weights,
    run: Recurrent,
    wanted: Wanted,
    product: Product,
    scale: Tensor | None = None,
) -> Gradients:
    """All gradients: one GEMM or sum for each of x, weights and biases, without atomics.

    ``scale``: what those of the run were multiplied by, see :func:`scaled`.
    """
    if scale is not None:
        product = functools.partial(product, wide=True)
    sums = None if scale is None else torch.float32
    rows_ih, rows_hh = run.dgx.flatten(0, 1), run.dgh.flatten(0, 1)
    dx = dw_ih = dw_hh = db_ih = db_hh = dw_hr = dnorm_ih = dnorm_hh = None
    of_x, of_h = rows_ih, rows_hh
    if run.norms is not None:
        assert weights.norm_ih is not None and weights.norm_hh is not None
        dgx, dnorm_ih = of_normalised(run.dgx, run.norms.of_x, weights.norm_ih)
        _, dnorm_hh = _of_layer_norm(run.dgh, run.norms.of_h, weights.norm_hh, False)
        of_x, of_h = dgx.flatten(0, 1), run.norms.dproduct.flatten(0, 1)
    if wanted.x:
        dx = product(of_x, weights.w_ih).view_as(x)
    if wanted.w_ih:
        dw_ih = product(of_x.t(), x.flatten(0, 1))
    if wanted.w_hh and run.late is not None:
        h_late, rows = run.late
        parts = (of_h[:, :-rows], run.h_prev), (of_h[:, -rows:], h_late)
        dw_hh = torch.cat([product(d.t(), h.flatten(0, 1)) for d, h in parts])
    elif wanted.w_hh:
        dw_hh = product(of_h.t(), run.h_prev.flatten(0, 1))
    if wanted.b_ih:
        db_ih = rows_ih.sum(0, dtype=sums)
    if wanted.b_hh:
        same = db_ih if run.dgx is run.dgh else None
        db_hh = rows_hh.sum(0, dtype=sums) if same is None else same.clone()
    if wanted.w_hr and run.dh is not None:
        dw_hr = product(run.dh.flatten(0, 1).t(), run.m.flatten(0, 1))
    found: tuple[Tensor | None, ...] = (
        dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, run.dparams, dnorm_ih, dnorm_hh, None, None,
        run.dh0, run.dc0, *run.dreset,
    )  # fmt: skip
    if scale is not None:
        found = tuple(None if d is None else d / scale for d in found)
    return Gradients(*(None if d is None else d.to(x.dtype) for d in found))
