"""A stack: layers and directions over one sequence. It knows no cell by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrnn.backends import Request, Sequence, Weights, select
from fusedrnn.cells import Cell
from fusedrnn.recurrence import recurrence


class Stack(NamedTuple):
    y: Tensor  # [T,B,D*P]
    h_n: Tensor  # [L*D,B,P]
    c_n: Tensor | None  # [S-1,L*D,B,H]
    c: Tensor | None  # [T,B,D*H] of the last layer


def request_of(cell: Cell, x: Tensor, weights: Weights) -> Request:
    hidden = weights.w_hh.shape[0] // len(cell.gates)
    proj = 0 if weights.w_hr is None else weights.w_hr.shape[0]
    return Request(cell, x.dtype, x.device.type, hidden, proj)


def run_layers(
    cell: Cell,
    x: Tensor,
    weights: list[Weights],
    h0: Tensor,
    c0: Tensor | None,
    seq: Sequence,
    directions: int,
    cell_states: bool,
    between: Callable[[Tensor], Tensor],
    wish: tuple[str, ...],
) -> Stack:
    """Runs the stack over ``x [T,B,I]``.

    Args:
        weights: of each layer and direction, in torch.nn's order.
        h0: ``[L*D,B,P]``; c0: ``[S-1,L*D,B,H]``, or None if h is the only state.
        between: what happens to the output of every layer but the last (dropout).
        wish: the backends to try, in order; empty: the context's or the default.
    """
    backend = select(request_of(cell, x, weights[0]), wish)
    if seq.lengths is not None:
        steps = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
        x = x.masked_fill((steps >= seq.lengths).unsqueeze(-1), 0)  # padding may hold NaN
    layers = len(weights) // directions
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    y = x
    c = None
    for layer in range(layers):
        ys: list[Tensor] = []
        cs: list[Tensor] = []
        ask = cell_states and layer == layers - 1
        for direction in range(directions):
            k = layer * directions + direction
            out = recurrence(
                cell, backend, y, weights[k], h0[k], None if c0 is None else c0[:, k],
                seq, direction == 1, ask,
            )  # fmt: skip
            ys.append(out[0])
            h_n.append(out[1])
            c_n.extend(out[2:3] if c0 is not None else ())
            cs.extend(out[-1:] if ask else ())
        y = ys[0] if directions == 1 else torch.cat(ys, -1)
        if ask:
            c = cs[0] if directions == 1 else torch.cat(cs, -1)
        if layer < layers - 1:
            y = between(y)
    return Stack(y, torch.stack(h_n), torch.stack(c_n, 1) if c_n else None, c)
