"""One layer and direction, differentiable: the autograd.Function and the weight-gradient GEMMs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn.backends import (
    Backend,
    Reference,
    Run,
    Sequence,
    Weights,
    by_name,
    reference,
)
from fusedrnn.cells import CELLS, Cell


def recurrence(
    cell: Cell,
    backend: Backend | Reference,
    x: Tensor,
    weights: Weights,
    h0: Tensor,
    c0: Tensor | None,
    seq: Sequence,
    reverse: bool,
    cell_states: bool,
) -> tuple[Tensor, ...]:
    """Runs ``cell`` over ``x [T,B,I]``: ``y [T,B,P]``, ``h_n [B,P]``, then ``c_n [S-1,B,H]`` if the
    cell has states beside h, then ``c [T,B,H]`` if ``cell_states``."""
    tensors = (x, *weights, h0, c0)
    if isinstance(backend, Reference) or _transformed(tensors):
        return reference.recurrence(cell, x, weights, h0, c0, seq, reverse, cell_states)
    args = (*tensors, *seq, cell.name, backend.name, reverse, cell_states)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        outputs: tuple[Tensor, ...] = RecurrenceFunction.apply(*args)  # type: ignore[no-untyped-call]
        return outputs
    run = backend.forward(cell, x, weights, h0, c0, seq, reverse, False, cell_states)
    return _outputs(run, c0 is not None, cell_states)


# Private to PyTorch: without them it is not known whether a transform is active, and the reference,
# right under each, runs instead.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _transformed(tensors: tuple[Tensor | None, ...]) -> bool:
    """Inside torch.func or forward-mode AD, where only plain operations are right."""
    if _functorch_active():
        return True
    return getattr(forward_ad, "_current_level", 0) >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _outputs(run: Run, others: bool, cell_states: bool) -> tuple[Tensor, ...]:
    return (run.y, run.h_n, *((run.c_n,) if others else ()), *((run.c,) if cell_states else ()))


class RecurrenceFunction(torch.autograd.Function):
    """The autograd node of one layer and direction, entered only when a gradient is needed.

    Backward is a fused BPTT pass, then one GEMM or sum over all T*B rows for each weight
    gradient: deterministic, no atomics. Under ``create_graph`` it differentiates the reference.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        cell_name: str,
        backend_name: str,
        reverse: bool,
        cell_states: bool,
    ) -> tuple[Tensor, ...]:
        cell, backend = CELLS[cell_name], by_name(backend_name)
        weights, seq = Weights(w_ih, w_hh, b_ih, b_hh, w_hr), Sequence(lengths, resets)
        assert not isinstance(backend, Reference)
        run = backend.forward(cell, x, weights, h0, c0, seq, reverse, True, cell_states)
        ctx.call = cell_name, backend_name, reverse, cell_states
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, h0, c0, lengths, resets, run.h_prev, run.m, *run.reserve)
        return _outputs(run, c0 is not None, cell_states)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *others: Tensor | None) -> Any:
        cell_name, backend_name, reverse, cell_states = ctx.call
        x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, resets, h_prev, m, *reserve = (
            ctx.saved_tensors
        )
        if torch.is_autocast_enabled(x.device.type):  # products in the dtype they had in forward
            with torch.autocast(x.device.type, enabled=False):
                return RecurrenceFunction.backward(ctx, dy, dh_n, *others)
        weights, seq = Weights(w_ih, w_hh, b_ih, b_hh, w_hr), Sequence(lengths, resets)
        cell, backend = CELLS[cell_name], by_name(backend_name)
        grads = (dy, dh_n, *others)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tensors = (x, *weights, h0, c0)
            out = _differentiable_backward(cell, tensors, seq, reverse, cell_states, grads)
            return (*out, *(None,) * 6)
        dc_n = others[0] if c0 is not None else None
        dc = others[-1] if cell_states else None
        assert not isinstance(backend, Reference)
        run = Run(x, x, x, x, h_prev, m, tuple(reserve))
        dgx, dgh, dh0, dc0, dh = backend.backward(
            cell, dy, dh_n, dc_n, dc, weights, seq, reverse, run
        )
        need_x, need_ih, need_hh, need_b_ih, need_b_hh, need_hr = ctx.needs_input_grad[:6]
        rows, rows_hh, product = dgx.flatten(0, 1), dgh.flatten(0, 1), backend.product
        db_ih = rows.sum(0) if need_b_ih else None
        db_hh = None
        if need_b_hh:
            db_hh = db_ih.clone() if cell.additive and db_ih is not None else rows_hh.sum(0)
        return (
            product(rows, w_ih).view_as(x) if need_x else None,
            product(rows.t(), x.flatten(0, 1)) if need_ih else None,
            product(rows_hh.t(), h_prev.flatten(0, 1)) if need_hh else None,
            db_ih,
            db_hh,
            product(dh.flatten(0, 1).t(), m.flatten(0, 1)) if need_hr else None,
            dh0,
            dc0 if c0 is not None else None,
            *(None,) * 6,
        )


def _differentiable_backward(
    cell: Cell,
    tensors: tuple[Tensor | None, ...],
    seq: Sequence,
    reverse: bool,
    cell_states: bool,
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weights, h0 and c0 as a function that can itself be differentiated."""
    # A view gives each input a node of its own, so that no gradient passes from one to another
    # through what they were computed from.
    inputs = [None if t is None else t.view_as(t) for t in tensors]
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = inputs
    assert x is not None and w_ih is not None and w_hh is not None and h0 is not None
    weights = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    outputs = reference.recurrence(cell, x, weights, h0, c0, seq, reverse, cell_states)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [t for t in (inputs[i] for i in wanted) if t is not None],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    out: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        out[i] = gradient
    return tuple(out)
