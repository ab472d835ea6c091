"""What a program owns, a tile of rows and units, and what it does with planes of it alone.

Planes are blocks ``[BLOCK_B, BLOCK_H]``; a tuple of them goes with its length, ``N``. Names as in
kernels.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """What a program owns."""

    row: tl.tensor  # the first one, of 64 bits; offsets are from there, and of 32
    i_h: tl.tensor  # which of those that share the rows it is
    o_b: tl.tensor  # [BLOCK_B]
    o_h: tl.tensor  # [BLOCK_H]
    rows: tl.tensor  # [BLOCK_B] those there are
    units: tl.tensor  # [BLOCK_H]
    mask: tl.tensor  # [BLOCK_B, BLOCK_H]
    plane: tl.tensor  # [BLOCK_B, BLOCK_H] in [B,H]
    gates: tl.tensor  # [BLOCK_B, BLOCK_H] in [B,G*H]
    length: tl.tensor  # [BLOCK_B] steps of each row


@triton.jit
def tile_of(
    i_b, i_h, lengths, T, B, G: tl.constexpr, H: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = i_b.to(tl.int64) * BLOCK_B
    o_b, o_h = tl.arange(0, BLOCK_B), i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = row + o_b < B, o_h < H
    length = tl.zeros((BLOCK_B,), tl.int32) + T
    if lengths is not None:
        given = tl.load(lengths + row + o_b, mask=rows, other=0)
        length = tl.minimum(given, T).to(tl.int32)
    mask = rows[:, None] & units[None, :]
    plane = o_b[:, None] * H + o_h[None, :]
    gates = o_b[:, None] * (G * H) + o_h[None, :]
    return Tile(row, i_h, o_b, o_h, rows, units, mask, plane, gates, length)


@triton.jit
def load_planes(p, stride, mask, N: tl.constexpr, DTYPE: tl.constexpr):
    """N blocks that lie ``stride`` apart, 0 where masked."""
    out = ()
    for n in tl.static_range(N):
        out += (tl.load(p + n * stride, mask=mask, other=0).to(DTYPE),)
    return out


@triton.jit
def load_of_units(p, tile, N: tl.constexpr, H: tl.constexpr, DTYPE: tl.constexpr):
    """N rows ``[1, BLOCK_H]`` of an array [N,H]."""
    out = ()
    for n in tl.static_range(N):  # p may be None if N is 0
        out += load_planes(p + n * H + tile.o_h[None, :], 0, tile.units[None, :], 1, DTYPE)
    return out


@triton.jit
def store_planes(p, stride, values, on, mask, N: tl.constexpr):
    """N blocks, 0 in the rows that are not ``on``."""
    for n in tl.static_range(N):
        value = tl.where(on[:, None], values[n], 0)
        tl.store(p + n * stride, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def select(on, values, others, N: tl.constexpr):
    """``values`` in the rows that are ``on``, else ``others``."""
    out = ()
    for n in tl.static_range(N):
        out += (tl.where(on[:, None], values[n], others[n]),)
    return out


@triton.jit
def add(values, others, N: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out += (values[n] + others[n],)
    return out


@triton.jit
def multiply(values, others, N: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out += (values[n] * others[n],)
    return out


@triton.jit
def sum_of_row(values, N: tl.constexpr):
    """[BLOCK_B]"""
    sum = tl.sum(values[0], 1)
    for n in tl.static_range(1, N):
        sum += tl.sum(values[n], 1)
    return sum


@triton.jit
def zeros(N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, DTYPE: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out += (tl.zeros((BLOCK_B, BLOCK_H), DTYPE),)
    return out


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x`` as products take it: tf32 is made here, to nearest and ties away from zero, for tensor
    cores would cut it."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def add_product(sum, a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, sum, input_precision=PRECISION, out_dtype=sum.dtype)


@triton.jit
def load_weights(p, o_k, in_k, tile, stride, PRECISION: tl.constexpr):
    """``[BLOCK_K, BLOCK_H]``: what the units of a tile have in rows that lie ``stride`` apart."""
    mask = in_k[:, None] & tile.units[None, :]
    w = tl.load(p + o_k[:, None] * stride + tile.o_h[None, :], mask=mask, other=0)
    return operand(w, PRECISION)


@triton.jit
def add_products(
    sums, p, on, w, tile, stride, K: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sums`` and the products of rows of K numbers at ``p [BLOCK_B]`` with N planes of w, which
    lie H apart in its rows, ``stride`` apart."""
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        in_k = o_k < K
        a = tl.load(p[:, None] + o_k[None, :], mask=on[:, None] & in_k[None, :], other=0)
        a = operand(a, PRECISION)
        out = ()
        for n in tl.static_range(N):
            of_plane = load_weights(w + n * H, o_k, in_k, tile, stride, PRECISION)
            out += (add_product(sums[n], a, of_plane, PRECISION),)
        sums = out
    return sums


@triton.jit
def factors_of(dropout, tile, H: tl.constexpr):
    """Those of the tile's own h on its way into W_hh, or None."""
    factors = None
    if dropout is not None:
        factors = tl.load(dropout + tile.row * H + tile.plane, mask=tile.mask, other=0)
    return factors


@triton.jit
def entering(h, factors, DTYPE: tl.constexpr):
    """What of the tile's own h goes into products, rounded as they find it."""
    if factors is not None:
        h *= factors
    return h.to(DTYPE).to(h.dtype)


@triton.jit
def cuts(resets, t, T, B, tile, REVERSE: tl.constexpr):
    """The rows in which nothing passes from the step before, in the direction, into step t."""
    begins = t + 1 if REVERSE else t
    if resets is None:
        cut = tile.o_b < 0
    else:
        p = resets + tl.cast(begins, tl.int64) * B + tile.row
        cut = tl.load(p + tile.o_b, mask=tile.rows & (begins < T), other=0).to(tl.float32) != 0
    return cut


@triton.jit
def share(renew, rate, o, mask, DTYPE: tl.constexpr):
    """Of the new value in a state, the rest being of the old one."""
    if renew is None:
        out = tl.cast(rate, DTYPE)
    else:
        out = tl.load(renew + o, mask=mask, other=0).to(DTYPE)
    return out


@triton.jit
def shares(renew_h, renew_c, rate_h, rate_c, o, mask, S: tl.constexpr, DTYPE: tl.constexpr):
    """Of the states that have zones, h and c."""
    out = (share(renew_h, rate_h, o, mask, DTYPE),)
    if S > 1:
        out += (share(renew_c, rate_c, o, mask, DTYPE),)
    return out
