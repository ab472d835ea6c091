"""A stack: layers and directions over one sequence. It knows no cell by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fusedrnn.backends import (
    Backend,
    Call,
    Noise,
    Reference,
    Request,
    Sequence,
    Stacks,
    Weights,
    select,
)
from fusedrnn.cells import Cell
from fusedrnn.recurrence import is_inference, recurrence, recurrences

Between = Callable[[Tensor], Tensor] | None


class Stack(NamedTuple):
    y: Tensor  # [T,B,D*P]
    h_n: Tensor  # [L*D,B,P]
    c_n: tuple[Tensor, ...]  # S-1 tensors [L*D,B,H]: the states beside h
    c: Tensor | None  # [T,B,D*H] of the last layer


def request_of(
    cell: Cell,
    x: Tensor,
    weights: Weights,
    seq: Sequence,
    noise: Noise,
    cell_states: bool,
    recompute: str = "none",
    bidirectional: bool = False,
) -> Request:
    hidden = weights.w_hh.shape[0] // len(cell.gates)
    proj = 0 if weights.w_hr is None else weights.w_hr.shape[0]
    empty = not torch.compiler.is_compiling() and x.numel() == 0
    return Request(
        cell, x.dtype, x.device, hidden, proj, seq.lengths is not None, seq.resets is not None,
        seq.h_reset is not None, cell_states, empty,
        recurrent_dropout=noise.dropout is not None, zoneout=noise.zoneout,
        layer_norm=weights.norm_ih is not None, recompute=recompute, bidirectional=bidirectional,
    )  # fmt: skip


def run_layers(
    cell: Cell,
    x: Tensor,
    weights: list[Weights],
    hx: tuple[Tensor, ...],
    seq: Sequence,
    noise: list[Noise],
    directions: int,
    cell_states: bool,
    between: Between,
    wish: tuple[str, ...],
    recompute: str = "none",
) -> Stack:
    """Runs the stack over ``x [T,B,I]``.

    Args:
        weights: of each layer and direction, in torch.nn's order.
        hx: S tensors, ``[L*D,B,P]`` and the states beside h ``[L*D,B,H]``.
        seq: its states are ``[L*D,P]`` and ``[S-1,L*D,H]``.
        noise: of each layer and direction.
        between: what happens to the output of every layer but the last (dropout); None: nothing.
        wish: the backends to try, in order; empty: the context's or the default.
        recompute: what backward recomputes, see :mod:`fusedrnn.recompute`.
    """
    kept = recompute if torch.is_grad_enabled() else "none"
    both = directions == 2
    request = request_of(cell, x, weights[0], seq, noise[0], cell_states, kept, both)
    backend = select(request, wish)
    if backend.reads_padding:
        x = seq.without_padding(x)
    if between is None and _runs_at_once(backend, request, x, weights, hx):
        y, h, *beside = cast(Stacks, backend).forward_stack(cell, x, weights, hx, seq)
        return Stack(y, h, tuple(beside), None)
    layers, own = len(weights) // directions, seq
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    y = x
    c = None
    for layer in range(layers):
        calls: list[Call] = []
        ys: list[Tensor] = []
        cs: list[Tensor] = []
        ask = cell_states and layer == layers - 1
        for direction in range(directions):
            k = layer * directions + direction
            c_0 = beside_h(tuple(s[k] for s in hx))
            if seq.h_reset is not None:
                c_reset = None if seq.c_reset is None else seq.c_reset[:, k]
                own = seq.with_states(seq.h_reset[k], c_reset)
            calls.append(
                Call(cell, y, weights[k], hx[0][k], c_0, own, direction == 1, ask, noise[k])
            )
        for out in recurrences(backend, calls, recompute):
            ys.append(out[0])
            h_n.append(out[1])
            c_n.extend(out[2:3] if len(hx) > 1 else ())
            cs.extend(out[-1:] if ask else ())
        y = ys[0] if directions == 1 else torch.cat(ys, -1)
        if ask:
            c = cs[0] if directions == 1 else torch.cat(cs, -1)
        if layer < layers - 1 and between is not None:
            y = between(y)
    # The states are no views, so that all a user does to them in place is allowed.
    others = tuple(torch.stack([c[s] for c in c_n]) for s in range(len(hx) - 1))
    return Stack(y, torch.stack(h_n), others, c)


def _runs_at_once(
    backend: Backend | Reference,
    request: Request,
    x: Tensor,
    weights: list[Weights],
    hx: tuple[Tensor, ...],
) -> bool:
    """Not in a trace, whose program may go to another device."""
    if torch.compiler.is_compiling() or not backend.runs_stack(request):
        return False
    return is_inference((x, *hx, *(t for w in weights for t in w)))


def run_step(
    cell: Cell,
    x: Tensor,
    weights: Weights,
    hx: tuple[Tensor, ...],
    noise: Noise,
    wish: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """One step of one layer over ``x [1,B,I]``: the new states from hx, ``h [B,H]`` first."""
    seq = Sequence()
    request = request_of(cell, x, weights, seq, noise, False)
    backend = select(request, wish)
    if _runs_at_once(backend, request, x, [weights], hx):
        layer = tuple(s.unsqueeze(0) for s in hx)
        _, *states = cast(Stacks, backend).forward_stack(cell, x, [weights], layer, seq)
        return tuple(s.squeeze(0) for s in states)
    call = Call(cell, x, weights, hx[0], beside_h(hx), seq, False, False, noise)
    _, h_n, *others = recurrence(backend, call)
    return (h_n, *(c_n.clone() for c in others for c_n in c.unbind(0)))


def beside_h(states: tuple[Tensor, ...]) -> Tensor | None:
    """The states ``[*,H]`` beside h as one ``[S-1,*,H]``, without a copy if there is only one."""
    if len(states) == 1:
        return None
    return states[1].unsqueeze(0) if len(states) == 2 else torch.stack(states[1:])
