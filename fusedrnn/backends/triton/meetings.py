"""Where programs that share rows meet within a launch, and layer norm, for which they meet within a
step. Names as in kernels.py."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedrnn.backends.reference import NORM_EPSILON
from fusedrnn.backends.triton.tiles import multiply, sum_of_row

EPSILON = tl.constexpr(NORM_EPSILON)


@triton.jit
def arrive(p_counter):
    """What the program stored before is there for those that have waited."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release")


@triton.jit
def wait(p_counter, arrivals):
    while tl.atomic_add(p_counter, 0, sem="acquire") < arrivals:
        pass
    tl.debug_barrier()


class Meeting(NamedTuple):
    """Of the programs of some rows, within a step."""

    counter: tl.tensor
    arrivals: tl.tensor  # after all have come
    numbers: tl.tensor  # [N_H,2,B] of type COMPUTE, not used by the next meeting


@triton.jit
def meeting(counters, numbers, i_b, s, k: tl.constexpr, B, N_H: tl.constexpr, WITHIN: tl.constexpr):
    """The k-th of step s, from 1; the one after them all ends the step."""
    out = None
    if N_H > 1:
        arrivals = N_H * (s * (WITHIN + 1) + k)
        out = Meeting(counters + i_b, arrivals, numbers + (k - 1) * 2 * N_H * tl.cast(B, tl.int64))
    return out


@triton.jit
def of_all_programs(first, second, meeting, tile, B, N_H: tl.constexpr):
    """Two numbers a row [BLOCK_B] of each program, as two [N, BLOCK_B], 0 from N_H on."""
    p = meeting.numbers + tile.row + tile.o_b
    tl.store(p + tile.i_h * 2 * B, first, mask=tile.rows)
    tl.store(p + (tile.i_h * 2 + 1) * B, second, mask=tile.rows)
    arrive(meeting.counter)
    wait(meeting.counter, meeting.arrivals)
    o_n = tl.arange(0, triton.next_power_of_2(N_H))[:, None]
    p = meeting.numbers + tile.row + tile.o_b[None, :] + o_n * 2 * B
    on = (o_n < N_H) & tile.rows[None, :]
    return tl.load(p, mask=on, other=0), tl.load(p + B, mask=on, other=0)


@triton.jit
def normalised(
    values, meeting, tile, B, H: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``values`` less their mean over their standard deviation, those that N planes have in a row
    together; and one over that deviation [BLOCK_B]. What is squared lies about a mean: of squares
    less that of the mean little might remain."""
    N_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    mean = sum_of_row(values, N) / (N * tl.minimum(H - tile.i_h * BLOCK_H, BLOCK_H))
    deltas = ()
    for n in tl.static_range(N):
        deltas += (tl.where(tile.units[None, :], values[n] - mean[:, None], 0),)
    squares = sum_of_row(multiply(deltas, deltas, N), N)
    if N_H > 1:
        means, of_each = of_all_programs(mean, squares, meeting, tile, B, N_H)
        o_n = tl.arange(0, triton.next_power_of_2(N_H))
        counts = (N * tl.maximum(tl.minimum(H - o_n * BLOCK_H, BLOCK_H), 0))[:, None]
        own, mean = mean, tl.sum(counts * means, 0) / (N * H)
        means -= mean[None, :]
        squares = tl.sum(of_each + counts * means * means, 0)
        others = ()
        for n in tl.static_range(N):
            others += (deltas[n] + (own - mean)[:, None],)
        deltas = others
    scale = 1 / tl.sqrt(squares / (N * H) + EPSILON)
    hats = ()
    for n in tl.static_range(N):
        hats += (deltas[n] * scale[:, None],)
    return hats, scale


@triton.jit
def of_normalised(
    d, hats, scale, meeting, tile, B, H: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of what was normalised, from ``d`` of the hats."""
    N_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    alone, times_hats = sum_of_row(d, N), sum_of_row(multiply(d, hats, N), N)
    if N_H > 1:
        alone, times_hats = of_all_programs(alone, times_hats, meeting, tile, B, N_H)
        alone, times_hats = tl.sum(alone, 0), tl.sum(times_hats, 0)
    alone, times_hats = alone[:, None] / (N * H), times_hats[:, None] / (N * H)
    out = ()
    for n in tl.static_range(N):
        out += (scale[:, None] * (d[n] - alone - hats[n] * times_hats),)
    return out


@triton.jit
def store_scale(p, scale, active, tile):
    """One program of a row does it."""
    tl.store(p + tile.o_b, tl.where(active, scale, 0), mask=tile.rows & (tile.i_h == 0))
