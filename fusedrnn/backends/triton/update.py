"""The cell alone, for one step: gates to states, forward and backward, element by element.

It is for cells of two states h and c whose step does not read h. Names as in kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedrnn.backends.triton.tiles import load_planes

elementwise = triton.jit(do_not_specialize=["N"])


@triton.jit
def positions(N, H, G: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the N elements of [B,H]: offsets there and in [B,G,H], and which there are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i // H * (G * H) + i % H, i < N


@elementwise
def update(
    gates,  # [B,G,H] what reaches the gates from x and h together
    c,  # [B,H]
    h_new,  # [B,H]
    c_new,  # [B,H]
    N,  # B*H
    H,
    CELL: tl.constexpr,
    G: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of a cell with the states h, which it does not read, and c."""
    o, o_gates, mask = positions(N, H, G, BLOCK)
    x = load_planes(gates + o_gates, H, mask, G, COMPUTE)
    before = load_planes(c + o, 0, mask, 1, COMPUTE)[0]
    none = tl.zeros_like(before)
    new, _ = CELL(x, (none,) * G, (none, before))
    tl.store(h_new + o, new[0].to(h_new.dtype.element_ty), mask=mask)
    tl.store(c_new + o, new[1].to(c_new.dtype.element_ty), mask=mask)


@elementwise
def update_backward(
    gates,  # [B,G,H]
    c,  # [B,H]
    dh_new,  # [B,H] or None
    dc_new,  # [B,H] or None
    dgates,  # [B,G,H]
    dc,  # [B,H]
    N,
    H,
    CELL: tl.constexpr,  # forward, whose planes are made anew
    BACKWARD: tl.constexpr,
    G: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o, o_gates, mask = positions(N, H, G, BLOCK)
    x = load_planes(gates + o_gates, H, mask, G, COMPUTE)
    before = load_planes(c + o, 0, mask, 1, COMPUTE)[0]
    none = tl.zeros_like(before)
    d_h, d_c = none, none
    if dh_new is not None:
        d_h = load_planes(dh_new + o, 0, mask, 1, COMPUTE)[0]
    if dc_new is not None:
        d_c = load_planes(dc_new + o, 0, mask, 1, COMPUTE)[0]
    _, kept = CELL(x, (none,) * G, (none, before))
    d_x, _, d_before = BACKWARD((none, before), kept, (d_h, d_c))
    for g in tl.static_range(G):
        tl.store(dgates + g * H + o_gates, d_x[g].to(dgates.dtype.element_ty), mask=mask)
    tl.store(dc + o, d_before[1].to(dc.dtype.element_ty), mask=mask)
