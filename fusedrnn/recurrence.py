"""One layer and direction, differentiable: the autograd.Function over a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as Seq
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
    forward_of,
    reference,
)
from fusedrnn.cells import Cell, by_key


def recurrence(
    backend: Backend | Reference, call: Call, recompute: str = "none"
) -> tuple[Tensor, ...]:
    """``y [T,B,P]``, ``h_n [B,P]``, then ``c_n [S-1,B,H]`` if the cell has states beside h, then
    ``c [T,B,H]`` if asked for."""
    return _recurrences(backend, [call], recompute)[0]


def recurrences(
    backend: Backend | Reference, calls: list[Call], recompute: str = "none"
) -> list[tuple[Tensor, ...]]:
    """:func:`recurrence` of one direction of a layer, or of both, at once where the backend can."""
    alone = recompute == "chunks" or calls[0].weights.w_hr is not None
    if len(calls) == 1 or alone or not backend.runs_both:
        return [recurrence(backend, call, recompute) for call in calls]
    return _recurrences(backend, calls, recompute)


def _recurrences(
    backend: Backend | Reference, calls: list[Call], recompute: str
) -> list[tuple[Tensor, ...]]:
    tensors = tuple(t for call in calls for t in call.tensors)
    if isinstance(backend, Reference) or _transformed(tensors):
        return [reference.recurrence(call) for call in calls]
    if not _differentiated_by_autograd(tensors):
        runs = forward_of(backend, calls, False)
        return [_outputs(call, run) for call, run in zip(calls, runs, strict=True)]
    first = calls[0]
    args = (
        first.cell.key,
        backend.name,
        first.reverse,
        first.cell_states,
        *first.noise.rates,
        "none" if torch.compiler.is_exporting() else recompute,  # a program has no backward
        *(t for call in calls for t in (*call.tensors, *call.seq.masks, *call.noise.masks)),
    )
    outputs: tuple[Tensor, ...] = RecurrenceFunction.apply(*args)  # type: ignore[no-untyped-call]
    return _parts(outputs, len(calls))


def is_inference(tensors: tuple[Tensor | None, ...]) -> bool:
    """Nothing is asked for but values."""
    return not _differentiated_by_autograd(tensors) and not _transformed(tensors)


def _differentiated_by_autograd(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _parts(items: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    """As many parts of the same size."""
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]


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


_CONSTANTS = 7  # of RecurrenceFunction, before its tensors
_INPUTS = len(Wanted._fields)  # those of a call that have gradients
_OF_CALL = _INPUTS + 5  # and its masks


class RecurrenceFunction(torch.autograd.Function):
    """The autograd node of a layer's direction, or of both, entered only when a gradient is needed.

    Under ``create_graph`` its backward differentiates the reference.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell_key: str,
        backend_name: str,
        reverse: bool,  # of the first call; a second one is the reverse
        cell_states: bool,
        rate_h: float,
        rate_c: float,
        recompute: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.constants = cell_key, backend_name, reverse, cell_states, rate_h, rate_c, recompute
        ctx.set_materialize_grads(False)
        backend = by_name(backend_name)
        assert not isinstance(backend, Reference)
        calls = _calls(ctx.constants, tensors)
        runs = recomputing.forward(backend, recompute, calls)
        ctx.save_for_backward(*tensors, *(t for run in runs for t in run.reserve))
        ctx.count = len(calls)
        return tuple(t for call, run in zip(calls, runs, strict=True) for t in _outputs(call, run))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # to be asked for once, under torch.utils.checkpoint
        tensors, reserve = saved[: ctx.count * _OF_CALL], saved[ctx.count * _OF_CALL :]
        device = tensors[0].device.type
        if torch.is_autocast_enabled(device):  # products in the dtype they had in forward
            with torch.autocast(device, enabled=False):
                return RecurrenceFunction.backward(ctx, *grads)
        calls = _calls(ctx.constants, tensors)
        of_calls = _parts(grads, len(calls))
        found: Seq[tuple[Tensor | None, ...]]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = [_differentiable_backward(c, d) for c, d in zip(calls, of_calls, strict=True)]
        else:
            backend = by_name(ctx.constants[1])
            assert not isinstance(backend, Reference)
            needed = _parts(ctx.needs_input_grad[_CONSTANTS:], len(calls))
            found = recomputing.backward(
                backend,
                ctx.constants[-1],
                calls,
                [_upstream(c, d) for c, d in zip(calls, of_calls, strict=True)],
                _parts(reserve, len(calls)),
                [Wanted(*n[:_INPUTS]) for n in needed],
            )
        nothing = (None,) * (_OF_CALL - _INPUTS)
        return (*(None,) * _CONSTANTS, *(d for f in found for d in (*f, *nothing)))


def _calls(constants: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> list[Call]:
    """What the arguments of RecurrenceFunction stand for."""
    cell_key, _, reverse, cell_states, *rates, _ = constants
    calls = []
    for i, of_call in enumerate(_parts(tensors, len(tensors) // _OF_CALL)):
        x, *of_layer, h0, c0, h_reset, c_reset = of_call[:_INPUTS]
        lengths, resets, *masks = of_call[_INPUTS:]
        calls.append(
            Call(
                by_key(cell_key),
                x,
                Weights(*of_layer),
                h0,
                c0,
                Sequence(lengths, resets, h_reset, c_reset),
                reverse if i == 0 else not reverse,
                cell_states,
                Noise(*masks, *rates),
            )
        )
    return calls


def _upstream(call: Call, grads: tuple[Tensor | None, ...]) -> Upstream:
    dy, dh_n, *others = grads
    dc_n = others[0] if call.c0 is not None else None
    return Upstream(dy, dh_n, dc_n, others[-1] if call.cell_states else None)


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
    if _differentiated_by_autograd(inputs):
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
