"""The Triton backend, for any cell with a pair of functions in Triton.

Triton itself is imported when the first kernel is launched.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fusedrnn.backends import cuda
from fusedrnn.backends.backend import Call, Gradients, Request, Run, Upstream, Wanted
from fusedrnn.backends.native import Device, unfit_dtype
from fusedrnn.backends.triton import ops as ops  # registers them
from fusedrnn.backends.triton.plans import Plan, at_once, describe, plan
from fusedrnn.cells import Cell

_missing = None
if importlib.util.find_spec("triton") is None:
    _missing = "needs the package triton"
elif torch.version.cuda is None:
    _missing = f"needs a PyTorch built for CUDA, this one is {torch.__version__}"


class Triton:
    name = "triton"
    reads_padding = True
    runs_both = False

    def supports(self, request: Request) -> str | None:
        return _missing or cuda.unfit(request) or self._lacks(request)

    def _lacks(self, request: Request) -> str | None:
        """What no device has a kernel for."""
        reason = unfit_dtype(request)
        if reason is not None:
            return reason
        alone = isinstance(request.cell.triton, tuple) and request.cell.late  # without what is late
        if request.cell.triton is None or alone:
            return f"has no kernel for the cell {request.cell.name}"
        if request.hidden_size == 0:
            return "needs a hidden size of at least 1"
        weights = len(request.cell.gates) * request.hidden_size**2
        if weights >= 2**31 and not request.cell_update:
            return (
                f"has offsets of 32 bits into the weights, too few for {request.hidden_size} units"
            )
        if request.proj_size:
            return "has no projection"
        if request.layer_norm or request.cell.late:
            on = cuda.device(request.device.index or 0)
            for found in _plans(request, 1, on):
                if found.algorithm == "grid" and not at_once(found, request.hidden_size, on):
                    needed = found.programs(1, request.hidden_size)[1]
                    return (
                        f"needs {needed} multiprocessors for {request.hidden_size} units that meet "
                        f"within a step, CUDA device {request.device.index or 0} has "
                        f"{on.multiprocessors}"
                    )
        if request.cell_update and request.cell.params:
            return f"has no cell update of the cell {request.cell.name}"
        return None

    def runs_stack(self, request: Request) -> bool:
        return False

    def algorithm(self, request: Request, rows: int) -> str:
        tf32 = cuda.uses_tf32(request.dtype, cuda.precision())
        arithmetic = "tf32" if tf32 else str(request.dtype).removeprefix("torch.")
        on = cuda.device(request.device.index or 0)
        forward, backward = (
            describe(found, rows, request.hidden_size, on) for found in _plans(request, rows, on)
        )
        return f"{arithmetic}, forward {forward}, backward {backward}"

    def forward(self, call: Call, training: bool) -> Run:
        cell, x, weights, h0, c0, seq, reverse, cell_states, noise = call
        tensors = (x, *weights[:4], *weights[5:], h0, c0, *seq, *noise.masks)
        y, h_n, c_n, c, *reserve = torch.ops.fusedrnn.triton_forward(
            *_contiguous(*tensors), cell.key, reverse, training, cell_states, *noise.rates
        )
        return Run(y, h_n, c_n, c, tuple(reserve))

    def backward(
        self, call: Call, upstream: Upstream, reserve: tuple[Tensor, ...], wanted: Wanted
    ) -> Gradients:
        cell, x, weights, _, c0, seq, reverse, _, noise = call
        dy, dh_n, dc_n, dc = upstream
        tensors = (dy, dc, dh_n, dc_n, x, *weights[:2], *weights[5:])
        found = torch.ops.fusedrnn.triton_backward(
            *_contiguous(*tensors, *reserve, *seq.masks, *noise.masks), cell.key, reverse,
            seq.h_reset is not None, *noise.rates, *wanted[:5],
        )  # fmt: skip
        *of_weights, of_units, dnorm_ih, dnorm_hh, dh0, dc0, dh_reset, dc_reset = found
        dparams, dnorm_c = of_units[: len(cell.params)], of_units[len(cell.params) :]
        norms = dnorm_ih, dnorm_hh, *(dnorm_c if weights.norm_c is not None else (None, None))
        given = (*wanted[:11], True, *(t is not None for t in (c0, *seq.states)))
        all_of_them = (*of_weights, None, dparams, *norms, dh0, dc0, dh_reset, dc_reset)
        return Gradients(*(d if g else None for d, g in zip(all_of_them, given, strict=True)))

    def cell_update(
        self, cell: Cell, gates: Tensor, c: Tensor, params: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, c = torch.ops.fusedrnn.triton_update(*_contiguous(gates, c), cell.key)
        return h, c

    def cell_update_backward(
        self,
        cell: Cell,
        gates: Tensor,
        c: Tensor,
        params: Tensor | None,
        dh: Tensor | None,
        dc: Tensor | None,
    ) -> tuple[Tensor, Tensor, None]:
        dgates, dc = torch.ops.fusedrnn.triton_update_backward(
            *_contiguous(gates, c, dh, dc), cell.key
        )
        return dgates, dc, None


def _plans(request: Request, rows: int, on: Device) -> list[Plan]:
    """Forward's and backward's."""
    cell, dtype, _, hidden, *_ = request
    return [plan(cell, dtype, hidden, rows, b, on, request.layer_norm) for b in (False, True)]


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
