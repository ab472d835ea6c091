"""The reference: the recurrence as a loop of plain PyTorch operations, differentiated by autograd.

It runs on every device and dtype, under every transform (torch.func, forward-mode AD, double
backward), and is what all other backends are tested against. In float16 and bfloat16 it rounds
what a layer stores (x, weights, h, what dropout leaves of it), and computes everything else, c
included, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.backends.backend import Call, Noise, Request
from fusedrnn.cells import Cell

States = list[tuple[Tensor, ...]]  # made by each step, by time


class _Watched(threading.local):
    runs: list[tuple[Call, States]] | None = None


_watched = _Watched()


@contextmanager
def watched() -> Iterator[list[tuple[Call, States]]]:
    """Each recurrence of this thread meanwhile, all by the reference, and the states that autograd
    knows."""
    before, _watched.runs = _watched.runs, []
    try:
        yield _watched.runs
    finally:
        _watched.runs = before


def is_watched() -> bool:
    return _watched.runs is not None


class Reference:
    name = "reference"
    reads_padding = False
    runs_both = False

    def supports(self, request: Request) -> str | None:
        if request.layer_norm and request.dtype.is_complex:
            return f"normalises no complex numbers, got {request.dtype}"
        return None

    def algorithm(self, request: Request, rows: int) -> str:
        return "a loop of PyTorch operations"

    def runs_stack(self, request: Request) -> bool:
        return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products, sums and states: float32 for the 16-bit storage types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def recurrence(call: Call) -> tuple[Tensor, ...]:
    """``y, h_n`` then ``c_n`` and ``c`` as they apply, in the shapes of :class:`Run`."""
    cell, x, weights, h0, c0, seq, reverse, cell_states, noise = call
    x = seq.without_padding(x)
    storage, compute = x.dtype, compute_dtype(x.dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr, params, *norms = (
        None if w is None else w.to(compute) for w in weights
    )
    assert w_ih is not None and w_hh is not None
    steps, planes = x.shape[0], (len(cell.gates), w_hh.shape[0] // len(cell.gates))
    gx = _gates(x.to(compute), w_ih, b_ih, norms[0]).unflatten(-1, planes)
    state = (h0.to(compute), *(() if c0 is None else c0.to(compute).unbind(0)))
    anew = (x.new_zeros((), dtype=compute),) * len(state)
    if seq.h_reset is not None:
        others = () if seq.c_reset is None else seq.c_reset.to(compute).unbind(0)
        anew = (seq.h_reset.to(compute), *others)
    of_units = () if params is None else (params.unbind(0),)
    inside: dict[str, Any] = {}
    early = late = w_hh, b_hh
    if cell.late:
        rows = w_hh.shape[0] - cell.late * planes[1]
        early, late = ((w_hh[some], None if b_hh is None else b_hh[some])
                       for some in (slice(rows), slice(rows, None)))  # fmt: skip
    if norms[2] is not None:
        inside["norm"] = partial(F.layer_norm, normalized_shape=planes[1:], weight=norms[2],
                                 bias=norms[3], eps=NORM_EPSILON)  # fmt: skip
    states = [state] * steps
    y: list[Tensor] = [x] * steps
    c: list[Tensor] = [x] * steps
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        begins = t + 1 if reverse else t  # a reset there cuts what enters this step
        if seq.resets is not None and begins < steps:
            cut = seq.resets[begins].unsqueeze(-1)
            state = tuple(torch.where(cut, a, s) for a, s in zip(anew, state, strict=True))
        h = state[0]
        if noise.dropout is not None:
            h = (h * noise.dropout).to(storage).to(compute)
        gh = _gates(h, *early, norms[1]).unflatten(-1, (-1, planes[1]))
        if cell.late:
            inside["product"] = partial(_late_gates, h, *late, planes[1])
        new = cell.step(gx[t], gh, state, *of_units, **inside)
        if w_hr is not None:
            new = (F.linear(new[0], w_hr), *new[1:])
        if noise.zoneout:
            new = zoned(noise, t, state, new)
        new = (new[0].to(storage).to(compute), *new[1:])
        y[t], c[t], states[t] = new[0], new[-1], new
        if seq.lengths is not None:
            active = (t < seq.lengths).unsqueeze(-1)
            y[t], c[t] = torch.where(active, y[t], 0), torch.where(active, c[t], 0)
            new = tuple(torch.where(active, n, s) for n, s in zip(new, state, strict=True))
        state = new
    if _watched.runs is not None:
        _watched.runs.append((call, states))
    out = [torch.stack(y), state[0].clone()]  # backward may need what the caller is free to edit
    if c0 is not None:
        out.append(torch.stack(state[1:]))
    if cell_states:
        out.append(torch.stack(c))
    return tuple(o.to(storage) for o in out)


NORM_EPSILON = 1e-5


def _gates(x: Tensor, w: Tensor, b: Tensor | None, gain: Tensor | None) -> Tensor:
    """What reaches the gates of ``x``, which may be normalised before the bias."""
    if gain is None:
        return F.linear(x, w, b)
    gates = F.layer_norm(F.linear(x, w), gain.shape, gain, eps=NORM_EPSILON)
    return gates if b is None else gates + b


def _late_gates(h: Tensor, w: Tensor, b: Tensor | None, hidden: int, factor: Tensor) -> Tensor:
    """What the step of a cell with late gates calls ``product``."""
    late: Tensor = F.linear(factor * h, w, b).unflatten(-1, (-1, hidden))
    return late


def zoned(
    noise: Noise, t: int, state: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The states h and c after zoneout of step t."""
    renewals = ((noise.renew_h, noise.rate_h), (noise.renew_c, noise.rate_c))
    shares = [rate if mask is None else mask[t] for mask, rate in renewals]
    return tuple(s * n + (1 - s) * o for s, n, o in zip(shares, new, state, strict=False))


def cell_update(
    cell: Cell, gates: Tensor, c: Tensor, params: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The elementwise step of a cell with the states h, which it does not read, and c: the new ones
    from ``gates [B,G,H]``, what reaches the gates from x and h together, ``c [B,H]``, which keeps
    its dtype, and the cell's ``params [K,H]``."""
    wide = compute_dtype(gates.dtype)
    none = torch.zeros((), dtype=wide, device=c.device).expand(c.shape)
    x = gates.to(wide)
    of_units = () if params is None else (params.to(wide).unbind(0),)
    h, c_new = cell.step(x, torch.zeros_like(x), (none, c.to(wide)), *of_units)
    return h.to(gates.dtype), c_new.to(c.dtype)
