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
from fusedrnn.backends import Request, Sequence, Weights, by_name, cuda, native
from fusedrnn.cells import CELLS, LSTM, Cell
from fusedrnn.testing import Case, make_inputs

pytestmark = pytest.mark.skipif(not native.isas(), reason="no native library")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def present(monkeypatch):
    """A library and a device, as far as the choice of a backend is concerned."""
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "capability", lambda index: {0: (9, 0), 1: (7, 5)}.get(index))


UNKNOWN = Cell("unknown", gates="a", states="h", saved=1, additive=True, step=LSTM.step)
REASONS = {
    "cpu": (Request(LSTM, torch.float32, torch.device("cpu"), 8, 0), "CUDA tensors, got cpu"),
    "absent": (Request(LSTM, torch.float32, torch.device("cuda", 2), 8, 0), "finds no GPU"),
    "old": (Request(LSTM, torch.float32, torch.device("cuda", 1), 8, 0), "device 1 has 7.5"),
    "dtype": (Request(LSTM, torch.complex64, CUDA, 8, 0), "float64, got torch.complex64"),
    "hidden": (Request(LSTM, torch.float32, CUDA, 0, 0), "hidden size of at least 1"),
    "cell": (Request(UNKNOWN, torch.float32, CUDA, 8, 0), "no kernel for the cell unknown"),
}


@pytest.mark.parametrize("request_, reason", REASONS.values(), ids=list(REASONS))
def test_reasons(present, request_, reason):
    assert reason in by_name("cuda").supports(request_)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_supports(present, cell, dtype):
    assert by_name("cuda").supports(Request(cell, dtype, CUDA, 8, 0)) is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_reason_on_a_pytorch_without_cuda():
    with pytest.raises(RuntimeError, match=r"'cuda' needs a PyTorch built for CUDA, this one is "):
        fusedrnn.LSTM(3, 4, backend="cuda")(torch.randn(5, 2, 3))


@pytest.mark.parametrize("value", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_tf32_only_where_it_is_asked_for(dtype, value):
    assert cuda.uses_tf32(dtype, value) == (dtype == torch.float32 and value == "tf32")


def test_precision_follows_pytorch():
    """Its own setting of recurrent layers, or that of cuDNN; by default cuDNN uses tf32."""
    cudnn = torch.backends.cudnn
    assert cuda.precision() == "tf32"
    try:
        cudnn.fp32_precision = "ieee"
        assert cuda.precision() == "ieee"
        cudnn.rnn.fp32_precision = "tf32"
        assert cuda.precision() == "tf32"
    finally:
        cudnn.rnn.fp32_precision = cudnn.fp32_precision = "none"


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
for name in ("cuda_forward", "cuda_backward", "cuda_product"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedrnn::{name}", "CUDA"), name
assert not torch.cuda.is_initialized()
"""


def test_library_loads_without_a_driver():
    subprocess.run([sys.executable, "-c", LOADS, library()], check=True)


@pytest.fixture
def stand_ins():
    """The ops of the library on CPU tensors, by the CPU engine."""
    torch.ops.load_library(library())
    ops = torch.ops.fusedrnn

    def forward(gx, w_hh, b_hh, *rest):
        *rest, cell, reverse, training, cell_states, _tf32 = rest
        b_hh = None if cuda.facts_of(cell)[3] else b_hh
        w_ih = torch.eye(gx.shape[-1], dtype=gx.dtype)
        arguments = gx, w_ih, w_hh, None, b_hh, *rest, cell, reverse, training, cell_states
        return ops.recurrence_forward(*arguments)

    def backward(dy, dc, dh_n, dc_n, w_hh, w_hr, w_hh_t, w_hr_t, h_prev, c_prev, saved, *rest):
        for w, w_t in ((w_hh, w_hh_t), (w_hr, w_hr_t)):
            assert w is w_t is None or (w_t.is_contiguous() and torch.equal(w.t(), w_t))
        *rest, _tf32 = rest
        return ops.recurrence_backward(
            dy, dc, dh_n, dc_n, w_hh, w_hr, h_prev, c_prev, saved, saved, *rest
        )

    def product(a, b, transpose_a, transpose_b, _tf32):
        assert a.is_contiguous() and b.is_contiguous()
        return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)

    with torch.library._scoped_library("fusedrnn", "IMPL") as scope:
        for name, op in (("forward", forward), ("backward", backward), ("product", product)):
            scope.impl(f"cuda_{name}", op, "CPU")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("proj", [0, 4])
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_library_is_given_what_the_op_is(stand_ins, cell, proj, bias, dtype):
    """The op on CUDA tensors is the op on CPU tensors, whose engine stands in for the kernels."""
    if proj and cell is not LSTM:
        pytest.skip("only the LSTM has a projection")
    case = Case(cell, 3, 2, 5, 8, P=proj, dtype=dtype, bias=bias, lengths=True, resets=True)
    i, ops, index = make_inputs(case), torch.ops.fusedrnn, list(CELLS).index(cell.name)
    arguments = i.x, *i.weights, i.h0, i.c0, *i.seq, index, True, True, False
    ours, expected = cuda._forward(*arguments), ops.recurrence_forward(*arguments)
    torch.testing.assert_close(ours, expected)
    _, _, _, _, h_prev, c_prev, saved, m = expected
    given = i.grads["y"], None, i.grads["h_n"], i.grads.get("c_n")
    kept = i.weights.w_hh, i.weights.w_hr, h_prev, c_prev, saved, m
    arguments = *given, *kept, *i.seq, index, True
    ours, expected = cuda._backward(*arguments), ops.recurrence_backward(*arguments)
    torch.testing.assert_close(ours, expected)


def test_library_is_given_dense_matrices(stand_ins):
    r = torch.randn
    for a in (r(3, 5), r(5, 3).t(), r(3, 0), r(9, 5)[::3], r(1, 5), r(3, 1).t()):
        k = a.shape[1]
        for b in (r(k, 4), r(4, k).t(), r(k, 1), r(1, k).t()):
            torch.testing.assert_close(cuda._product(a, b), a @ b)


# A PyTorch without CUDA neither indexes nor differentiates fake CUDA tensors, so that tracing stops
# at a backend here, and a whole layer is traced on the CPU (test_compile.py): by the same ops.
def both_directions(dtype, cell, hidden, proj):
    """Forward and backward of fake tensors on the cuda backend, and a weight's gradient."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device=CUDA)

    backend, rows, out = by_name("cuda"), len(cell.gates) * hidden, proj or hidden
    w_hr = empty(proj, hidden) if proj else None
    weights = Weights(empty(rows, 3), empty(rows, out), empty(rows), empty(rows), w_hr)
    others = len(cell.states) - 1
    c0 = empty(others, 2, hidden) if others else None
    x, seq = empty(5, 2, 3), Sequence()
    run = backend.forward(cell, x, weights, empty(2, out), c0, seq, False, True, others > 0)
    grads = backend.backward(cell, run.y, None, None, None, weights, seq, False, run)
    return run, grads, backend.product(grads.dgx.flatten(0, 1).t(), x.flatten(0, 1))


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_fake_tensors(cell, dtype):
    """Results have the dtype of the inputs; only the c that backward reads is not rounded to it."""
    with FakeTensorMode():
        run, grads, dw_ih = both_directions(dtype, cell, 8, 4 if cell.name == "lstm" else 0)
    (c_prev, saved), rows = run.reserve, 8 * len(cell.gates)
    wide = dtype if dtype == torch.float64 else torch.float32
    assert c_prev.dtype == wide
    assert {t.dtype for t in (*run[:6], saved, *grads, dw_ih)} == {dtype}
    assert {t.device for t in (*run[:6], c_prev, saved, *grads, dw_ih)} == {CUDA}
    assert (run.y.shape, dw_ih.shape) == (run.h_prev.shape, (rows, 3))
    assert grads.dgx.shape == grads.dgh.shape == (5, 2, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tracing_leaves_the_precision_to_the_run(dtype):
    """No product outside an op depends on it, and no op has it as an argument."""
    with FakeTensorMode():
        graph = make_fx(lambda: both_directions(dtype, LSTM, 8, 0)[2])().graph
    ops = [str(node.target) for node in graph.nodes if re.search(r"fusedrnn|mm", str(node.target))]
    product = "fusedrnn.product.default" if dtype == torch.float32 else "aten.mm.default"
    both = ["fusedrnn.recurrence_forward.default", "fusedrnn.recurrence_backward.default"]
    assert ops == [*both, product]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_choice_is_traced(monkeypatch):
    monkeypatch.setattr(cuda, "_missing", None)

    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        reason = by_name("cuda").supports(Request(LSTM, x.dtype, CUDA, 8, 0))
        return x + 1 if reason == "finds no GPU" else x

    assert choose(torch.zeros(())) == 1
