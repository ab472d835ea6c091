"""What the Triton backend tells without running anything: its choice and its plans."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fusedrnn
from fusedrnn.backends import Request, cuda
from fusedrnn.backends import triton as backend
from fusedrnn.backends.native import DTYPES, Device
from fusedrnn.backends.triton.plans import at_once, plan
from fusedrnn.cells import CELLS, GRU_RESET_BEFORE, LSTM


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(backend, "_missing", None)
    monkeypatch.setattr(cuda, "capability", lambda i: {0: (9, 0), 1: (7, 5)}.get(i))
    monkeypatch.setattr(cuda, "device", lambda i: GPUS["sm_90"])


FUSED = {name: cell for name, cell in CELLS.items() if cell.triton}
LATE = replace(LSTM, name="late", late=1, triton=("forward", "backward"))
UNKNOWN = replace(LSTM, name="unknown", triton=None)
GPU = torch.device("cuda", 0)
REASONS = {
    "cpu": (Request(LSTM, torch.float32, torch.device("cpu"), 8, 0), "CUDA tensors, got cpu"),
    "absent": (Request(LSTM, torch.float32, torch.device("cuda", 2), 8, 0), "finds no GPU"),
    "old": (Request(LSTM, torch.float32, torch.device("cuda", 1), 8, 0), "device 1 has 7.5"),
    "dtype": (Request(LSTM, torch.complex64, GPU, 8, 0), "float64, got torch.complex64"),
    "hidden": (Request(LSTM, torch.float32, GPU, 0, 0), "hidden size of at least 1"),
    "projection": (Request(LSTM, torch.float32, GPU, 8, 4), "has no projection"),
    "huge": (Request(LSTM, torch.float32, GPU, 23171, 0), "into the weights, too few for 23171"),
    "cell": (Request(UNKNOWN, torch.float32, GPU, 8, 0), "no kernel for the cell unknown"),
    "late": (Request(LATE, torch.float32, GPU, 8, 0), "no kernel for the cell late"),
    "meets": (Request(GRU_RESET_BEFORE, torch.float32, GPU, 4264, 0), "needs 134 multiprocessors"),
}


@pytest.mark.parametrize("request_, reason", REASONS.values(), ids=list(REASONS))
def test_reasons(present, request_, reason):
    assert reason in backend.Triton().supports(request_)


def test_reason_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "_missing", "needs the package triton")
    with pytest.raises(RuntimeError, match="backend 'triton' needs the package triton"):
        fusedrnn.LSTM(3, 4, backend="triton")(torch.randn(5, 2, 3))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_reason_on_a_pytorch_without_cuda():
    with pytest.raises(RuntimeError, match="'triton' needs a PyTorch built for CUDA, this one is"):
        fusedrnn.LSTM(3, 4, backend="triton")(torch.randn(5, 2, 3))


def test_a_package_without_triton():
    """Imports, and runs by other backends."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fusedrnn; fusedrnn.LSTM(3, 4)(torch.randn(5, 2, 3))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explain_tells_the_plan(present):
    request = Request(LSTM, torch.bfloat16, GPU, 128, 0)
    assert backend.Triton().algorithm(request, 40) == (
        "bfloat16, forward sequence (one launch, 1 x 3 programs of 128 units x 16 rows), "
        "backward sequence (one launch, 1 x 3 programs of 128 units x 16 rows)"
    )
    text = backend.Triton().algorithm(request._replace(hidden_size=1024), 16)
    assert text.startswith("bfloat16, forward grid (one launch, 64 x 1 programs of 16 units x 16")
    text = backend.Triton().algorithm(request._replace(hidden_size=2048), 512)
    assert text.startswith("bfloat16, forward step (a launch a step, 64 x 8 programs of 32 units")


GPUS = {
    "sm_80": Device(108, 80, 163 * 1024),
    "sm_86": Device(28, 86, 99 * 1024),
    "sm_90": Device(132, 90, 227 * 1024),
    "sm_100": Device(148, 100, 227 * 1024),
    "mig": Device(16, 90, 227 * 1024),
}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_plans(gpu):
    for cell in FUSED.values():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for hidden in (1, 16, 17, 64, 100, 128, 129, 256, 1024, 4096):
                for backward in (False, True):
                    rows = (1, 16, 17, 300, 5000)
                    found = [plan(cell, dtype, hidden, b, backward, gpu) for b in rows]
                    for b, how in zip(rows, found, strict=True):
                        programs = how.programs(b, hidden)
                        if how.algorithm == "sequence":  # one kernel for any number of rows
                            assert found == [how] * len(rows) and programs[1] == 1
                            weights = len(cell.gates) * how.block_h**2 * dtype.itemsize
                            assert weights < gpu.shared_memory
                        elif how.algorithm == "grid":
                            rows_at_once = min(programs[0], at_once(how, hidden, gpu))
                            assert rows_at_once * programs[1] <= gpu.multiprocessors
                            assert rows_at_once == programs[0] or cell.late
                        assert how.options["maxnreg"] * 32 * how.warps <= 65536


def test_plans_of_the_sizes_that_matter():
    def algorithm(gpu, cell, dtype, hidden, rows=32):
        return plan(CELLS[cell], dtype, hidden, rows, True, GPUS[gpu]).algorithm

    for gpu in ("sm_80", "sm_90", "sm_100"):
        assert algorithm(gpu, "lstm", torch.bfloat16, 128) == "sequence"
        assert algorithm(gpu, "lstm", torch.float32, 64) == "sequence"
        assert algorithm(gpu, "lstm", torch.bfloat16, 1024) == "grid"
    assert algorithm("sm_86", "lstm", torch.bfloat16, 64) == "sequence"
    assert algorithm("sm_90", "rnn_tanh", torch.bfloat16, 256) == "sequence"
    assert algorithm("mig", "lstm", torch.bfloat16, 2048) == "step"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", FUSED.values(), ids=lambda c: c.name)
def test_supports(present, cell, dtype):
    assert backend.Triton().supports(Request(cell, dtype, GPU, 8, 0)) is None
