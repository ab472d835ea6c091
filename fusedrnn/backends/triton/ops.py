"""The ops of the Triton backend: PyTorch's products, and around them the launches of the kernels.

Inside an op is also where the precision of float32 products is read, when it runs: the kernels
follow ``torch.backends.cudnn.rnn.fp32_precision``, PyTorch's products PyTorch's own settings.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedrnn.backends import cuda, products
from fusedrnn.backends.backend import Noise, Wanted, Weights
from fusedrnn.backends.native import empty_gradients, empty_run
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.backends.triton.plans import Plan, plan
from fusedrnn.cells import Cell, by_key


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


def _compute_type(dtype: torch.dtype) -> Any:
    tl = _module("triton.language")
    return tl.float64 if dtype == torch.float64 else tl.float32


def constants(
    cell: Cell,
    dtype: torch.dtype,
    tf32: bool,
    hidden: int,
    reverse: bool,
    backward: bool,
    how: Plan,
    zoneout: bool = False,
) -> dict[str, Any]:
    """What a kernel is compiled for, beside the types of its arguments."""
    return {
        "CELL": _pair(cell)[backward],
        "G": len(cell.gates),
        "S": len(cell.states),
        "R": cell.saved,
        "K": len(cell.params),
        "H": hidden,
        "REVERSE": reverse,
        "PRECISION": "tf32" if tf32 else "ieee",
        "COMPUTE": _compute_type(dtype),
        "BLOCK_B": how.block_b,
        "BLOCK_H": how.block_h,
        "BLOCK_K": how.block_k,
        "MEETS": how.algorithm == "grid",
        "ZONEOUT": zoneout,
        **({"ADDITIVE": cell.additive} if backward else {}),
    }


def _current(x: Tensor) -> AbstractContextManager[object]:
    """The device of ``x`` is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _launch(
    x: Tensor,
    cell: Cell,
    hidden: int,
    noise: Noise,
    reverse: bool,
    backward: bool,
    arguments: dict[str, Any],
) -> None:
    """Runs all steps of ``x [T,B,..]`` on the current stream of its device."""
    steps, rows = x.shape[:2]
    if rows == 0:
        return
    how = plan(cell, x.dtype, hidden, rows, backward, cuda.device(x.device.index))
    along_rows, along_units = how.programs(rows, hidden)
    tf32 = cuda.uses_tf32(x.dtype, cuda.precision())
    arguments |= constants(cell, x.dtype, tf32, hidden, reverse, backward, how, noise.zoneout)
    arguments |= noise._asdict()
    arguments |= {name: _flags(arguments[name], x.dtype) for name in FLAGS}
    arguments |= {"T": steps, "B": rows, "counters": None, **how.options}
    spans = [(0, steps)]
    if how.algorithm == "grid":
        arguments["counters"] = torch.zeros(along_rows, dtype=torch.int32, device=x.device)
        arguments["launch_cooperative_grid"] = True
    elif how.algorithm == "step":
        spans = [(s, s + 1) for s in range(steps)] + [(steps, steps)] * backward
    kernels = _module("fusedrnn.backends.triton.kernels")
    kernel = (kernels.backward if backward else kernels.forward)[(along_rows * along_units,)]
    with _current(x):
        for first, last in spans:
            kernel(**arguments, first=first, last=last)


FLAGS = ("resets", "renew_h", "renew_c")


def _flags(flags: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As numbers of the other arrays' width: Triton lays out a product's operands by the narrowest
    number they depend on, and with bytes among them has none in float64."""
    return None if flags is None else flags.to(dtype)


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
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    cell: str,
    reverse: bool,
    training: bool,
    cell_states: bool,
    rate_h: float,
    rate_c: float,
) -> tuple[Tensor, ...]:
    facts, hidden = by_key(cell), w_hh.shape[1]
    noise = Noise(dropout, renew_h, renew_c, rate_h, rate_c)
    run = empty_run(x, w_hh, None, c0, len(facts.gates), facts.saved, training, cell_states)
    y, h_n, c_n, c, h_prev, c_prev, saved, _ = run
    gx = products.inputs(x, Weights(w_ih, w_hh, b_ih, b_hh), facts.additive, products.product)
    states = torch.cat([h0.unsqueeze(0), *([] if c0 is None else [c0])]).to(compute_dtype(x.dtype))
    arguments = {
        "gx": gx,
        "w_t": w_hh.t().contiguous(),
        "b_hh": None if facts.additive else b_hh,
        "parameters": params,
        "h0": h0,
        "lengths": lengths,
        "resets": resets,
        "y": y,
        "c": c if cell_states else None,
        "h_prev": h_prev if training else None,
        "c_prev": c_prev if training else None,
        "saved": saved if training else None,
        "states": states,
    }
    _launch(gx, facts, hidden, noise, reverse, False, arguments)
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
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    cell: str,
    reverse: bool,
    rate_h: float,
    rate_c: float,
    want_x: bool,
    want_w_ih: bool,
    want_w_hh: bool,
    want_b_ih: bool,
    want_b_hh: bool,
) -> tuple[Tensor, ...]:
    facts, wide = by_key(cell), compute_dtype(x.dtype)
    noise = Noise(dropout, renew_h, renew_c, rate_h, rate_c)
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
        "parameters": params,
        "lengths": lengths,
        "resets": resets,
        "h_prev": h_prev,
        "c_prev": c_prev,
        "saved": saved,
        "dgx": dgx,
        "dgh": dgh,
        "dstates": dstates,
        "dparameters": dparams,
    }
    _launch(h_prev, facts, hidden, noise, reverse, True, arguments)
    dh0, dc0 = (d.to(x.dtype, copy=True) for d in (dstates[0], dstates[1:]))
    dc0 = dc0 if len(facts.states) > 1 else x.new_empty(0)
    of_params = dparams.sum(1).to(x.dtype) if facts.params else None
    entering = h_prev if dropout is None else (h_prev * dropout).to(x.dtype)
    run = products.Recurrent(entering, m, dgx, dgh, None, dh0, dc0, of_params)
    wanted = Wanted(
        want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, False, True, *(False,) * 4, True, True
    )
    weights = Weights(w_ih, w_hh, None, None)
    found = products.gradients(x, weights, run, wanted, products.product)
    return tuple(
        x.new_empty(0) if d is None else d for d in (*found[:5], found.params, found.h0, found.c0)
    )


BLOCK = 512  # elements of a program of update


def update_constants(cell: Cell, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """As :func:`constants`, of the kernels of update.py."""
    pair = dict(zip(("CELL", "BACKWARD") if backward else ("CELL",), _pair(cell), strict=False))
    return {**pair, "G": len(cell.gates), "COMPUTE": _compute_type(dtype), "BLOCK": BLOCK}


def _launch_update(cell: str, gates: Tensor, backward: bool, **arrays: Tensor | None) -> None:
    size = gates.shape[0] * gates.shape[2]
    if size:
        kernels = _module("fusedrnn.backends.triton.update")
        kernel = kernels.update_backward if backward else kernels.update
        constexprs = update_constants(by_key(cell), gates.dtype, backward)
        with _current(gates):
            kernel[(-(-size // BLOCK),)](
                gates=gates, **arrays, N=size, H=gates.shape[2], **constexprs
            )


def _fake_update(gates: Tensor, c: Tensor, cell: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(c, dtype=gates.dtype), torch.empty_like(c)


def _update(gates: Tensor, c: Tensor, cell: str) -> tuple[Tensor, Tensor]:
    h_new, c_new = _fake_update(gates, c, cell)
    _launch_update(cell, gates, False, c=c, h_new=h_new, c_new=c_new)
    return h_new, c_new


def _update_backward(
    gates: Tensor, c: Tensor, dh: Tensor | None, dc: Tensor | None, cell: str
) -> tuple[Tensor, Tensor]:
    dgates, dc_before = torch.empty_like(gates), torch.empty_like(c)
    _launch_update(cell, gates, True, c=c, dh_new=dh, dc_new=dc, dgates=dgates, dc=dc_before)
    return dgates, dc_before


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
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    cell: str,
    reverse: bool,
    training: bool,
    cell_states: bool,
    rate_h: float,
    rate_c: float,
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
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    cell: str,
    reverse: bool,
    rate_h: float,
    rate_c: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    states = len(by_key(cell).states)
    found = empty_gradients(x, w_ih, w_hh, None, saved, states, (*wanted, False))
    return (*found[:5], x.new_empty(0) if params is None else torch.empty_like(params), *found[6:])


_library = torch.library.Library("fusedrnn", "FRAGMENT")
_library.define(
    "triton_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor? params, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, "
    "Tensor? dropout, Tensor? renew_h, Tensor? renew_c, str cell, bool reverse, bool training, "
    "bool cell_states, float rate_h, float rate_c) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "triton_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor w_ih, "
    "Tensor w_hh, Tensor? params, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor m, "
    "Tensor? lengths, Tensor? resets, Tensor? dropout, Tensor? renew_h, Tensor? renew_c, "
    "str cell, bool reverse, float rate_h, float rate_c, bool want_x, bool want_w_ih, "
    "bool want_w_hh, bool want_b_ih, bool want_b_hh) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("triton_update(Tensor gates, Tensor c, str cell) -> (Tensor, Tensor)")
_library.define(
    "triton_update_backward(Tensor gates, Tensor c, Tensor? dh, Tensor? dc, str cell) -> "
    "(Tensor, Tensor)"
)
for name, op, fake in (
    ("triton_forward", _forward, _fake_forward),
    ("triton_backward", _backward, _fake_backward),
    ("triton_update", _update, _fake_update),
    ("triton_update_backward", _update_backward, lambda gates, c, dh, dc, cell: (
        torch.empty_like(gates), torch.empty_like(c),
    )),
):  # fmt: skip
    _library.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedrnn::{name}", fake, lib=_library)
