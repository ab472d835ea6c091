"""The CUDA backend on CPU tensors: the simulator runs its kernels, PyTorch its other products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from fusedrnn.backends import Gradients, Request, Run, cuda
from fusedrnn.backends.native import ARITHMETICS, facts_of
from fusedrnn.testing import to_tf32


def _arrays(**tensors: Tensor | None) -> dict[str, tuple[int, int]]:
    """Address and bytes of each."""
    return {n: (0, 0) if t is None else (t.data_ptr(), t.nbytes) for n, t in tensors.items()}


def _arithmetic(dtype: torch.dtype, tf32: bool) -> int:
    return ARITHMETICS.index("tf32" if tf32 else str(dtype).removeprefix("torch."))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Simulated(cuda.Cuda):
    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self._module, self.tf32 = module, False

    def choose(self, arithmetic: str) -> torch.dtype:
        """Computes float32 in tf32 or as it is; returns the dtype of storage."""
        self.tf32 = arithmetic == "tf32"
        return torch.float32 if self.tf32 else getattr(torch, arithmetic)

    def supports(self, request: Request) -> str | None:
        return None

    def forward(self, *args: object) -> Run:
        with self._in_place_of_the_library():
            return super().forward(*args)

    def backward(self, *args: object) -> Gradients:
        with self._in_place_of_the_library():
            return super().backward(*args)

    @contextmanager
    def _in_place_of_the_library(self) -> Iterator[None]:
        precision = "tf32" if self.tf32 else "ieee"
        ops = {
            "recurrence_forward": cuda._forward,
            "recurrence_backward": cuda._backward,
            "cuda_forward": self._cuda_forward,
            "cuda_backward": self._cuda_backward,
            "cuda_product": self._cuda_product,
        }
        with (
            torch.library._scoped_library("fusedrnn", "IMPL") as scope,
            patch.object(cuda, "precision", lambda: precision),
        ):
            for name, op in ops.items():
                scope.impl(name, op, "CPU", allow_override=True)
            yield

    def _cuda_forward(
        self, gx, w_hh, b_hh, w_hr, h0, c0, lengths, resets, cell, reverse, training, cell_states,
        tf32,
    ):  # fmt: skip
        steps, batch = gx.shape[:2]
        gates, states, planes, *_ = facts_of(cell)
        hidden, out = w_hh.shape[0] // gates, w_hh.shape[1]
        others, inference, wide = states - 1, not training, _wide(gx.dtype)

        def empty(needed: bool, *shape: int, dtype: torch.dtype = gx.dtype) -> Tensor | None:
            return torch.empty(shape, dtype=dtype) if needed else None

        kept = {
            "y": empty(True, steps, batch, out),
            "h_n": empty(True, batch, out),
            "c_n": empty(others > 0, others, batch, hidden),
            "c": empty(cell_states, steps, batch, hidden),
            "h_prev": empty(training, steps, batch, out),
            "c_prev": empty(training, others, steps, batch, hidden, dtype=wide),
            "saved": empty(training, planes, steps, batch, hidden),
            "m": empty(training and w_hr is not None, steps, batch, hidden),
        }
        between = {
            "h_step": empty(inference, 2, batch, out),
            "states_step": empty(inference, others, batch, hidden, dtype=wide),
            "m_step": empty(inference and w_hr is not None, batch, hidden),
        }
        arrays = _arrays(
            gx=gx, w_hh=w_hh, b_hh=b_hh, w_hr=w_hr, h0=h0, c0=c0, lengths=lengths, resets=resets,
            **kept, **between,
        )  # fmt: skip
        arithmetic = _arithmetic(gx.dtype, tf32)
        self._module.forward(cell, arithmetic, steps, batch, hidden, out, reverse, arrays)
        return tuple(gx.new_empty(0) if t is None else t for t in kept.values())

    def _cuda_backward(
        self, dy, dc, dh_n, dc_n, w_hh, w_hr, w_hh_t, w_hr_t, h_prev, c_prev, saved, lengths,
        resets, cell, reverse, tf32,
    ):  # fmt: skip
        steps, batch, out = h_prev.shape
        facts = facts_of(cell)
        gates, states, additive = facts.gates, facts.states, facts.additive
        hidden, dtype, wide = saved.shape[-1], h_prev.dtype, _wide(h_prev.dtype)
        dgx = torch.empty(steps, batch, gates * hidden, dtype=dtype)
        dgh = dgx if additive else torch.empty_like(dgx)
        dh = None if w_hr is None else torch.empty_like(h_prev)
        dh0 = torch.empty(batch, out, dtype=wide)
        dc0 = torch.empty(states - 1, batch, hidden, dtype=wide)
        arrays = _arrays(
            w_hh=w_hh, w_hr=w_hr, lengths=lengths, resets=resets, dy=dy, dc=dc, dh_n=dh_n,
            dc_n=dc_n, h_prev=h_prev, c_prev=c_prev, saved=saved, dgx=dgx, dgh=dgh, dh0=dh0,
            dc0=dc0, dh=dh, w_hh_t=w_hh_t, w_hr_t=w_hr_t,
        )  # fmt: skip
        arithmetic = _arithmetic(dtype, tf32)
        self._module.backward(cell, arithmetic, steps, batch, hidden, out, reverse, arrays)
        none = dgx.new_empty(0)
        return dgx, none if additive else dgh, none if dh is None else dh, dh0, dc0

    def _cuda_product(self, a, b, transpose_a, transpose_b, tf32):
        assert tf32 == self.tf32
        a, b = (to_tf32(a), to_tf32(b)) if tf32 else (a, b)
        return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)
