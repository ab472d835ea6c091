"""The CUDA backend: the kernels of csrc/cuda, reached through the same ops as the CPU engine.

On CUDA tensors the ops of native.py are made of PyTorch's products and the kernels of
fusedrnn/_C_cuda.so. Inside an op is also where the precision of float32 products is read, when it
runs: a compiled graph follows the setting of its call, not the one it was traced under.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedrnn.backends import products
from fusedrnn.backends.backend import (
    Call,
    Gradients,
    Request,
    Run,
    Upstream,
    Wanted,
    Weights,
)
from fusedrnn.backends.native import (
    Device,
    Ops,
    cuda_plan,
    empty_gradients,
    empty_run,
    facts_of,
    native_cells,
    unfit_dtype,
)

LIBRARY = Path(__file__).parent.parent / "_C_cuda.so"


def load() -> str | None:
    """Registers the kernels, which needs neither a GPU nor a driver; the reason if it cannot."""
    if not native_cells():
        return "is not built: this is a pure Python installation"
    if torch.version.cuda is None:
        return f"needs a PyTorch built for CUDA, this one is {torch.__version__}"
    if not LIBRARY.exists():
        return "is not built: this installation has no CUDA kernels"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"does not load: {error}"
    return None


_missing = load()


def capability(index: int) -> tuple[int, int] | None:
    """The compute capability of a device; None if there is no GPU. PyTorch keeps the properties of
    each device, and Dynamo folds both questions, where it would trace a cache of our own."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


def device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    shared_memory = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(found.multi_processor_count, 10 * found.major + found.minor, shared_memory)


def precision() -> str:
    """What PyTorch is told of float32 products in recurrent layers."""
    return str(torch.backends.cudnn.rnn.fp32_precision)  # type: ignore[attr-defined]


def uses_tf32(dtype: torch.dtype, precision: str) -> bool:
    """Whether products of ``dtype`` round their operands to tf32, under
    ``torch.backends.cudnn.rnn.fp32_precision``: "tf32", "ieee", or "none" where it and all it
    inherits from are unset, which is as good as "ieee"."""
    return dtype == torch.float32 and precision == "tf32"


def unfit(request: Request) -> str | None:
    """Why no kernels of ours can run a request on a GPU, whatever the cell."""
    if request.device.type != "cuda":
        return f"runs on CUDA tensors, got {request.device.type}"
    index = request.device.index or 0
    found = capability(index)
    if found is None:
        return "finds no GPU"
    if found < (8, 0):
        return f"needs compute capability 8.0, CUDA device {index} has {found[0]}.{found[1]}"
    return None


class Cuda(Ops):
    name = "cuda"
    reads_padding = True
    runs_both = True

    def __init__(self) -> None:
        super().__init__(name for name, facts in native_cells().items() if facts.cuda)

    def supports(self, request: Request) -> str | None:
        if request.cell_update:
            return "has no cell update"
        if request.recurrent_dropout or request.zoneout:
            return f"has no {'zoneout' if request.zoneout else 'recurrent dropout'}"
        if request.layer_norm:
            return "has no layer norm"
        if request.reset_states:
            return "enters zeros at resets"
        return _missing or unfit(request) or unfit_dtype(request) or self._lacks(request)

    def algorithm(self, request: Request, rows: int) -> str:
        tf32 = uses_tf32(request.dtype, precision())
        arithmetic = "tf32" if tf32 else str(request.dtype).removeprefix("torch.")
        on = device(request.device.index or 0)
        forward, backward = (
            cuda_plan(request, rows, arithmetic, backward, on) for backward in (False, True)
        )
        return f"{arithmetic}, forward {forward}, backward {backward}"

    def forward_both(self, calls: list[Call], training: bool) -> list[Run]:
        first = calls[0]
        found = torch.ops.fusedrnn.cuda_recurrences_forward(
            _contiguous(t for c in calls for t in (c.x, *c.weights[:4], c.h0, c.c0)),
            *_contiguous(first.seq.masks),
            self._index[first.cell.key],
            training,
            first.cell_states,
        )
        none = first.x.new_empty(0)  # what layer norm would keep
        return [Run(y, h_n, c_n, c, (*kept, none)) for y, h_n, c_n, c, *kept in _halves(found)]

    def backward_both(
        self,
        calls: list[Call],
        upstreams: list[Upstream],
        reserves: list[tuple[Tensor, ...]],
        wanted: list[Wanted],
    ) -> list[Gradients]:
        first = calls[0]
        sides = zip(calls, upstreams, reserves, strict=True)
        found = torch.ops.fusedrnn.cuda_recurrences_backward(
            _contiguous(t for c, d, r in sides for t in (*d, c.x, *c.weights[:2], *r[:3])),
            *_contiguous(first.seq.masks),
            self._index[first.cell.key],
            [flag for w in wanted for flag in w[:5]],
        )
        gradients = []
        for part, call, of_call in zip(_halves(found), calls, wanted, strict=True):
            given = (*of_call[:5], True, call.c0 is not None)
            *first_ones, dh0, dc0 = (d if g else None for d, g in zip(part, given, strict=True))
            all_of_them = (*first_ones, *(None,) * 6, dh0, dc0, None, None)
            gradients.append(Gradients(*all_of_them))
        return gradients


def _contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    if a.dtype != torch.float32 or a.numel() == 0 or b.numel() == 0:
        return products.product(a, b, bias, wide)
    transpose_a, transpose_b = not a.is_contiguous(), not b.is_contiguous()
    a, b = a.t() if transpose_a else a, b.t() if transpose_b else b
    tf32 = uses_tf32(a.dtype, precision())
    out: Tensor = torch.ops.fusedrnn.cuda_product(
        a.contiguous(), b.contiguous(), transpose_a, transpose_b, tf32
    )
    return out if bias is None else out.add_(bias)


def _forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    params: None,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h_reset: None,
    c_reset: None,
    dropout: None,
    renew_h: None,
    renew_c: None,
    norm_ih: None,
    norm_hh: None,
    norm_c: None,
    norm_c_bias: None,
    cell: int,
    reverse: bool,
    training: bool,
    cell_states: bool,
    rate_h: float,
    rate_c: float,
) -> tuple[Tensor, ...]:
    additive = facts_of(cell).additive
    gx = products.inputs(x, Weights(w_ih, w_hh, b_ih, b_hh, w_hr), additive, _product)
    c0 = None if c0 is None else c0.to(x.dtype)
    out: tuple[Tensor, ...] = torch.ops.fusedrnn.cuda_forward(
        gx, w_hh, b_hh, w_hr, h0, c0, lengths, resets, cell, reverse, training, cell_states,
        uses_tf32(x.dtype, precision()),
    )  # fmt: skip
    return (*out, x.new_empty(0))


def _backward(
    dy: Tensor | None,
    dc: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    params: None,
    h_prev: Tensor,
    c_prev: Tensor,
    saved: Tensor,
    m: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    dropout: None,
    renew_h: None,
    renew_c: None,
    norm_ih: None,
    norm_hh: None,
    norm_c: None,
    norm_c_bias: None,
    kept: Tensor,
    cell: int,
    reverse: bool,
    reset_states: bool,
    rate_h: float,
    rate_c: float,
    want_x: bool,
    want_w_ih: bool,
    want_w_hh: bool,
    want_b_ih: bool,
    want_b_hh: bool,
    want_w_hr: bool,
    want_gates: bool,
) -> tuple[Tensor, ...]:
    additive = facts_of(cell).additive
    w_hh_t = w_hh.t().contiguous()
    w_hr_t = None if w_hr is None else w_hr.t().contiguous()
    scale, (dy, dc, dh_n, dc_n) = products.scaled((dy, dc, dh_n, dc_n))
    dgx, dgh, dh, dh0, dc0 = torch.ops.fusedrnn.cuda_backward(
        dy, dc, dh_n, dc_n, w_hh, w_hr, w_hh_t, w_hr_t, h_prev, c_prev, saved, lengths, resets,
        cell, reverse, uses_tf32(w_hh.dtype, precision()),
    )  # fmt: skip
    wanted = want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, want_w_hr
    run = dgx, dgx if additive else dgh, dh, dh0, dc0
    found = _gradients(x, Weights(w_ih, w_hh, None, None, w_hr), h_prev, m, run, wanted, scale)
    return *found, *((dgx, dgh, dh) if want_gates else (x.new_empty(0) for _ in range(3)))


def _gradients(
    x: Tensor,
    weights: Weights,
    h_prev: Tensor,
    m: Tensor,
    of_run: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """Those of the op, in its order, from dgx, dgh, dh, dh0 and dc0."""
    dgx, dgh, dh, dh0, dc0 = of_run
    run = products.Recurrent(h_prev, m, dgx, dgh, dh, dh0, dc0)
    all_wanted = (*wanted, *(False,) * 5, True, True, False, False)
    found = products.gradients(x, weights, run, Wanted(*all_wanted), _product, scale)
    found_by_op = (*found[:8], found[9], *found[11:])  # norms have one gradient of two
    return tuple(x.new_empty(0) if d is None else d for d in found_by_op)


# ---- Both directions of a layer. The tensors of the one come before those of the other.


def _both_forward(
    tensors: list[Tensor | None],
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
    training: bool,
    cell_states: bool,
) -> list[Tensor]:
    """Of each: y, h_n, c_n, c, h_prev, c_prev, saved, m."""
    args: list[Tensor | None] = []
    for x, w_ih, w_hh, b_ih, b_hh, h0, c0 in _halves(tensors):
        gx = products.inputs(x, Weights(w_ih, w_hh, b_ih, b_hh), facts_of(cell).additive, _product)
        args += gx, w_hh, b_hh, h0, c0
    tf32 = uses_tf32(gx.dtype, precision())
    return list(
        torch.ops.fusedrnn.cuda_forward_both(
            *args, lengths, resets, cell, training, cell_states, tf32
        )
    )


def _both_backward(
    tensors: list[Tensor | None],
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
    wanted: list[bool],
) -> list[Tensor]:
    """Of each the gradients of x, w_ih, w_hh, b_ih, b_hh, h0, c0; ``[0]`` if not wanted."""
    args: list[Tensor | None] = []
    scales = []
    for dy, dh_n, dc_n, dc, _, _, w_hh, h_prev, c_prev, saved in _halves(tensors):
        scale, upstream = products.scaled((dy, dc, dh_n, dc_n))
        scales.append(scale)
        args += *upstream, w_hh, w_hh.t().contiguous(), h_prev, c_prev, saved
    tf32 = uses_tf32(saved.dtype, precision())
    runs = torch.ops.fusedrnn.cuda_backward_both(*args, lengths, resets, cell, tf32)
    found: list[Tensor] = []
    parts = zip(_halves(tensors), _halves(runs), _halves(wanted), scales, strict=True)
    for (*_, x, w_ih, w_hh, h_prev, _, _), (dgx, dgh, _, *states), of_side, scale in parts:
        run = dgx, dgx if facts_of(cell).additive else dgh, None, *states
        weights = Weights(w_ih, w_hh, None, None)
        all_of_them = _gradients(x, weights, h_prev, h_prev, run, (*of_side, False), scale)
        found += (*all_of_them[:5], *all_of_them[9:11])
    return found


def _halves(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def _fake_both_forward(
    tensors: list[Tensor | None],
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
    training: bool,
    cell_states: bool,
) -> list[Tensor]:
    facts = facts_of(cell)
    found: list[Tensor] = []
    for x, _, w_hh, _, _, _, c0 in _halves(tensors):
        found += empty_run(x, w_hh, None, c0, facts.gates, facts.saved, training, cell_states)
    return found


def _fake_both_backward(
    tensors: list[Tensor | None],
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
    wanted: list[bool],
) -> list[Tensor]:
    found: list[Tensor] = []
    sides = zip(_halves(tensors), _halves(wanted), strict=True)
    for (*_, x, w_ih, w_hh, _, _, saved), of_side in sides:
        of_all = empty_gradients(
            x, w_ih, w_hh, None, saved, facts_of(cell).states, (*of_side, False)
        )
        found += (*of_all[:5], *of_all[6:])
    return found


_ops = torch.library.Library("fusedrnn", "FRAGMENT")
_ops.define(
    "cuda_recurrences_forward(Tensor?[] tensors, Tensor? lengths, Tensor? resets, int cell, "
    "bool training, bool cell_states) -> Tensor[]"
)
_ops.define(
    "cuda_recurrences_backward(Tensor?[] tensors, Tensor? lengths, Tensor? resets, int cell, "
    "bool[] wanted) -> Tensor[]"
)
torch.library.register_fake("fusedrnn::cuda_recurrences_forward", _fake_both_forward, lib=_ops)
torch.library.register_fake("fusedrnn::cuda_recurrences_backward", _fake_both_backward, lib=_ops)

if _missing is None:
    torch.library.impl("fusedrnn::recurrence_forward", "CUDA", _forward)
    torch.library.impl("fusedrnn::recurrence_backward", "CUDA", _backward)
    _ops.impl("cuda_recurrences_forward", _both_forward, "CUDA")
    _ops.impl("cuda_recurrences_backward", _both_backward, "CUDA")
