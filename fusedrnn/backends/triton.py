"""The Triton backend: the kernels of triton_kernels.py, for any cell with a pair in Triton.

Around them are PyTorch's products, which follow PyTorch's own settings; in float32 the kernels
follow ``torch.backends.cudnn.rnn.fp32_precision``, read when they run. Triton itself is imported
when the first of them is launched.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.backends import cuda, products
from fusedrnn.backends.backend import Call, Gradients, Request, Run, Upstream, Wanted, Weights
from fusedrnn.backends.native import DTYPES, Device, empty_gradients, empty_run
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.cells import Cell, by_key

_missing = None if importlib.util.find_spec("triton") else "needs the package triton"


class Plan(NamedTuple):
    """How the kernels run a call, forward or backward."""

    algorithm: str  # "sequence", "grid" or "step"
    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int

    def programs(self, rows: int, hidden: int) -> tuple[int, int]:
        """Along the rows, along the units."""
        return -(-rows // self.block_b), -(-hidden // self.block_h)


# Rows, units and warps of a program, where several share the rows. Small ones share a step's work
# among many multiprocessors; large ones read less for it.
TILES = ((16, 16, 4), (16, 32, 4), (32, 32, 8), (64, 32, 8))


def plan(
    cell: Cell, dtype: torch.dtype, hidden: int, rows: int, backward: bool, on: Device
) -> Plan:
    """The plan for forward or backward, a function of these facts alone.

    "sequence": a program has all units of 16 rows, where their weights fit into the shared memory
    of a multiprocessor; it is the same for any number of rows. "grid": several share the rows, with
    the smallest tiles that let all of them be on the device at once. "step": as these, a launch for
    each step.
    """
    width, power = dtype.itemsize, max(16, 1 << (hidden - 1).bit_length())
    for stages in (2, 1):
        # Backward reads a step ahead; the rest is for h or gradients on their way to a product.
        planes = cell.saved + 4 if backward and stages == 2 else 2
        beside = 16 * power * (planes * width + max(4, width) * len(cell.states))
        if width == 8:  # what operands of that width take to change their layout
            beside += beside // 2
        if len(cell.gates) * power**2 * width + beside <= on.shared_memory:
            return Plan("sequence", 16, power, power, min(16, max(4, power // 16)), stages)
    for block_b, block_h, warps in TILES:
        found = Plan("grid", block_b, block_h, 128 // width, warps, 3)
        along_rows, along_units = found.programs(rows, hidden)
        if along_rows * along_units <= on.multiprocessors:
            return found
    return found._replace(algorithm="step")


def describe(found: Plan, rows: int, hidden: int) -> str:
    along_rows, along_units = found.programs(rows, hidden)
    blocks = (
        f"{along_units} x {along_rows} programs of {found.block_h} units x {found.block_b} rows"
    )
    launches = "a launch a step" if found.algorithm == "step" else "one launch"
    return f"{found.algorithm} ({launches}, {blocks})"


class Triton:
    name = "triton"

    def supports(self, request: Request) -> str | None:
        if _missing is not None:
            return _missing
        if request.device.type != "cuda":
            return f"runs on CUDA tensors, got {request.device.type}"
        if torch.version.hip is not None:
            return "is for NVIDIA GPUs"
        index = request.device.index or 0
        found = cuda.capability(index)
        if found is None:
            return "finds no GPU"
        if found < (8, 0):
            return f"needs compute capability 8.0, CUDA device {index} has {found[0]}.{found[1]}"
        return self._lacks(request)

    def _lacks(self, request: Request) -> str | None:
        """What no device has a kernel for."""
        if request.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"computes in {names}, got {request.dtype}"
        if request.cell.triton is None:
            return f"has no kernel for the cell {request.cell.name}"
        if request.hidden_size == 0:
            return "needs a hidden size of at least 1"
        if request.proj_size:
            return "has no projection"
        return None

    def algorithm(self, request: Request, rows: int) -> str:
        cell, dtype, index, hidden, *_ = request
        arithmetic = (
            "tf32" if cuda.uses_tf32(dtype, cuda.precision()) else str(dtype).removeprefix("torch.")
        )
        on = cuda.device(index.index or 0)
        forward, backward = (
            describe(plan(cell, dtype, hidden, rows, backward, on), rows, hidden)
            for backward in (False, True)
        )
        return f"{arithmetic}, forward {forward}, backward {backward}"

    def forward(self, call: Call, training: bool) -> Run:
        cell, x, weights, h0, c0, seq, reverse, cell_states = call
        w_ih, w_hh, b_ih, b_hh, _, params = weights
        tensors = _contiguous(x, w_ih, w_hh, b_ih, b_hh, params, h0, c0, *seq)
        y, h_n, c_n, c, *reserve = torch.ops.fusedrnn.triton_forward(
            *tensors, cell.key, reverse, training, cell_states
        )
        return Run(y, h_n, c_n, c, tuple(reserve))

    def backward(
        self, call: Call, upstream: Upstream, reserve: tuple[Tensor, ...], wanted: Wanted
    ) -> Gradients:
        cell, x, weights, _, c0, seq, reverse, _ = call
        dy, dh_n, dc_n, dc = upstream
        tensors = (dy, dc, dh_n, dc_n, x, weights.w_ih, weights.w_hh, weights.params)
        found = torch.ops.fusedrnn.triton_backward(
            *_contiguous(*tensors, *reserve, *seq), cell.key, reverse, *wanted[:5]
        )
        given = (*wanted[:5], wanted.params, True, c0 is not None)
        asked = [d if g else None for d, g in zip(found, given, strict=True)]
        return Gradients._make((*asked[:5], None, *asked[5:]))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _module(name: str) -> ModuleType:
    """A module of kernels: the only way to them, since it takes Triton to import one."""
    return importlib.import_module(name)


def _pair(cell: Cell) -> tuple[Any, Any]:
    """The cell's functions forward and backward."""
    if isinstance(cell.triton, tuple):
        return cell.triton
    assert cell.triton is not None
    module = _module(cell.triton)
    return module.forward, module.backward


def constants(
    cell: Cell,
    dtype: torch.dtype,
    tf32: bool,
    hidden: int,
    reverse: bool,
    backward: bool,
    how: Plan,
) -> dict[str, Any]:
    """What a kernel is compiled for, beside the types of its arguments."""
    tl = _module("triton.language")
    return {
        "CELL": _pair(cell)[backward],
        "G": len(cell.gates),
        "S": len(cell.states),
        "R": cell.saved,
        "K": len(cell.params),
        "H": hidden,
        "ADDITIVE": cell.additive,
        "REVERSE": reverse,
        "PRECISION": "tf32" if tf32 else "ieee",
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_B": how.block_b,
        "BLOCK_H": how.block_h,
        "BLOCK_K": how.block_k,
        "MEETS": how.algorithm == "grid",
    }


def _launch(
    x: Tensor, cell: Cell, hidden: int, reverse: bool, backward: bool, arguments: dict[str, Any]
) -> None:
    """Runs all steps of ``x [T,B,..]`` on the current stream of its device."""
    steps, rows = x.shape[:2]
    if rows == 0:
        return
    how = plan(cell, x.dtype, hidden, rows, backward, cuda.device(x.device.index))
    along_rows, along_units = how.programs(rows, hidden)
    tf32 = cuda.uses_tf32(x.dtype, cuda.precision())
    arguments |= constants(cell, x.dtype, tf32, hidden, reverse, backward, how)
    arguments |= {"T": steps, "B": rows, "num_warps": how.warps, "num_stages": how.stages}
    arguments["counters"] = None
    spans = [(0, steps)]
    if how.algorithm == "grid":
        arguments["counters"] = torch.zeros(along_rows, dtype=torch.int32, device=x.device)
        arguments["launch_cooperative_grid"] = True
    elif how.algorithm == "step":
        spans = [(s, s + 1) for s in range(steps)] + [(steps, steps)] * backward
    kernels = _module("fusedrnn.backends.triton_kernels")
    kernel = (kernels.backward if backward else kernels.forward)[(along_rows * along_units,)]
    guard: AbstractContextManager[object] = nullcontext()
    if x.is_cuda:
        guard = torch.cuda.device(x.device)
    with guard:
        for first, last in spans:
            kernel(**arguments, first=first, last=last)


def _resets(resets: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As numbers of the other arrays' width: Triton lays out a product's operands by the narrowest
    number they depend on, and with bytes among them has none in float64."""
    return None if resets is None else resets.to(dtype)


def _forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    training: bool,
    cell_states: bool,
) -> tuple[Tensor, ...]:
    facts, hidden = by_key(cell), w_hh.shape[1]
    run = _fake_forward(
        x,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        params,
        h0,
        c0,
        lengths,
        resets,
        cell,
        reverse,
        training,
        cell_states,
    )
    y, h_n, c_n, c, h_prev, c_prev, saved, _ = run
    gx = products.inputs(x, Weights(w_ih, w_hh, b_ih, b_hh), facts.additive, products.product)
    states = torch.cat([h0.unsqueeze(0), *([] if c0 is None else [c0])]).to(compute_dtype(x.dtype))
    arguments = {
        "gx": gx,
        "w_t": w_hh.t().contiguous(),
        "b_hh": None if facts.additive else b_hh,
        "params": params,
        "h0": h0,
        "lengths": lengths,
        "resets": _resets(resets, x.dtype),
        "y": y,
        "c": c if cell_states else None,
        "h_prev": h_prev if training else None,
        "c_prev": c_prev if training else None,
        "saved": saved if training else None,
        "states": states,
    }
    _launch(gx, facts, hidden, reverse, False, arguments)
    h_n.copy_(states[0])
    if c0 is not None:
        c_n.copy_(states[1:])
    return run


def _backward(
    dy: Tensor | None,
    dc: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    params: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor,
    saved: Tensor,
    m: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    want_x: bool,
    want_w_ih: bool,
    want_w_hh: bool,
    want_b_ih: bool,
    want_b_hh: bool,
) -> tuple[Tensor, ...]:
    facts, wide = by_key(cell), compute_dtype(x.dtype)
    steps, rows, hidden = h_prev.shape
    dgx = x.new_empty(steps, rows, len(facts.gates) * hidden)
    dgh = dgx if facts.additive else torch.empty_like(dgx)
    dstates = x.new_zeros(len(facts.states), rows, hidden, dtype=wide)
    dparams = x.new_zeros(len(facts.params), rows, hidden, dtype=wide)
    if dh_n is not None:
        dstates[0] = dh_n
    if dc_n is not None:
        dstates[1:] = dc_n
    arguments = {
        "dy": dy,
        "dc": dc,
        "w_hh": w_hh,
        "params": params,
        "lengths": lengths,
        "resets": _resets(resets, x.dtype),
        "h_prev": h_prev,
        "c_prev": c_prev,
        "saved": saved,
        "dgx": dgx,
        "dgh": dgh,
        "dstates": dstates,
        "dparams": dparams,
    }
    _launch(h_prev, facts, hidden, reverse, True, arguments)
    dh0, dc0 = (d.to(x.dtype, copy=True) for d in (dstates[0], dstates[1:]))
    dc0 = dc0 if len(facts.states) > 1 else x.new_empty(0)
    of_params = dparams.sum(1).to(x.dtype) if facts.params else None
    run = products.Recurrent(h_prev, m, dgx, dgh, None, dh0, dc0, of_params)
    wanted = Wanted(want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, False, True, True, True)
    weights = Weights(w_ih, w_hh, None, None)
    found = products.gradients(x, weights, run, wanted, products.product)
    return tuple(x.new_empty(0) if d is None else d for d in (*found[:5], *found[6:]))


def _fake_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    training: bool,
    cell_states: bool,
) -> tuple[Tensor, ...]:
    facts = by_key(cell)
    return empty_run(x, w_hh, None, c0, len(facts.gates), facts.saved, training, cell_states)


def _fake_backward(
    dy: Tensor | None,
    dc: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    params: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor,
    saved: Tensor,
    m: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    states = len(by_key(cell).states)
    found = empty_gradients(x, w_ih, w_hh, None, saved, states, (*wanted, False))
    return (*found[:5], x.new_empty(0) if params is None else torch.empty_like(params), *found[6:])


_library = torch.library.Library("fusedrnn", "FRAGMENT")
_library.define(
    "triton_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor? params, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, str cell, "
    "bool reverse, bool training, bool cell_states) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "triton_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor w_ih, "
    "Tensor w_hh, Tensor? params, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor m, "
    "Tensor? lengths, Tensor? resets, str cell, bool reverse, bool want_x, bool want_w_ih, "
    "bool want_w_hh, bool want_b_ih, bool want_b_hh) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("triton_forward", _forward, "CompositeExplicitAutograd")
_library.impl("triton_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrnn::triton_forward", _fake_forward, lib=_library)
torch.library.register_fake("fusedrnn::triton_backward", _fake_backward, lib=_library)
