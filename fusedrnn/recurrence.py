"""One layer and direction, differentiable: the autograd.Function over a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn import recompute as recomputing
from fusedrnn.backends import (
    Backend,
    Call,
    CellUpdates,
    Noise,
    Reference,
    Run,
    Sequence,
    Upstream,
    Wanted,
    Weights,
    by_name,
    reference,
)
from fusedrnn.cells import Cell, by_key


def recurrence(
    backend: Backend | Reference, call: Call, recompute: str = "none"
) -> tuple[Tensor, ...]:
    """``y [T,B,P]``, ``h_n [B,P]``, then ``c_n [S-1,B,H]`` if the cell has states beside h, then
    ``c [T,B,H]`` if asked for."""
    tensors = call.tensors
    if isinstance(backend, Reference) or _transformed(tensors):
        return reference.recurrence(call)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        args = (
            *tensors,
            *call.seq.masks,
            *call.noise.masks,
            call.cell.key,
            backend.name,
            call.reverse,
            call.cell_states,
            *call.noise.rates,
            "none" if torch.compiler.is_exporting() else recompute,  # a program has no backward
        )
        outputs: tuple[Tensor, ...] = RecurrenceFunction.apply(*args)  # type: ignore[no-untyped-call]
        return outputs
    return _outputs(call, backend.forward(call, False))


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


def _outputs(call: Call, run: Run) -> tuple[Tensor, ...]:
    c_n = () if call.c0 is None else (run.c_n,)
    return (run.y, run.h_n, *c_n, *((run.c,) if call.cell_states else ()))


class RecurrenceFunction(torch.autograd.Function):
    """The autograd node of one layer and direction, entered only when a gradient is needed.

    Under ``create_graph`` its backward differentiates the reference.
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
        params: Tensor | None,
        norm_ih: Tensor | None,
        norm_hh: Tensor | None,
        norm_c: Tensor | None,
        norm_c_bias: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        h_reset: Tensor | None,
        c_reset: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        dropout: Tensor | None,
        renew_h: Tensor | None,
        renew_c: Tensor | None,
        cell_key: str,
        backend_name: str,
        reverse: bool,
        cell_states: bool,
        rate_h: float,
        rate_c: float,
        recompute: str,
    ) -> tuple[Tensor, ...]:
        backend = by_name(backend_name)
        assert not isinstance(backend, Reference)
        weights = Weights(
            w_ih, w_hh, b_ih, b_hh, w_hr, params, norm_ih, norm_hh, norm_c, norm_c_bias
        )
        seq = Sequence(lengths, resets, h_reset, c_reset)
        noise = Noise(dropout, renew_h, renew_c, rate_h, rate_c)
        call = Call(by_key(cell_key), x, weights, h0, c0, seq, reverse, cell_states, noise)
        run = recomputing.forward(backend, recompute, call)
        ctx.constants = cell_key, backend_name, reverse, cell_states, noise.rates, recompute
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.tensors, *seq.masks, *noise.masks, *run.reserve)
        return _outputs(call, run)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *others: Tensor | None) -> Any:
        cell_key, backend_name, reverse, cell_states, rates, recompute = ctx.constants
        saved = ctx.saved_tensors  # to be asked for once, under torch.utils.checkpoint
        inputs, (lengths, resets, *masks), reserve = saved[:15], saved[15:20], saved[20:]
        x, *of_layer, h0, c0, h_reset, c_reset = inputs
        if torch.is_autocast_enabled(x.device.type):  # products in the dtype they had in forward
            with torch.autocast(x.device.type, enabled=False):
                return RecurrenceFunction.backward(ctx, dy, dh_n, *others)
        weights, noise = Weights(*of_layer), Noise(*masks, *rates)
        seq = Sequence(lengths, resets, h_reset, c_reset)
        call = Call(by_key(cell_key), x, weights, h0, c0, seq, reverse, cell_states, noise)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out = _differentiable_backward(call, (dy, dh_n, *others))
            return (*out, *(None,) * 12)
        dc_n = others[0] if c0 is not None else None
        dc = others[-1] if cell_states else None
        backend = by_name(backend_name)
        assert not isinstance(backend, Reference)
        wanted = Wanted(*ctx.needs_input_grad[:15])
        upstream = Upstream(dy, dh_n, dc_n, dc)
        found = recomputing.backward(backend, recompute, call, upstream, reserve, wanted)
        return (*found, *(None,) * 12)


def _differentiable_backward(
    call: Call, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of a call's tensors as a function that can itself be differentiated."""

    def again(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return reference.recurrence(call.on(tensors))

    return _differentiated(again, call.tensors, grads)


def _differentiated(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's inputs, with a graph, from those of its outputs."""
    # A view gives each input a node of its own, so that no gradient passes from one to another
    # through what they were computed from.
    views = [None if t is None else t.view_as(t) for t in inputs]
    pairs = [(o, g) for o, g in zip(function(*views), grads, strict=True) if g is not None]
    wanted = [i for i, t in enumerate(views) if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [t for t in (views[i] for i in wanted) if t is not None],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    out: list[Tensor | None] = [None] * len(views)
    for i, gradient in zip(wanted, found, strict=True):
        out[i] = gradient
    return tuple(out)


def cell_update(
    backend: Backend | Reference, cell: Cell, gates: Tensor, c: Tensor, params: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What ``reference.cell_update`` gives, by a backend that supports it."""
    inputs = gates, c, params
    if isinstance(backend, Reference) or _transformed(inputs):
        return reference.cell_update(cell, gates, c, params)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        states: tuple[Tensor, Tensor] = CellUpdateFunction.apply(  # type: ignore[no-untyped-call]
            gates, c, params, cell.key, backend.name
        )
        return states
    return cast(CellUpdates, backend).cell_update(cell, gates, c, params)


class CellUpdateFunction(torch.autograd.Function):
    """The autograd node of a cell update, as RecurrenceFunction for a whole sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        c: Tensor,
        params: Tensor | None,
        cell_key: str,
        backend_name: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.constants = cell_key, backend_name
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, c, params)
        backend = cast(CellUpdates, by_name(backend_name))
        return backend.cell_update(by_key(cell_key), gates, c, params)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> Any:
        (cell_key, backend_name), (gates, c, params) = ctx.constants, ctx.saved_tensors
        cell, backend = by_key(cell_key), cast(CellUpdates, by_name(backend_name))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = functools.partial(reference.cell_update, cell)
            return (*_differentiated(again, (gates, c, params), (dh, dc)), None, None)
        return (*backend.cell_update_backward(cell, gates, c, params, dh, dc), None, None)
