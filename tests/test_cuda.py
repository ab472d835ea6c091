"""The CUDA backend as far as it can be told without a GPU: its choice, its ops while tracing, and
that its library loads. tests/sim runs the kernels; nothing here does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusedrnn
from fusedrnn.backends import (
    Call,
    Request,
    Sequence,
    Upstream,
    Wanted,
    Weights,
    backward_of,
    by_name,
    cuda,
    forward_of,
    native,
    products,
)
from fusedrnn.cells import LSTM, PLAIN, Cell

pytestmark = pytest.mark.skipif(not native.isas(), reason="no native library")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def present(monkeypatch):
    """A library and a device, as far as the choice of a backend is concerned."""
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "capability", lambda index: {0: (9, 0), 1: (7, 5)}.get(index))
    h200, t4 = native.Device(132, 90, 227 * 1024), native.Device(40, 75, 64 * 1024)
    monkeypatch.setattr(cuda, "device", lambda index: (h200, t4)[index])


def test_explain_tells_the_plan(present):
    def plan(layer, *shape, dtype):
        with FakeTensorMode():
            return str(fusedrnn.explain(layer, torch.empty(shape, dtype=dtype, device=CUDA)))

    layer = fusedrnn.LSTM(1024, 1024, backend="cuda")
    assert plan(layer, 512, 512, 1024, dtype=torch.bfloat16) == (
        "cuda: bfloat16, forward standard (a launch a step, 64 x 8 blocks of 16 units x 64 rows), "
        "backward standard (a launch a step, 32 x 16 blocks of 32 units x 32 rows)"
    )
    layer = fusedrnn.LSTM(8, 100, proj_size=20, batch_first=True, backend="cuda")
    text = plan(layer, 3, 50, 8, dtype=torch.float64)
    assert "13 x 1 blocks of 8 units x 8 rows" in text
    assert "2 x 1 blocks of 16 units x 8 rows" in text
    layer = fusedrnn.GRU(256, 256, backend="cuda")
    assert plan(layer, 512, 128, 256, dtype=torch.float16) == (
        "cuda: float16, forward cluster (one launch, 8 clusters of 8 blocks of 32 units x 16 rows),"
        " backward cluster (one launch, 8 clusters of 8 blocks of 32 units x 16 rows)"
    )
    layer = fusedrnn.LSTM(512, 512, bidirectional=True, backend="cuda")
    clusters = "(one launch for both directions, 8 clusters of 8 blocks of 64 units x 8 rows)"
    assert plan(layer, 512, 32, 512, dtype=torch.bfloat16) == (
        f"cuda: bfloat16, forward cluster {clusters}, backward cluster {clusters}"
    )
    layer.recompute = "chunks"  # whose directions run one after the other
    assert "both" not in plan(layer, 512, 32, 512, dtype=torch.bfloat16)
    layer = fusedrnn.LSTM(1024, 1024, bidirectional=True, backend="cuda")
    assert plan(layer, 512, 8, 1024, dtype=torch.bfloat16) == (
        "cuda: bfloat16, "
        "forward grid (one launch for both directions, 2 teams of 64 blocks of 16 units x 8 rows), "
        "backward grid (one launch, 1 team of 64 blocks of 16 units x 8 rows)"
    )
    assert plan(fusedrnn.LSTM(1024, 1024, backend="cuda"), 512, 128, 1024, dtype=torch.float16) == (
        "cuda: float16, "
        "forward grid (one launch, 2 teams of 64 blocks of 16 units x 64 rows), "
        "backward grid (one launch, 1 team of 64 blocks of 16 units x 128 rows)"
    )
    assert "one launch, 1 cluster of 1 blocks of 64 units x 8 rows" in plan(
        fusedrnn.LSTM(8, 64, backend="cuda"), 512, 3, 8, dtype=torch.bfloat16
    )


UNKNOWN = Cell("unknown", gates="a", states="h", saved=1, additive=True, step=LSTM.step)
REASONS = {
    "cpu": (Request(LSTM, torch.float32, torch.device("cpu"), 8, 0), "CUDA tensors, got cpu"),
    "absent": (Request(LSTM, torch.float32, torch.device("cuda", 2), 8, 0), "finds no GPU"),
    "old": (Request(LSTM, torch.float32, torch.device("cuda", 1), 8, 0), "device 1 has 7.5"),
    "dtype": (Request(LSTM, torch.complex64, CUDA, 8, 0), "float64, got torch.complex64"),
    "hidden": (Request(LSTM, torch.float32, CUDA, 0, 0), "hidden size of at least 1"),
    "resets": (
        Request(LSTM, torch.float32, CUDA, 8, 0, resets=True, reset_states=True),
        "enters zeros at resets",
    ),
    "cell": (Request(UNKNOWN, torch.float32, CUDA, 8, 0), "no kernel for the cell unknown"),
}


@pytest.mark.parametrize("request_, reason", REASONS.values(), ids=list(REASONS))
def test_reasons(present, request_, reason):
    assert reason in by_name("cuda").supports(request_)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_supports(present, cell, dtype):
    assert by_name("cuda").supports(Request(cell, dtype, CUDA, 8, 0)) is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_reason_on_a_pytorch_without_cuda():
    with pytest.raises(RuntimeError, match=r"'cuda' needs a PyTorch built for CUDA, this one is "):
        fusedrnn.LSTM(3, 4, backend="cuda")(torch.randn(5, 2, 3))


@pytest.mark.parametrize("value", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_tf32_only_where_it_is_asked_for(dtype, value):
    assert cuda.uses_tf32(dtype, value) == (dtype == torch.float32 and value == "tf32")


def test_precision_follows_pytorch():
    """Its own setting of recurrent layers, or that of cuDNN."""
    cudnn = torch.backends.cudnn
    before = cudnn.fp32_precision, cudnn.rnn.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            cudnn.fp32_precision, cudnn.rnn.fp32_precision = setting, "none"
            assert cuda.precision() == setting
            cudnn.rnn.fp32_precision = "tf32"
            assert cuda.precision() == "tf32"
    finally:
        cudnn.fp32_precision, cudnn.rnn.fp32_precision = before


# Of float16: the largest gradient, and what all are multiplied by.
SCALES = {65504.0: 1.0, 1.0: 1.0, 0.5: 1.0, 0.4: 2.0, 2**-12: 2**11, 2**-24: 2**15, 0.0: 2**15}


@pytest.mark.parametrize("largest, expected", SCALES.items())
def test_scale_of_float16(largest, expected):
    half = torch.tensor([largest, -largest / 2], dtype=torch.float16)
    scale, (dy, none, dh) = products.scaled((half / 2, None, half))
    assert none is None and scale == expected
    assert torch.equal(dy, half / 2 * expected) and torch.equal(dh, half * expected)
    assert dy.dtype == torch.float16 and dh.abs().max() < max(1, 2 * largest)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scale_keeps_what_is_not_finite(value):
    _, (dy,) = products.scaled((torch.tensor([1.0, value], dtype=torch.float16),))
    expected = torch.tensor([1.0, value], dtype=torch.float16)
    torch.testing.assert_close(dy, expected, rtol=0, atol=0, equal_nan=True)


def test_scale_is_of_float16_alone():
    dy = torch.ones(1, dtype=torch.bfloat16)
    none = torch.empty(3, 0, 4, dtype=torch.float16)
    assert products.scaled((None, dy)) == (None, (None, dy))
    assert products.scaled((None,))[0] is None and products.scaled((none,))[0] is None


def library():
    """The one that is installed, or that `make cuda` built."""
    gate = Path(__file__).parents[1] / "build" / "cuda" / "_C_cuda.so"
    for path in (cuda.LIBRARY, gate):
        if path.exists():
            return path
    pytest.skip("the CUDA kernels are not built")


LOADS = """
import sys, torch, fusedrnn
torch.ops.load_library(sys.argv[1])
for name in ("cuda_forward", "cuda_backward", "cuda_forward_both", "cuda_backward_both",
             "cuda_product"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedrnn::{name}", "CUDA"), name
assert not torch.cuda.is_initialized()
"""


def test_library_loads_without_a_driver():
    subprocess.run([sys.executable, "-c", LOADS, library()], check=True)


def test_library_is_given_dense_matrices():
    def product(a, b, transpose_a, transpose_b, _tf32):
        assert a.is_contiguous() and b.is_contiguous()
        return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)

    r = torch.randn
    with torch.library._scoped_library("fusedrnn", "IMPL") as scope:
        scope.impl("cuda_product", product, "CPU")
        for a in (r(3, 5), r(5, 3).t(), r(3, 0), r(9, 5)[::3], r(1, 5), r(3, 1).t()):
            k = a.shape[1]
            for b in (r(k, 4), r(4, k).t(), r(k, 1), r(1, k).t()):
                torch.testing.assert_close(cuda._product(a, b), a @ b)


# A PyTorch without CUDA neither indexes nor differentiates fake CUDA tensors, so that tracing stops
# at a backend here, and a whole layer is traced on the CPU (test_compile.py): by the same ops.
def fake_call(dtype, cell, hidden, proj):
    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device=CUDA)

    rows, out = len(cell.gates) * hidden, proj or hidden
    w_hr = empty(proj, hidden) if proj else None
    weights = Weights(empty(rows, 3), empty(rows, out), empty(rows), empty(rows), w_hr)
    others = len(cell.states) - 1
    c0 = empty(others, 2, hidden) if others else None
    x, h0 = empty(5, 2, 3), empty(2, out)
    return Call(cell, x, weights, h0, c0, Sequence(), False, others > 0)


def there_and_back(calls):
    """Forward and backward of calls on fake tensors by the cuda backend."""
    backend = by_name("cuda")
    runs = forward_of(backend, calls, True)
    upstreams = [Upstream(run.y, None, None, None) for run in runs]
    has_proj = calls[0].weights.w_hr is not None
    wanted = Wanted(*(True,) * 5, has_proj, *(False,) * 5, True, True, False, False)
    reserves = [run.reserve for run in runs]
    return runs, backward_of(backend, calls, upstreams, reserves, [wanted] * len(calls))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_fake_tensors(cell, dtype, directions):
    """Results have the dtype of the inputs; only the c that backward reads is not rounded to it."""
    proj = 4 if cell.name == "lstm" and directions == 1 else 0
    with FakeTensorMode():
        calls = [fake_call(dtype, cell, 8, proj) for _ in range(directions)]
        runs, found = there_and_back(calls)
    wide = dtype if dtype == torch.float64 else torch.float32
    for call, run, gradients in zip(calls, runs, found, strict=True):
        h_prev, c_prev, saved, m, _ = run.reserve
        assert c_prev.dtype == wide
        assert {t.dtype for t in (*run[:4], h_prev, saved, m)} == {dtype}
        assert {t.device for t in (*run[:4], *run.reserve)} == {CUDA}
        for value, gradient in zip(call.tensors, gradients, strict=True):
            assert (value is None) == (gradient is None)
            if value is not None:
                assert (value.shape, value.dtype) == (gradient.shape, gradient.dtype)


OPS = {
    1: ["recurrence_forward", "recurrence_backward"],
    2: ["cuda_recurrences_forward", "cuda_recurrences_backward"],
}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tracing_leaves_the_precision_to_the_run(dtype, directions):
    """All products are inside ops, none of which has the precision as an argument."""

    def dw_ih():
        calls = [fake_call(dtype, LSTM, 8, 0) for _ in range(directions)]
        return there_and_back(calls)[1][0].w_ih

    with FakeTensorMode():
        graph = make_fx(dw_ih)().graph
    ops = [str(node.target) for node in graph.nodes if re.search(r"fusedrnn|mm", str(node.target))]
    assert ops == [f"fusedrnn.{name}.default" for name in OPS[directions]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_choice_is_traced(monkeypatch):
    monkeypatch.setattr(cuda, "_missing", None)

    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        reason = by_name("cuda").supports(Request(LSTM, x.dtype, CUDA, 8, 0))
        return x + 1 if reason == "finds no GPU" else x

    assert choose(torch.zeros(())) == 1
