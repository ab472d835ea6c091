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

RESULTS = "y h_n c_n c h_prev c_prev saved m".split()
GRADIENTS = "dgx dgh dh dh0 dc0".split()
Arrays = dict[str, Tensor | None]


def _addresses(arrays: Arrays) -> dict[str, tuple[int, int]]:
    """Address and bytes of each."""
    return {n: (0, 0) if t is None else (t.data_ptr(), t.nbytes) for n, t in arrays.items()}


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

    def forward_both(self, *args: object) -> list[Run]:
        with self._in_place_of_the_library():
            return super().forward_both(*args)

    def backward_both(self, *args: object) -> list[Gradients]:
        with self._in_place_of_the_library():
            return super().backward_both(*args)

    @contextmanager
    def _in_place_of_the_library(self) -> Iterator[None]:
        precision = "tf32" if self.tf32 else "ieee"
        ops = {
            "recurrence_forward": cuda._forward,
            "recurrence_backward": cuda._backward,
            "cuda_recurrences_forward": cuda._both_forward,
            "cuda_recurrences_backward": cuda._both_backward,
            "cuda_forward": self._cuda_forward,
            "cuda_backward": self._cuda_backward,
            "cuda_forward_both": self._cuda_forward_both,
            "cuda_backward_both": self._cuda_backward_both,
            "cuda_product": self._cuda_product,
        }
        with (
            torch.library._scoped_library("fusedrnn", "IMPL") as scope,
            patch.object(cuda, "precision", lambda: precision),
        ):
            for name, op in ops.items():
                scope.impl(name, op, "CPU", allow_override=True)
            yield

    def _cuda_forward(self, *args):
        gx, w_hh, b_hh, w_hr, h0, c0, *masks, cell, reverse, training, cell_states, tf32 = args
        side = _forward_arrays(gx, w_hh, b_hh, w_hr, h0, c0, masks, cell, training, cell_states)
        return self._run("forward", RESULTS, [side], cell, reverse, tf32)

    def _cuda_forward_both(self, *args):
        *tensors, lengths, resets, cell, training, cell_states, tf32 = args
        sides = [
            _forward_arrays(
                gx, w_hh, b_hh, None, h0, c0, (lengths, resets), cell, training, cell_states
            )
            for gx, w_hh, b_hh, h0, c0 in (tensors[:5], tensors[5:])
        ]
        return self._run("forward", RESULTS, sides, cell, False, tf32)

    def _cuda_backward(self, *args):
        *side, lengths, resets, cell, reverse, tf32 = args
        sides = [_backward_arrays(*side, (lengths, resets), cell)]
        return self._run("backward", GRADIENTS, sides, cell, reverse, tf32)

    def _cuda_backward_both(self, *args):
        *tensors, lengths, resets, cell, tf32 = args
        sides = [
            _backward_arrays(
                *upstream, w_hh, None, w_hh_t, None, h_prev, c_prev, saved, (lengths, resets), cell
            )
            for *upstream, w_hh, w_hh_t, h_prev, c_prev, saved in (tensors[:9], tensors[9:])
        ]
        return self._run("backward", GRADIENTS, sides, cell, False, tf32)

    def _run(self, kind, results, sides, cell, reverse, tf32):
        """The results of each side, by its arrays."""
        first = sides[0]
        y = first["y" if kind == "forward" else "h_prev"]
        hidden = first["w_hh"].shape[0] // facts_of(cell).gates
        arrays = [_addresses(side) for side in sides]
        run = getattr(self._module, kind)
        run(cell, _arithmetic(y.dtype, tf32), *y.shape[:2], hidden, y.shape[2], reverse, arrays)
        found = (side[name] for side in sides for name in results)
        return tuple(y.new_empty(0) if t is None else t for t in found)

    def _cuda_product(self, a, b, transpose_a, transpose_b, tf32):
        assert tf32 == self.tf32
        a, b = (to_tf32(a), to_tf32(b)) if tf32 else (a, b)
        return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)


def _forward_arrays(gx, w_hh, b_hh, w_hr, h0, c0, masks, cell, training, cell_states) -> Arrays:
    steps, batch = gx.shape[:2]
    gates, states, planes, *_ = facts_of(cell)
    hidden, out = w_hh.shape[0] // gates, w_hh.shape[1]
    others, inference, wide = states - 1, not training, _wide(gx.dtype)

    def empty(needed: bool, *shape: int, dtype: torch.dtype = gx.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype) if needed else None

    return {
        "gx": gx,
        "w_hh": w_hh,
        "b_hh": b_hh,
        "w_hr": w_hr,
        "h0": h0,
        "c0": c0,
        "lengths": masks[0],
        "resets": masks[1],
        "y": empty(True, steps, batch, out),
        "h_n": empty(True, batch, out),
        "c_n": empty(others > 0, others, batch, hidden),
        "c": empty(cell_states, steps, batch, hidden),
        "h_prev": empty(training, steps, batch, out),
        "c_prev": empty(training, others, steps, batch, hidden, dtype=wide),
        "saved": empty(training, planes, steps, batch, hidden),
        "m": empty(training and w_hr is not None, steps, batch, hidden),
        "h_step": empty(inference, 2, batch, out),
        "states_step": empty(inference, others, batch, hidden, dtype=wide),
        "m_step": empty(inference and w_hr is not None, batch, hidden),
    }


def _backward_arrays(
    dy, dc, dh_n, dc_n, w_hh, w_hr, w_hh_t, w_hr_t, h_prev, c_prev, saved, masks, cell
) -> Arrays:
    steps, batch, out = h_prev.shape
    facts = facts_of(cell)
    hidden, dtype, wide = saved.shape[-1], h_prev.dtype, _wide(h_prev.dtype)
    dgx = torch.empty(steps, batch, facts.gates * hidden, dtype=dtype)
    return {
        "w_hh": w_hh,
        "w_hr": w_hr,
        "w_hh_t": w_hh_t,
        "w_hr_t": w_hr_t,
        "lengths": masks[0],
        "resets": masks[1],
        "dy": dy,
        "dc": dc,
        "dh_n": dh_n,
        "dc_n": dc_n,
        "h_prev": h_prev,
        "c_prev": c_prev,
        "saved": saved,
        "dgx": dgx,
        "dgh": dgx if facts.additive else torch.empty_like(dgx),
        "dh": None if w_hr is None else torch.empty_like(h_prev),
        "dh0": torch.empty(batch, out, dtype=wide),
        "dc0": torch.empty(facts.states - 1, batch, hidden, dtype=wide),
    }
