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
from fusedrnn.backends.triton.plans import Plan, at_once, plan
from fusedrnn.cells import Cell, by_key


def _module(name: str) -> ModuleType:
    """A module of kernels: the only way to them, since it takes Triton to import one."""
    return importlib.import_module(name)


def _pair(cell: Cell) -> tuple[Any, Any]:
    """The cell's functions forward and backward."""
    if isinstance(cell.triton, tuple):
        return cell.triton
    return _function(cell, "forward"), _function(cell, "backward")


def _function(cell: Cell, name: str) -> Any:
    assert isinstance(cell.triton, str)
    return getattr(_module(cell.triton), name)


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
    layer_norm: bool = False,
) -> dict[str, Any]:
    """What a kernel is compiled for, beside the types of its arguments."""
    function, output, first = _pair(cell)[backward], None, None
    if layer_norm and len(cell.states) > 1:
        output = _function(cell, "backward_of_output" if backward else "output")
        function = _function(cell, "backward_of_gates") if backward else function
    if cell.late:
        first = _function(cell, "backward_of_late" if backward else "factor")
    return {
        "CELL": function,
        "OUTPUT": output,
        "FIRST": first,
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
        "NORM": layer_norm * len(cell.states),
        "LATE": cell.late,
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
    layer_norm: bool,
    arguments: dict[str, Any],
) -> None:
    """Runs all steps of ``x [T,B,..]`` on the current stream of its device."""
    steps, rows = x.shape[:2]
    if rows == 0:
        return
    on = cuda.device(x.device.index)
    how = plan(cell, x.dtype, hidden, rows, backward, on, layer_norm)
    along_rows, along_units = how.programs(rows, hidden)
    tf32 = cuda.uses_tf32(x.dtype, cuda.precision())
    facts = constants(
        cell, x.dtype, tf32, hidden, reverse, backward, how, noise.zoneout, layer_norm
    )
    arguments |= facts | noise._asdict()
    arguments |= {name: _flags(arguments[name], x.dtype) for name in FLAGS}
    arguments |= {"T": steps, "B": rows, "counters": None, "numbers": None, **how.options}
    spans, launch = [(0, steps)], along_rows
    if how.algorithm == "grid":
        launch = min(launch, at_once(how, hidden, on))
        arguments["counters"] = torch.zeros(along_rows, dtype=torch.int32, device=x.device)
        arguments["launch_cooperative_grid"] = True
        if layer_norm:
            numbers = facts["NORM"], along_units, 2, rows
            arguments["numbers"] = x.new_empty(numbers, dtype=compute_dtype(x.dtype))
    elif how.algorithm == "step":
        spans = [(s, s + 1) for s in range(steps)] + [(steps, steps)] * backward
    kernels = _module("fusedrnn.backends.triton.kernels")
    kernel = kernels.backward if backward else kernels.forward
    with _current(x):
        for before in range(0, along_rows, launch):
            programs = min(launch, along_rows - before) * along_units
            for first, last in spans:
                kernel[(programs,)](**arguments, first=first, last=last, rows_before=before)


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
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
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
    facts, hidden, training_norm = by_key(cell), w_hh.shape[1], training and norm_ih is not None
    noise = Noise(dropout, renew_h, renew_c, rate_h, rate_c)
    run = _empty_run(x, w_hh, norm_ih, c0, facts, training, cell_states)
    y, h_n, c_n, c, h_prev, c_prev, saved, _, hats, hats_of_state, scales, late = run
    if facts.late and not training:
        late = torch.empty_like(y)
    norms = norm_ih, norm_hh, norm_c, norm_c_bias
    weights = Weights(w_ih, w_hh, b_ih, b_hh, None, params, *norms)
    gx = products.inputs(x, weights, facts.additive, products.product)
    if norm_ih is not None:
        gx, of_x = products.normalised(gx, weights, facts.additive)
        if training:
            hats[1], scales[-1] = of_x
    states = torch.cat([h0.unsqueeze(0), *([] if c0 is None else [c0])]).to(compute_dtype(x.dtype))
    arguments = {
        "gx": gx,
        "w_t": w_hh.t().contiguous(),
        "b_hh": None if facts.additive else b_hh,
        "gain": norm_hh,
        "parameters": _of_units(params, norm_c, norm_c_bias),
        "h0": h0,
        "lengths": lengths,
        "resets": resets,
        "reset_states": _of_units(h_reset, c_reset),
        "y": y,
        "c": c if cell_states else None,
        "h_prev": h_prev if training else None,
        "c_prev": c_prev if training else None,
        "saved": saved if training else None,
        "hats": hats[0] if training_norm else None,
        "hats_of_state": hats_of_state if training_norm else None,
        "scales": scales[:-1] if training_norm else None,
        "late": late if facts.late else None,
        "states": states,
    }
    _launch(gx, facts, hidden, noise, reverse, False, norm_ih is not None, arguments)
    h_n.copy_(states[0])
    if c0 is not None:
        c_n.copy_(states[1:])
    return run


def _of_units(*rows: Tensor | None) -> Tensor | None:
    """Numbers ``[K,H]`` and ``[H]`` of each unit together."""
    given = [t if t.dim() > 1 else t.unsqueeze(0) for t in rows if t is not None]
    return torch.cat(given) if given else None


def _empty_run(
    x: Tensor,
    w_hh: Tensor,
    norm_ih: Tensor | None,
    c0: Tensor | None,
    facts: Cell,
    training: bool,
    cell_states: bool,
) -> tuple[Tensor, ...]:
    """The results of the forward op, unset. After those of every backend come, with layer norm, the
    hats of W_hh h and W_ih x, those of the second state, and the scales of all: first of what the
    kernels normalise, which find them at the beginning of an array. Last is what late gates see."""
    run = empty_run(x, w_hh, None, c0, len(facts.gates), facts.saved, training, cell_states)
    normalises, sees = training and norm_ih is not None, training and facts.late > 0

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    (steps, batch), (gates, hidden) = x.shape[:2], w_hh.shape
    return (
        *run,
        empty(normalises, 2, steps, batch, gates),
        empty(normalises and c0 is not None, steps, batch, hidden),
        empty(normalises, 2 if c0 is None else 3, steps, batch, dtype=compute_dtype(x.dtype)),
        empty(sees, steps, batch, hidden),
    )


def _backward(
    dy: Tensor | None,
    dc: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    params: Tensor | None,
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor,
    saved: Tensor,
    m: Tensor,
    hats: Tensor,
    hats_of_state: Tensor,
    scales: Tensor,
    late: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    cell: str,
    reverse: bool,
    reset_states: bool,
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
    scale, (dy, dc, dh_n, dc_n) = products.scaled((dy, dc, dh_n, dc_n))
    steps, rows, hidden = h_prev.shape
    dgx = x.new_empty(steps, rows, len(facts.gates) * hidden)
    dgh = dgx if facts.additive else torch.empty_like(dgx)
    dproduct = norms = None
    if norm_ih is not None:
        hats, scales = hats.view(2, *dgx.shape), scales.view(-1, steps, rows)
        dproduct = torch.empty_like(dgx)
        of_h, of_x = map(products.Normalised, hats, (scales[0], scales[-1]))
        norms = products.Norms(of_x, of_h, dproduct)
    parameters = _of_units(params, norm_c, norm_c_bias)
    dstates = x.new_zeros(len(facts.states), rows, hidden, dtype=wide)
    units = 0 if parameters is None else len(parameters)
    dparameters = x.new_zeros(units, rows, hidden, dtype=wide)
    dreset = torch.zeros_like(dstates) if reset_states else None
    if dh_n is not None:
        dstates[0] = dh_n
    if dc_n is not None:
        dstates[1:] = dc_n
    arguments = {
        "dy": dy,
        "dc": dc,
        "w_hh": w_hh,
        "gain": norm_hh,
        "parameters": parameters,
        "lengths": lengths,
        "resets": resets,
        "h_prev": h_prev,
        "c_prev": c_prev,
        "saved": saved,
        "hats": None if norms is None else hats[0],
        "hats_of_state": None if norms is None else hats_of_state,
        "scales": None if norms is None else scales[:-1],
        "dgx": dgx,
        "dgh": dgh,
        "dproduct": dproduct,
        "dstates": dstates,
        "dparameters": dparameters,
        "dreset": dreset,
    }
    _launch(h_prev, facts, hidden, noise, reverse, True, norms is not None, arguments)
    dh0, dc0 = dstates[0].clone(), dstates[1:].clone()
    dc0 = dc0 if len(facts.states) > 1 else x.new_empty(0)
    d_of_units = dparameters.sum(1)
    entering = h_prev if dropout is None else (h_prev * dropout).to(x.dtype)
    of_late = (late.view_as(h_prev), facts.late * hidden) if facts.late else None
    d_of_reset: tuple[Tensor | None, Tensor | None] = None, None
    if dreset is not None:
        summed = dreset.sum(1)
        d_of_reset = summed[0].clone(), summed[1:].clone() if len(facts.states) > 1 else None
    run = products.Recurrent(
        entering, m, dgx, dgh, None, dh0, dc0, d_of_units, norms, of_late, d_of_reset
    )
    wanted = Wanted(want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, False, True, *(True,) * 8)
    weights = Weights(w_ih, w_hh, None, None, norm_ih=norm_ih, norm_hh=norm_hh)
    found = products.gradients(x, weights, run, wanted, products.product, scale)
    of_op = (*found[:5], *found[6:9], *found[11:])
    return tuple(x.new_empty(0) if d is None else d for d in of_op)


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
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
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
    return _empty_run(x, w_hh, norm_ih, c0, by_key(cell), training, cell_states)


def _fake_backward(
    dy: Tensor | None,
    dc: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    params: Tensor | None,
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor,
    saved: Tensor,
    m: Tensor,
    hats: Tensor,
    hats_of_state: Tensor,
    scales: Tensor,
    late: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    cell: str,
    reverse: bool,
    reset_states: bool,
    rate_h: float,
    rate_c: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    facts = by_key(cell)
    others = len(facts.states) - 1
    found = empty_gradients(x, w_ih, w_hh, None, saved, len(facts.states), (*wanted, False))
    units = len(facts.params) + (0 if norm_c is None else 2)
    of_gates = w_hh.shape[0] if norm_hh is not None else 0
    return (
        *found[:5], x.new_empty(units, w_hh.shape[1]), x.new_empty(of_gates),
        x.new_empty(of_gates), *found[6:],
        x.new_empty(w_hh.shape[1] if reset_states else 0),
        x.new_empty((others, w_hh.shape[1]) if reset_states and others else (0,)),
    )  # fmt: skip


_library = torch.library.Library("fusedrnn", "FRAGMENT")
_library.define(
    "triton_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor? params, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, "
    "Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, Tensor? h_reset, Tensor? c_reset, "
    "Tensor? dropout, Tensor? renew_h, Tensor? renew_c, str cell, bool reverse, bool training, "
    "bool cell_states, float rate_h, float rate_c) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "triton_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor w_ih, "
    "Tensor w_hh, Tensor? params, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, "
    "Tensor? norm_c_bias, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor m, Tensor hats, "
    "Tensor hats_of_state, Tensor scales, Tensor late, Tensor? lengths, Tensor? resets, "
    "Tensor? dropout, Tensor? renew_h, Tensor? renew_c, str cell, bool reverse, bool reset_states, "
    "float rate_h, float rate_c, bool want_x, bool want_w_ih, bool want_w_hh, bool want_b_ih, "
    "bool want_b_hh) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)"
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
