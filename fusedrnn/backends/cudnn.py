"""The cuDNN backend: what torch.nn's layers run on a GPU, one layer and direction a call.

The reverse direction is the forward one over flipped time: cuDNN has it only beside the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn.backends.backend import (
    Call,
    Gradients,
    Request,
    Run,
    Upstream,
    Wanted,
    Weights,
)
from fusedrnn.cells import Cell

MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # of cudnnRNNMode_t
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BFLOAT16_SINCE = 91300  # PyTorch's own bound: older versions of cuDNN lack it or are slow in it

_missing = (
    None
    if torch.version.cuda is not None and torch.backends.cudnn.is_available()
    else f"needs a PyTorch built with cuDNN, this one is {torch.__version__}"
)


class Cudnn:
    name = "cudnn"
    reads_padding = True
    runs_both = False

    def supports(self, request: Request) -> str | None:
        if _missing is not None:
            return _missing
        if request.device.type != "cuda":
            return f"runs on CUDA tensors, got {request.device.type}"
        if torch.compiler.is_compiling():
            return "cannot be traced, since the size of what it saves is known only when it runs"
        if not torch.backends.cudnn.enabled:
            return "is switched off by torch.backends.cudnn.enabled"
        if request.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"computes in {names}, got {request.dtype}"
        if request.dtype == torch.bfloat16:
            version = torch.backends.cudnn.version() or 0
            if version < BFLOAT16_SINCE:
                return f"computes in bfloat16 from cuDNN {BFLOAT16_SINCE} on, this one is {version}"
        if request.cell.key not in MODES:
            return f"has no kernel for the cell {request.cell.name}"
        if request.hidden_size == 0:
            return "needs a hidden size of at least 1"
        if request.recompute == "gates":
            return "keeps the gates in a buffer of its own"
        if request.empty:
            return "needs a batch and an input size of at least 1"
        for name in (
            "lengths",
            "resets",
            "cell_states",
            "cell_update",
            "recurrent_dropout",
            "zoneout",
            "layer_norm",
        ):
            if getattr(request, name):
                return f"has no {name.replace('_', ' ')}"
        return None

    def runs_stack(self, request: Request) -> bool:
        return False

    def algorithm(self, request: Request, rows: int) -> str:
        return "cuDNN's choice"

    def forward(self, call: Call, training: bool) -> Run:
        cell, x, weights, h0, c0, _, reverse, *_ = call
        given = _given(weights)
        output, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(
            _in_time(x, reverse), given, len(given), _packed(cell, x, weights), *_states(h0, c0),
            *_layout(cell, weights, training),
        )  # fmt: skip
        # The caller is free to edit y, and backward reads output.
        y = output.clone() if training and not reverse else _in_time(output, reverse)
        h_n.squeeze_(0)  # in place, since a result must not be a view
        return Run(y, h_n, c_n, x.new_empty(0), (output, reserve) if training else ())

    def backward(
        self, call: Call, upstream: Upstream, reserve: tuple[Tensor, ...], wanted: Wanted
    ) -> Gradients:
        cell, x, weights, h0, c0, _, reverse, *_ = call
        output, saved = reserve
        given = _given(weights)
        dy = torch.zeros_like(output) if upstream.y is None else _in_time(upstream.y, reverse)
        dh_n = None if upstream.h_n is None else upstream.h_n.unsqueeze(0)
        mask = (wanted.x, wanted.h0, wanted.c0, any(wanted[1:6]))
        dx, dh0, dc0, found = torch.ops.aten._cudnn_rnn_backward(
            _in_time(x, reverse), given, len(given), _packed(cell, x, weights), *_states(h0, c0),
            output, dy, dh_n, upstream.c_n, *_layout(cell, weights, True),
            saved.clone(),  # cuDNN writes into it, and there may be a second backward
            mask,
        )  # fmt: skip
        of_given = iter(found)  # none if no weight's gradient is wanted
        of_weights = [None if w is None else next(of_given, None) for w in weights]
        dx = _in_time(dx, reverse) if wanted.x else None
        dh0 = dh0.squeeze(0) if wanted.h0 else None
        return Gradients(*(dx, *of_weights, dh0, dc0 if wanted.c0 else None, None, None))


def _in_time(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(0) if reverse else x


def _given(weights: Weights) -> list[Tensor]:
    return [w for w in weights if w is not None]


def _states(h0: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return h0.unsqueeze(0).contiguous(), None if c0 is None else c0.contiguous()


def _sizes(cell: Cell, weights: Weights) -> tuple[int, int, int, int]:
    """Mode, hidden size, projection size (0: none) and number of layers."""
    proj = 0 if weights.w_hr is None else weights.w_hr.shape[0]
    return MODES[cell.key], weights.w_hh.shape[0] // len(cell.gates), proj, 1


def _layout(cell: Cell, weights: Weights, training: bool) -> tuple[object, ...]:
    """The arguments from the mode on to the state of dropout, as forward and backward share
    them: time first, no dropout, one direction, no packed batch."""
    return *_sizes(cell, weights), False, 0.0, training, False, (), None


def _packed(cell: Cell, x: Tensor, weights: Weights) -> Tensor:
    """The weights in the one buffer that cuDNN reads. The op points the tensors it is given into
    that buffer; ``data`` gives it others than the caller's, which stay where they are.

    Backward packs them anew: kept from forward, a loop over a cell would hold a copy per step.
    """
    given = [w.data for w in _given(weights)]
    out: Tensor = torch.ops.aten._cudnn_rnn_flatten_weight(
        given, len(given), x.shape[2], *_sizes(cell, weights), False, False
    )
    return out
