"""The CUDA kernels as a backend on CPU tensors, run by the simulator."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.backends import Request, Run, Sequence, Weights
from fusedrnn.backends.backend import Grads
from fusedrnn.backends.native import native_cells
from fusedrnn.cells import Cell

# In the order of frnn::cuda::Arithmetic.
ARITHMETICS = ["float16", "bfloat16", "tf32", "float32", "float64"]


def _addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}


class Simulated:
    name = "cuda"
    algorithm = "standard"

    def __init__(self, module: ModuleType) -> None:
        self._module, self.tf32 = module, False
        self._facts = native_cells()

    def choose(self, arithmetic: str) -> torch.dtype:
        """Computes float32 in tf32 or as it is; returns the dtype of storage."""
        self.tf32 = arithmetic == "tf32"
        return torch.float32 if self.tf32 else getattr(torch, arithmetic)

    def supports(self, request: Request) -> str | None:
        return None

    def _call(self, cell: Cell, dtype: torch.dtype) -> tuple[int, int]:
        name = "tf32" if self.tf32 else str(dtype).removeprefix("torch.")
        return list(self._facts).index(cell.name), ARITHMETICS.index(name)

    def forward(
        self,
        cell: Cell,
        x: Tensor,
        weights: Weights,
        h0: Tensor,
        c0: Tensor | None,
        seq: Sequence,
        reverse: bool,
        training: bool,
        cell_states: bool,
    ) -> Run:
        w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else w.contiguous() for w in weights)
        steps, batch = x.shape[:2]
        gates, states, planes, additive = self._facts[cell.name]
        hidden, out = w_hh.shape[0] // gates, w_hh.shape[1]
        bias = b_ih + b_hh if additive and b_ih is not None else b_ih
        state_dtype = torch.float32 if x.dtype.itemsize == 2 else x.dtype

        def empty(needed: bool, *shape: int, dtype: torch.dtype = x.dtype) -> Tensor | None:
            return torch.empty(shape, dtype=dtype) if needed else None

        others, inference = states - 1, not training
        kept = {
            "y": empty(True, steps, batch, out),
            "h_n": empty(True, batch, out),
            "c_n": empty(others > 0, others, batch, hidden),
            "c": empty(cell_states, steps, batch, hidden),
            "h_prev": empty(training, steps, batch, out),
            "c_prev": empty(training, others, steps, batch, hidden, dtype=state_dtype),
            "saved": empty(training, planes, steps, batch, hidden),
            "m": empty(training and w_hr is not None, steps, batch, hidden),
        }
        between = {
            "h_step": empty(inference, 2, batch, out),
            "states_step": empty(inference, others, batch, hidden, dtype=state_dtype),
            "m_step": empty(inference and w_hr is not None, batch, hidden),
        }
        gx = F.linear(x, w_ih, bias).contiguous()
        h0, c0 = h0.contiguous(), None if c0 is None else c0.contiguous()
        lengths, resets = (None if t is None else t.contiguous() for t in seq)
        arrays = _addresses(
            gx=gx, w_hh=w_hh, b_hh=b_hh, w_hr=w_hr, h0=h0, c0=c0, lengths=lengths, resets=resets,
            **kept, **between,
        )  # fmt: skip
        self._module.forward(*self._call(cell, x.dtype), steps, batch, hidden, out, reverse, arrays)
        none = x.new_empty(0)
        y, h_n, c_n, c, h_prev, c_prev, saved, m = (none if t is None else t for t in kept.values())
        return Run(y, h_n, c_n, c, h_prev, m, (c_prev, saved))

    def backward(
        self,
        cell: Cell,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dc: Tensor | None,
        weights: Weights,
        seq: Sequence,
        reverse: bool,
        run: Run,
    ) -> Grads:
        w_hh, w_hr = weights.w_hh, weights.w_hr
        c_prev, saved = run.reserve
        steps, batch, out = run.h_prev.shape
        gates, states, _, additive = self._facts[cell.name]
        hidden, dtype = w_hh.shape[0] // gates, w_hh.dtype
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        dgx = torch.empty(steps, batch, gates * hidden, dtype=dtype)
        dgh = dgx if additive else torch.empty_like(dgx)
        dh0 = torch.empty(batch, out, dtype=wide)
        dc0 = torch.empty(states - 1, batch, hidden, dtype=wide)
        dh = None if w_hr is None else torch.empty(steps, batch, out, dtype=dtype)
        w_hh_t = w_hh.t().contiguous()
        w_hr_t = None if w_hr is None else w_hr.t().contiguous()
        lengths, resets = (None if t is None else t.contiguous() for t in seq)
        given = (None if t is None else t.contiguous() for t in (dy, dc, dh_n, dc_n))
        dy, dc, dh_n, dc_n = given
        arrays = _addresses(
            w_hh=w_hh, w_hr=w_hr, lengths=lengths, resets=resets, dy=dy, dc=dc, dh_n=dh_n,
            dc_n=dc_n, h_prev=run.h_prev, c_prev=c_prev, saved=saved, dgx=dgx, dgh=dgh, dh0=dh0,
            dc0=dc0, dh=dh, w_hh_t=w_hh_t, w_hr_t=w_hr_t,
        )  # fmt: skip
        self._module.backward(*self._call(cell, dtype), steps, batch, hidden, out, reverse, arrays)
        none = dgx.new_empty(0)
        return Grads(dgx, dgh, dh0.to(dtype), dc0.to(dtype), none if dh is None else dh)
