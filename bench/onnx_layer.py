"""torch.nn's layer run by ONNX Runtime, where that and the package onnx are installed."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable

import torch
from workload import Workload, flat


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def forward(work: Workload) -> Callable[[], object] | None:
    """What is timed, on as many threads as torch has; None where ONNX has no such layer, or another
    way to call it. Raises ValueError if its outputs are not torch.nn's."""
    shape = work.shape
    if work.dtype != torch.float32 or shape.proj or shape.packed or shape.calls > 1:
        return None
    import onnxruntime

    hx = tuple(work.states) if len(work.states) > 1 else work.states[0]
    names = ["x", *(f"state{i}" for i in range(len(work.states)))]
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of what holds for one batch size only
        arguments = (work.x, hx)
        torch.onnx.export(work.theirs, arguments, file, dynamo=False, input_names=names)
        expected = flat(*work.theirs(work.x, hx))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads keep the cores busy for a while after a call, which is the other side's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    inputs = dict(zip(names, (t.numpy() for t in (work.x, *work.states)), strict=True))
    for found, tensor in zip(session.run(None, inputs), expected, strict=True):
        if not torch.allclose(torch.from_numpy(found), tensor, rtol=1e-3, atol=1e-4):
            raise ValueError(f"{shape.name}: ONNX Runtime's outputs are not torch.nn's")
    return lambda: session.run(None, inputs)
