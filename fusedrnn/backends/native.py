"""The native CPU backend: the C++ engine of csrc/, reached through the ops of fusedrnn/_C.so.

The ops themselves, and their shapes while tracing, are those of every device with kernels.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.backends.backend import (
    Call,
    Gradients,
    Request,
    Run,
    Sequence,
    Upstream,
    Wanted,
    Weights,
)
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.cells import Cell

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the CUDA kernels, in the order of frnn::cuda::Arithmetic.
ARITHMETICS = ("float16", "bfloat16", "tf32", "float32", "float64")
LIBRARY = Path(__file__).parent.parent / "_C.so"


def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The native library with its ops registered, or the reason why there is none."""
    if not LIBRARY.exists():
        return None, "is not built: this is a pure Python installation"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return None, f"does not load: {error}"
    return ctypes.CDLL(str(LIBRARY)), None


_library, _missing = load()


def _text(function: str) -> str:
    assert _library is not None
    call = getattr(_library, function)
    call.restype = ctypes.c_char_p
    return bytes(call()).decode()


class Facts(NamedTuple):
    """What the native library knows of a cell: numbers, and whether it is additive."""

    gates: int
    states: int
    saved: int  # planes
    params: int
    additive: bool
    cuda: bool  # there are CUDA kernels for it


def native_cells() -> dict[str, Facts]:
    """The cells of the native library in its order."""
    if _library is None:
        return {}
    cells = {}
    for line in _text("frnn_cells").splitlines():
        name, *numbers = line.split()
        gates, states, saved, params, additive, cuda = map(int, numbers)
        cells[name] = Facts(gates, states, saved, params, bool(additive), bool(cuda))
    return cells


@functools.cache
def facts_of(cell: int) -> Facts:
    """Those of the cell with an index."""
    return list(native_cells().values())[cell]


def isa() -> str | None:
    """The instruction set the engine runs on: base, avx2, avx512 or amx."""
    return None if _library is None else _text("frnn_isa")


def isas() -> list[str]:
    """The instruction sets this machine can run the engine on."""
    return [] if _library is None else _text("frnn_isas").split()


def set_isa(name: str) -> None:
    """Runs the engine on another instruction set of ``isas()``, process-wide (for tests)."""
    global _in_bfloat16
    if _library is None or not _library.frnn_set_isa(name.encode()):
        raise ValueError(f"instruction set {name!r} cannot run here, expected one of {isas()}")
    _in_bfloat16 = _find_in_bfloat16()


def _find_in_bfloat16() -> frozenset[int]:
    """The cells, by index, whose values the engine has kernels for as they are in bfloat16."""
    cells = range(len(native_cells()))
    return frozenset(i for i in cells if _library and _library.frnn_stores_bfloat16(i))


_in_bfloat16 = _find_in_bfloat16()  # a trace may look there


class Device(NamedTuple):
    """What plans need to know of a GPU."""

    multiprocessors: int
    capability: int  # 90 for 9.0
    shared_memory: int  # bytes that a block may have


class CudaPlan(NamedTuple):
    """How the CUDA kernels run a call."""

    algorithm: str
    units: int  # of a block
    rows: int
    along_units: int  # blocks: of a cluster, of a team
    along_rows: int  # blocks, clusters, teams, of each direction
    directions: int  # at once

    def __str__(self) -> str:
        block = f"{self.units} units x {self.rows} rows"
        if self.algorithm in ("cluster", "grid"):
            what = "cluster" if self.algorithm == "cluster" else "team"
            number = self.along_rows * self.directions
            some = f"1 {what}" if number == 1 else f"{number} {what}s"
            launch = f"one launch{' for both directions' if self.directions == 2 else ''}"
            return f"{self.algorithm} ({launch}, {some} of {self.along_units} blocks of {block})"
        blocks = f"{self.along_units} x {self.along_rows} blocks of {block}"
        return f"standard (a launch a step, {blocks})"


def cuda_plan(
    request: Request, rows: int, arithmetic: str, backward: bool, device: Device
) -> CudaPlan:
    """The plan for forward or backward; ``arithmetic`` is one of ARITHMETICS. It is a function of
    these facts alone, and needs no GPU."""
    assert _library is not None
    plan = (ctypes.c_int64 * 5)()
    hidden, proj = request.hidden_size, request.proj_size
    directions = 2 if request.bidirectional and request.recompute != "chunks" else 1
    algorithm = _library.frnn_cuda_plan(
        *map(ctypes.c_int64, (rows, hidden, proj or hidden)), len(request.cell.gates),
        ARITHMETICS.index(arithmetic), proj > 0, backward, directions, *device, plan,
    )  # fmt: skip
    return CudaPlan(("standard", "cluster", "grid")[algorithm], *plan)


def unfit_dtype(request: Request) -> str | None:
    if request.dtype in DTYPES:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return f"computes in {names}, got {request.dtype}"


class Ops:
    """What the backends of the CPU and of CUDA share: their tensors go through the same ops."""

    def runs_stack(self, request: Request) -> bool:
        return False

    def __init__(self, cells: Iterable[str]) -> None:
        """``cells``: the first ones of the native library, in its order."""
        self._index = {name: i for i, name in enumerate(cells)}

    def _lacks(self, request: Request) -> str | None:
        """What no device has a kernel for."""
        if request.cell.key not in self._index:
            return f"has no kernel for the cell {request.cell.name}"
        if request.hidden_size == 0:
            return "needs a hidden size of at least 1"
        if request.layer_norm and request.cell.late:
            return f"has no layer norm of the cell {request.cell.name}"
        return None

    def forward(self, call: Call, training: bool) -> Run:
        cell, x, weights, h0, c0, seq, reverse, cell_states, noise = call
        tensors = (x, *weights[:6], h0, c0, *seq, *noise.masks, *weights.norms)
        y, h_n, c_n, c, *reserve = torch.ops.fusedrnn.recurrence_forward(
            *(None if t is None else t.contiguous() for t in tensors),
            self._index[cell.key],
            reverse,
            training,
            cell_states,
            *noise.rates,
        )
        return Run(y, h_n, c_n, c, tuple(reserve))

    def backward(
        self, call: Call, upstream: Upstream, reserve: tuple[Tensor, ...], wanted: Wanted
    ) -> Gradients:
        cell, x, weights, _, c0, seq, reverse, _, noise = call
        dy, dh_n, dc_n, dc = upstream
        w_ih, w_hh, _, _, w_hr, params, *norms = weights
        *of_run, kept = reserve
        tensors = (
            dy, dc, dh_n, dc_n, x, w_ih, w_hh, w_hr, params, *of_run, *seq.masks, *noise.masks,
            *norms, kept,
        )  # fmt: skip
        found = torch.ops.fusedrnn.recurrence_backward(
            *(None if t is None else t.contiguous() for t in tensors),
            self._index[cell.key],
            reverse,
            seq.h_reset is not None,
            *noise.rates,
            *wanted[:6],
            False,
        )
        *of_weights, dparams, dgains, dnorm_c, dh0, dc0, dh_reset, dc_reset = found[:13]
        norms = [None] * 4
        if weights.norm_ih is not None:
            norms[:2] = dgains.sum(1)
        if weights.norm_c is not None:
            norms[2:] = dnorm_c.sum(1)
        if weights.params is not None:
            dparams = dparams.sum(1)
        if seq.h_reset is not None:
            dh_reset = dh_reset.sum(0)
        if seq.c_reset is not None:
            dc_reset = dc_reset.sum(1)
        given = (*wanted[:11], True, *(t is not None for t in (c0, *seq.states)))
        all_of_them = (*of_weights, dparams, *norms, dh0, dc0, dh_reset, dc_reset)
        return Gradients(*(d if g else None for d, g in zip(all_of_them, given, strict=True)))


class Native(Ops):
    """The CPU engine. What has 16 bits outside it stores and computes in float32, but for bfloat16
    where there are AMX tiles: then all is stored in bfloat16 except cell states and running
    gradients, and computed in float32. There, products in float32 are sums of six in bfloat16:
    those of many steps and, from 24 rows on, those of forward's."""

    name = "cpu"
    reads_padding = False
    runs_both = False

    def __init__(self) -> None:
        super().__init__(native_cells())

    def supports(self, request: Request) -> str | None:
        if _missing is not None:
            return _missing
        if request.device.type != "cpu":
            return f"runs on CPU tensors, got {request.device.type}"
        reason = unfit_dtype(request) or self._lacks(request)
        cell = request.cell
        plain = cell.additive and len(cell.states) == 2
        if reason is None and request.cell_update and not plain:
            return f"has no cell update of the cell {cell.name}"
        return reason

    def algorithm(self, request: Request, rows: int) -> str:
        regularised = request.recurrent_dropout or request.zoneout or request.layer_norm
        narrow = self._stores(request.cell, request.dtype, regularised or request.reset_states)
        dtype = request.dtype if narrow else compute_dtype(request.dtype)
        stored = str(dtype).removeprefix("torch.")
        in_parts = isa() == "amx" and dtype == torch.float32 and not request.cell.late
        steps = "in steps B >= 24, or 16 if W_hh is small"
        parts = f"products in bfloat16 parts if T*B >= 128 ({steps}), " if in_parts else ""
        return f"standard on {isa()}, values in {stored}, {parts}one parallel region a sequence"

    def _stores(self, cell: Cell, dtype: torch.dtype, more: bool) -> bool:
        """Whether the engine stores values as they are outside; ``more``: there are regularisers,
        norms or resets into states."""
        if dtype != torch.bfloat16:
            return compute_dtype(dtype) == dtype
        return not more and self._index[cell.key] in _in_bfloat16

    def runs_stack(self, request: Request) -> bool:
        regularised = request.recurrent_dropout or request.zoneout or request.layer_norm
        more = request.bidirectional or request.cell_states or request.reset_states
        if regularised or more or len(request.cell.states) > 2:
            return False
        return self._stores(request.cell, request.dtype, False)

    def forward_stack(
        self, cell: Cell, x: Tensor, weights: list[Weights], hx: tuple[Tensor, ...], seq: Sequence
    ) -> tuple[Tensor, ...]:
        first = weights[0]
        y, h_n, c_n = torch.ops.fusedrnn.stack_forward(
            x.contiguous(),
            [t.contiguous() for w in weights for t in w if t is not None],
            *(s.contiguous() for s in hx),
            *(() if len(hx) > 1 else (None,)),
            *(None if t is None else t.contiguous() for t in seq.masks),
            self._index[cell.key],
            first.b_ih is not None,
            first.w_hr is not None,
        )
        return (y, h_n, c_n)[: 1 + len(hx)]

    def forward(self, call: Call, training: bool) -> Run:
        dtype = call.x.dtype
        noisy = call.noise.rates != (1, 1) or any(m is not None for m in call.noise.masks)
        more = noisy or call.weights.norm_ih is not None or call.seq.h_reset is not None
        # The states that enter may be kept ones, as they are stored, see recompute.
        narrow = self._stores(call.cell, dtype, more) and call.h0.dtype == dtype
        c0 = call.c0
        if narrow and (c0 is None or c0.dtype == dtype or not call.cell.params):
            of_gates = c0 if c0 is None else c0.to(dtype)  # only peepholes see it
            return super().forward(call._replace(c0=of_gates), training)
        *outputs, reserve = super().forward(call.to(compute_dtype(dtype)), training)
        y, h_n, c_n, c = (t.to(dtype) for t in outputs)
        if narrow:
            h_prev, c_prev, *others = reserve
            reserve = h_prev, c_prev, *(t.to(dtype) for t in others)
        return Run(y, h_n, c_n, c, reserve)

    def backward(
        self, call: Call, upstream: Upstream, reserve: tuple[Tensor, ...], wanted: Wanted
    ) -> Gradients:
        dtype, stored = call.x.dtype, reserve[0].dtype
        if stored != dtype:
            call = call.to(stored)
            upstream = Upstream(*(None if d is None else d.to(stored) for d in upstream))
        found = super().backward(call, upstream, reserve, wanted)
        return Gradients(*(None if d is None else d.to(dtype) for d in found))

    def cell_update(
        self, cell: Cell, gates: Tensor, c: Tensor, params: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, c_new = torch.ops.fusedrnn.cell_update(
            *_wide(gates.dtype, gates, c, params), self._index[cell.key]
        )
        return h.to(gates.dtype), c_new.to(c.dtype)

    def cell_update_backward(
        self,
        cell: Cell,
        gates: Tensor,
        c: Tensor,
        params: Tensor | None,
        dh: Tensor | None,
        dc: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dgates, dc_prev, dparams = torch.ops.fusedrnn.cell_update_backward(
            *_wide(gates.dtype, gates, c, params, dh, dc), self._index[cell.key]
        )
        of_units = None if params is None else dparams.sum(1).to(params.dtype)
        return dgates.to(gates.dtype), dc_prev.to(c.dtype), of_units


def _wide(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the engine computes what is stored in ``dtype``, and contiguous."""
    wide = compute_dtype(dtype)
    return tuple(None if t is None else t.to(wide).contiguous() for t in tensors)


def empty_run(
    x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    c0: Tensor | None,
    gates: int,
    planes: int,
    training: bool,
    cell_states: bool,
) -> tuple[Tensor, ...]:
    """The results of a forward op, unset: y, h_n, c_n, c, then the reserve; ``[0]`` if not asked
    for. ``w_hh [G*H,P]`` tells H, by the number of gates."""
    steps, batch, proj = x.shape[0], x.shape[1], w_hh.shape[1]
    hidden, others = w_hh.shape[0] // gates, 0 if c0 is None else c0.shape[0]

    def empty(wanted: bool, *shape: Any, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    wide = compute_dtype(x.dtype)
    return (
        empty(True, steps, batch, proj),
        empty(True, batch, proj),
        empty(c0 is not None, others, batch, hidden),
        empty(cell_states, steps, batch, hidden),
        empty(training, steps, batch, proj),
        empty(training and c0 is not None, others, steps, batch, hidden, dtype=wide),
        empty(training, planes, steps, batch, hidden),
        empty(training and w_hr is not None, steps, batch, hidden),
    )


def empty_gradients(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    saved: Tensor,
    states: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """The results of a backward op but for those of params, unset, in the order of Gradients;
    ``[0]`` if not wanted. On the CPU those of states are as wide as they are computed."""
    batch, hidden = saved.shape[2:]
    want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, want_w_hr = wanted

    def empty(wanted: bool, *shape: Any, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    of_states = _of_states(x)
    return (
        empty(want_x, *x.shape),
        empty(want_w_ih, *w_ih.shape),
        empty(want_w_hh, *w_hh.shape),
        empty(want_b_ih, w_hh.shape[0]),
        empty(want_b_hh, w_hh.shape[0]),
        empty(want_w_hr and w_hr is not None, *(() if w_hr is None else w_hr.shape)),
        empty(True, batch, w_hh.shape[1], dtype=of_states),
        empty(states > 1, states - 1, batch, hidden, dtype=of_states),
    )


def _of_states(x: Tensor) -> torch.dtype:
    return compute_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def _fake_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    params: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
    dropout: Tensor | None,
    renew_h: Tensor | None,
    renew_c: Tensor | None,
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
    cell: int,
    reverse: bool,
    training: bool,
    cell_states: bool,
    rate_h: float,
    rate_c: float,
) -> tuple[Tensor, ...]:
    facts = facts_of(cell)
    run = empty_run(x, w_hh, w_hr, c0, facts.gates, facts.saved, training, cell_states)
    hidden = w_hh.shape[0] // facts.gates
    size = 2 * w_hh.shape[0] + (0 if norm_c is None else hidden) + 3
    kept = x.shape[0] * x.shape[1] * size if training and norm_ih is not None else 0
    return *run, x.new_empty(kept)


def _fake_backward(
    dy: Tensor | None,
    dc: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
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
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
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
    facts = facts_of(cell)
    wanted = want_x, want_w_ih, want_w_hh, want_b_ih, want_b_hh, want_w_hr
    found = empty_gradients(x, w_ih, w_hh, w_hr, saved, facts.states, wanted)
    rows, others = saved.shape[2:], facts.states - 1
    return (
        *found[:6],
        x.new_empty((facts.params, *rows) if facts.params else (0,), dtype=_of_states(x)),
        x.new_empty((0,) if norm_ih is None else (2, rows[0], w_hh.shape[0])),
        x.new_empty((0,) if norm_c is None else (2, *rows)),
        *found[6:],
        x.new_empty((rows[0], w_hh.shape[1]) if reset_states else (0,)),
        x.new_empty((others, *rows) if reset_states and others else (0,)),
        *(x.new_empty((*x.shape[:2], w_hh.shape[0]) if want_gates else (0,)) for _ in range(2)),
        x.new_empty(h_prev.shape if want_gates and w_hr is not None else (0,)),
    )


def _fake_stack(
    x: Tensor,
    weights: list[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
    biases: bool,
    projection: bool,
) -> tuple[Tensor, ...]:
    y = x.new_empty(*x.shape[:2], h0.shape[2])
    return y, torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0)


def _fake_update(
    gates: Tensor, c: Tensor, params: Tensor | None, cell: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(c), torch.empty_like(c)


def _fake_update_backward(
    gates: Tensor,
    c: Tensor,
    params: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    cell: int,
) -> tuple[Tensor, Tensor, Tensor]:
    some = (0,) if params is None else (len(params), *c.shape)
    return torch.empty_like(gates), torch.empty_like(c), c.new_empty(some)


def _fake_mask(
    like: Tensor, seed: Tensor, threshold: int, scale: float, place: int, kind: int
) -> Tensor:
    return like.new_empty(like.shape)


if _library is not None:
    torch.library.register_fake("fusedrnn::mask", _fake_mask)
    torch.library.register_fake("fusedrnn::stack_forward", _fake_stack)
    torch.library.register_fake("fusedrnn::cell_update", _fake_update)
    torch.library.register_fake("fusedrnn::cell_update_backward", _fake_update_backward)
    torch.library.register_fake("fusedrnn::recurrence_forward", _fake_forward)
    torch.library.register_fake("fusedrnn::recurrence_backward", _fake_backward)
