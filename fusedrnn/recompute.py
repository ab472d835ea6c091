"""Less memory between forward and backward: backward recomputes what forward did not keep.

All of it is made of a backend's own forward and backward, on other calls than the layer's. The
reserve of a backend that supports "gates" begins with the states that entered each step, h_prev
``[T,B,P]`` and c_prev ``[S-1,T,B,H]``. What follows, a call that takes them as h0 and c0, in the
dtypes they have, makes anew: saved ``[R,T,B,H]``, m ``[T,B,H]`` with a projection, and what else
there may be, flat. What a call has not is ``[0]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn.backends import (
    Backend,
    Call,
    Gradients,
    Noise,
    Run,
    Sequence,
    Upstream,
    Wanted,
    backward_of,
    forward_of,
)
from fusedrnn.backends.reference import compute_dtype

KINDS = ("none", "gates", "chunks")


def check_recompute(recompute: str) -> str:
    if recompute not in KINDS:
        raise ValueError(f"recompute should be one of {KINDS}, got {recompute!r}")
    return recompute


def forward(backend: Backend, recompute: str, calls: list[Call]) -> list[Run]:
    """``forward_of`` for training; the reserves are what is kept until :func:`backward`."""
    if recompute == "chunks":
        return [_forward_in_chunks(backend, call) for call in calls]
    runs = forward_of(backend, calls, True)
    kept = 2 if recompute == "gates" else None
    return [run._replace(reserve=run.reserve[:kept]) for run in runs]


def backward(
    backend: Backend,
    recompute: str,
    calls: list[Call],
    upstreams: list[Upstream],
    reserves: list[tuple[Tensor, ...]],
    wanted: list[Wanted],
) -> list[Gradients]:
    """``backward_of`` from what :func:`forward` kept."""
    if recompute == "chunks":
        each = zip(calls, upstreams, reserves, wanted, strict=True)
        return [_backward_in_chunks(backend, *of_call) for of_call in each]
    if recompute == "gates":
        kept = zip(calls, reserves, strict=True)
        reserves = [_with_gates(backend, call, *states) for call, states in kept]
    return backward_of(backend, calls, upstreams, reserves, wanted)


def _with_gates(backend: Backend, call: Call, h_prev: Tensor, c_prev: Tensor) -> tuple[Tensor, ...]:
    """The whole reserve, by one step of T*B rows. The states that enter each are known, so neither
    resets nor zoneout matter."""
    x, lengths, dropout = call.x, call.seq.lengths, call.noise.dropout
    steps, batch = x.shape[:2]
    if lengths is not None:
        lengths = (torch.arange(steps, device=x.device).unsqueeze(-1) < lengths).flatten().long()
    rows = call._replace(
        x=x.flatten(0, 1).unsqueeze(0),
        h0=h_prev.flatten(0, 1),
        c0=None if call.c0 is None else c_prev.flatten(1, 2),
        seq=Sequence(lengths),
        cell_states=False,
        noise=Noise(None if dropout is None else dropout.repeat(steps, 1)),
    )
    _, _, saved, m, *others = backend.forward(rows, True).reserve
    saved = saved.view(saved.shape[0], steps, batch, saved.shape[3])
    if call.weights.w_hr is not None:
        m = m.view(saved.shape[1:])
    return h_prev, c_prev, saved, m, *others


# ---- Chunks of ceil(sqrt(T)) steps, in the order in which they are computed. Kept are the states
# that enter each but the first. In 16 bits a state would be rounded on its way from one call to the
# next, so all of it is computed in float32.


def _forward_in_chunks(backend: Backend, call: Call) -> Run:
    dtype, call = call.x.dtype, call.to(compute_dtype(call.x.dtype))
    states, kept = _states(call), []
    y: list[Tensor] = []
    c: list[Tensor] = []
    for begin, end in _spans(call):
        if y:
            states = _entering(call, end, states)
            kept += states
        run = backend.forward(_chunk(call, begin, end, states), False)
        states = [run.h_n, run.c_n][: len(states)]
        y.append(run.y.to(dtype))
        c.append(run.c.to(dtype))
    h_n, c_n = run.h_n.to(dtype), run.c_n.to(dtype)
    return Run(_in_time(y, call.reverse), h_n, c_n, _in_time(c, call.reverse), tuple(kept))


def _backward_in_chunks(
    backend: Backend, call: Call, upstream: Upstream, kept: tuple[Tensor, ...], wanted: Wanted
) -> Gradients:
    dtype, wide = call.x.dtype, compute_dtype(call.x.dtype)
    call = call.to(wide)
    first, spans = _states(call), _spans(call)
    entering, count = [*first, *kept], len(first)
    dy, dh, dc, dcs = (None if d is None else d.to(wide) for d in upstream)
    wanted = wanted._replace(h0=True, c0=count > 1)
    dx: list[Tensor] = []
    sums: list[Tensor | None] = [None] * (len(call.weights) + len(call.seq.states))
    for k, (begin, end) in reversed(list(enumerate(spans))):
        chunk = _chunk(call, begin, end, entering[k * count : (k + 1) * count])
        run = backend.forward(chunk, True)
        of_chunk = Upstream(_steps(dy, begin, end), dh, dc, _steps(dcs, begin, end))
        found = backend.backward(chunk, of_chunk, run.reserve, wanted)
        x, *of_weights, dh, dc, dh_reset, dc_reset = found
        dh, dh_reset = _leaving(call, end, dh, dh_reset)
        dc, dc_reset = _leaving(call, end, dc, dc_reset)
        if x is not None:
            dx.append(x.to(dtype))
        sums = [_sum(s, d) for s, d in zip(sums, (*of_weights, dh_reset, dc_reset), strict=True)]
    *of_weights, dh_reset, dc_reset = sums
    ordered = (*of_weights, dh, dc, dh_reset, dc_reset)
    others = [None if d is None else d.to(dtype) for d in ordered]
    return Gradients(_in_time(dx, not call.reverse) if dx else None, *others)


def _states(call: Call) -> list[Tensor]:
    """``h [B,P]``, and the others ``[S-1,B,H]`` if there are any, that enter the call."""
    return [call.h0] if call.c0 is None else [call.h0, call.c0]


def _spans(call: Call) -> list[tuple[int, int]]:
    """Of each chunk, as in slices: the last may end after T. T is only compared, so that a trace
    holds for every T with such chunks."""
    steps, size = call.x.shape[0], 1
    spans: list[tuple[int, int]] = []
    while size * size < steps:
        size += 1
    while len(spans) * size < steps:
        spans.append((len(spans) * size, (len(spans) + 1) * size))
    return spans[::-1] if call.reverse else spans


def _chunk(call: Call, begin: int, end: int, states: list[Tensor]) -> Call:
    """The steps from ``begin`` to before ``end``, entered by ``states``."""
    (lengths, resets), noise = call.seq.masks, call.noise
    return call._replace(
        x=call.x[begin:end],
        h0=states[0],
        c0=states[1] if len(states) > 1 else None,
        seq=call.seq._replace(
            lengths=None if lengths is None else (lengths - begin).clamp(0, end - begin),
            resets=_steps(resets, begin, end),
        ),
        noise=noise._replace(
            renew_h=_steps(noise.renew_h, begin, end), renew_c=_steps(noise.renew_c, begin, end)
        ),
    )


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None or more is None else total.add_(more)


def _steps(t: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if t is None else t[begin:end]


def _cut(call: Call, end: int) -> Tensor | None:
    """The rows ``[B,1]`` that begin anew where the reverse direction passes ``end``, if any may: a
    reset there is not in the chunk that it cuts off."""
    if not call.reverse or call.seq.resets is None or end >= call.x.shape[0]:
        return None
    return call.seq.resets[end].unsqueeze(-1)


def _entering(call: Call, end: int, states: list[Tensor]) -> list[Tensor]:
    """What enters the chunk before ``end`` if ``states`` come from the one after it."""
    cut = _cut(call, end)
    if cut is None:
        return states
    anew = (torch.zeros((), dtype=call.x.dtype, device=call.x.device) if s is None
            else s.unsqueeze(-2) for s in call.seq.states)  # fmt: skip
    return [torch.where(cut, a, s) for a, s in zip(anew, states, strict=False)]


def _leaving(
    call: Call, end: int, d: Tensor | None, d_reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What reaches the state before, and the one at resets, if ``d`` is what entered the chunk."""
    cut = _cut(call, end)
    if cut is None or d is None:
        return d, d_reset
    return d.masked_fill(cut, 0), None if d_reset is None else d_reset + (d * cut).sum(-2)


def _in_time(pieces: list[Tensor], reverse: bool) -> Tensor:
    return torch.cat(pieces[::-1] if reverse else pieces)
