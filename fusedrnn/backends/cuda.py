"""The CUDA backend: the kernels of csrc/cuda, reached through the same ops as the CPU engine.

On CUDA tensors the ops of native.py are made of PyTorch's products and the kernels of
fusedrnn/_C_cuda.so. Inside an op is also where the precision of float32 products is read, when it
runs: a compiled graph follows the setting of its call, not the one it was traced under.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fusedrnn.backends import products
from fusedrnn.backends.backend import Request, Wanted, Weights
from fusedrnn.backends.native import (
    Device,
    Ops,
    cuda_plan,
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


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if a.dtype != torch.float32 or a.numel() == 0 or b.numel() == 0:
        return products.product(a, b, bias)
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
    bfloat16: bool,
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
    bfloat16: bool,
    reset_states: bool,
    rate_h: float,
    rate_c: float,
    want_x: bool,
    want_w_ih: bool,
    want_w_hh: bool,
    want_b_ih: bool,
    want_b_hh: bool,
    want_w_hr: bool,
) -> tuple[Tensor, ...]:
    additive = facts_of(cell).additive
    w_hh_t = w_hh.t().contiguous()
    w_hr_t = None if w_hr is None else w_hr.t().contiguous()
    dgx, dgh, dh, dh0, dc0 = torch.ops.fusedrnn.cuda_backward(
        dy, dc, dh_n, dc_n, w_hh, w_hr, w_hh_t, w_hr_t, h_prev, c_prev, saved, lengths, resets,
        cell, reverse, uses_tf32(w_hh.dtype, precision()),
    )  # fmt: skip
    dh0, dc0 = dh0.to(w_hh.dtype), dc0.to(w_hh.dtype)
    run = products.Recurrent(h_prev, m, dgx, dgx if additive else dgh, dh, dh0, dc0)
    weights = Weights(w_ih, w_hh, None, None, w_hr)
    wanted = Wanted(
        want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, want_w_hr, *(False,) * 5, True, True,
        False, False,
    )  # fmt: skip
    found = products.gradients(x, weights, run, wanted, _product)
    found_by_op = (*found[:8], found[9], *found[11:])  # norms have one gradient of two
    return tuple(x.new_empty(0) if d is None else d for d in found_by_op)


if _missing is None:
    torch.library.impl("fusedrnn::recurrence_forward", "CUDA", _forward)
    torch.library.impl("fusedrnn::recurrence_backward", "CUDA", _backward)
