"""The rest of PyTorch 2: opcheck, autocast, 16-bit dtypes, grad modes, default device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fusedrnn
from fusedrnn.backends import by_name, native
from fusedrnn.cells import CELLS, LSTM
from fusedrnn.recurrence import recurrence
from fusedrnn.testing import Case, make_inputs, rms, run_case

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj-bi-2": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN-tanh": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {}),
}
LAYERS = [kind for kind in KINDS if "Cell" not in kind]
HALVES = [torch.bfloat16, torch.float16]


def make(kind: str, **options: Any) -> nn.Module:
    name, more = KINDS[kind]
    return getattr(fusedrnn, name)(5, 6, **more, **options)


def make_input(kind: str) -> Tensor:
    return torch.randn((3, 5) if "Cell" in kind else (7, 3, 5))


def outputs_and_gradients(module: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    out = tree_leaves(run())
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in out]
    return [*out, *torch.autograd.grad(out, list(module.parameters()), grads)]


class Record(TorchDispatchMode):
    """The calls of our ops, as they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fusedrnn":
            self.calls.append((op, tree_map_only(Tensor, torch.clone, args)))
        return op(*args, **(kwargs or {}))


plain = Case(LSTM, T=4, B=3, I=5, H=6)
OPS = {
    **{name: replace(plain, cell=cell) for name, cell in CELLS.items()},
    **{f"{name}-reverse": replace(plain, cell=cell, reverse=True) for name, cell in CELLS.items()},
    "lstm-float64-cell_states": replace(plain, dtype=torch.float64, cell_states=True),
    "lstm-proj": replace(plain, P=2),
    "lstm-proj-lengths-resets-reverse-cell_states": replace(
        plain, P=2, lengths=True, resets=True, reverse=True, cell_states=True
    ),
    "gru-lengths-resets-nobias": replace(
        plain, cell=CELLS["gru"], lengths=True, resets=True, bias=False
    ),
    **{
        f"{name}-reset_states": replace(plain, cell=CELLS[name], resets=True, reset_states=True)
        for name in ("lstm", "gru")
    },
    "gru-B0": replace(plain, cell=CELLS["gru"], B=0),
}


@pytest.mark.skipif(not native.isas(), reason="no native library")
@pytest.mark.parametrize("case", OPS.values(), ids=list(OPS))
def test_opcheck(case: Case) -> None:
    """Schemas, fake shapes and tracing of all ops, in inference and in training."""
    backend, inputs = by_name("cpu"), make_inputs(case)
    if inputs.seq.lengths is not None:  # what is left unset in a shorter row is never the same
        inputs.seq.lengths.fill_(case.T)
    with Record() as record:
        recurrence(backend, inputs.call(case))
        run_case(case, inputs, backend)
    assert len(record.calls) == 3  # inference, training, its backward
    for op, args in record.calls:
        result = torch.library.opcheck(op, args)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.skipif(not native.isas(), reason="no native library")
def test_op_needs_an_input_size() -> None:
    case = replace(plain, I=1)
    inputs = make_inputs(case)
    with Record() as record:
        run_case(case, inputs, by_name("cpu"))
    op, (x, w_ih, *others) = record.calls[0]
    with pytest.raises(RuntimeError, match="input size is 0, expected at least 1"):
        op(x[..., :0], w_ih[..., :0], *others)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors(kind: str) -> None:
    """Shapes, dtypes and strides of outputs are known without computing them."""
    real = make(kind)(make_input(kind))
    with FakeTensorMode():
        fake = make(kind)(make_input(kind))
    for f, r in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("inside", [False, True], ids=["", "backward-inside"])
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype, inside: bool) -> None:
    """One rule for all cells: the layer in the autocast dtype, gradients in the parameters'."""
    module, x = make(kind), make_input(kind)
    low = copy.deepcopy(module).to(dtype)
    expected = outputs_and_gradients(low, lambda: low(x.to(dtype)))
    with torch.autocast("cpu", dtype):
        out = tree_leaves(module(x))
        assert all(t.dtype == dtype for t in out)
        loss = sum((t * g).sum() for t, g in zip(out, random_like(out), strict=True))
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for t, e in zip(out, expected, strict=False):
        assert torch.equal(t, e)
    for p, e in zip(module.parameters(), expected[len(out) :], strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        # Inside, autocast rounds the products of the reference's backward once more.
        torch.testing.assert_close(
            p.grad, e.float(), rtol=0, atol=4 * torch.finfo(dtype).eps * float(e.abs().max())
        )


def random_like(tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors]


def test_autocast_states_packed_and_float64() -> None:
    lstm, gru = fusedrnn.LSTM(5, 6), fusedrnn.GRU(5, 6)
    packed = pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    state = torch.randn(1, 2, 6)
    double = fusedrnn.LSTM(5, 6, dtype=torch.float64)
    x = torch.randn(4, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = lstm(packed, (state, state))
        assert {y.data.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
        y, h_n = gru(x.double(), state.double())
        assert {y.dtype, h_n.dtype} == {torch.bfloat16}
        y, (h_n, c_n) = double(x.double())
        assert {y.dtype, h_n.dtype, c_n.dtype} == {torch.float64}
        with pytest.raises(RuntimeError, match="not the same dtype"):
            double(x)
        with pytest.raises(RuntimeError, match="not the same dtype"):
            lstm(torch.ones(4, 2, 5, dtype=torch.int64))
        with torch.autocast("cpu", enabled=False):
            assert lstm(x)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_backward_inside_autocast_of_a_forward_outside(kind: str) -> None:
    """The gradients are float32's, bit for bit."""
    module, x = make(kind), make_input(kind)
    expected = outputs_and_gradients(module, lambda: module(x))
    out = tree_leaves(module(x))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(out, list(module.parameters()), random_like(out))
    for a, e in zip(actual, expected[len(out) :], strict=True):
        assert torch.equal(a, e)


def emulate(module: nn.RNNBase, x: Tensor, dtype: torch.dtype | None, round_c: bool = False) -> Any:
    """One layer in float64, h rounded to ``dtype`` after every step, and c too if asked."""

    def stored(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype).double()

    ys, hx = [], None
    for step in x:
        _, hx = module(step.unsqueeze(0), hx)
        if module.mode == "LSTM":
            hx = stored(hx[0]), stored(hx[1]) if round_c else hx[1]
        else:
            hx = stored(hx)
        ys.append(hx[0] if module.mode == "LSTM" else hx)
    return torch.cat(ys), hx


def half_errors(
    kind: str, dtype: torch.dtype, T: int, forget: float = 0.0, round_c: bool = False
) -> list[float]:
    """The rms error of every output and gradient of a 16-bit layer against float64, as a fraction
    of its bound: twice the error of float64 with only h rounded, plus a floor for sums in float32.

    Over four layers, and not of the maximum: roundings differ in backward, and of a few of them
    the largest, or all of one short sequence, are a matter of luck.
    """
    floor = 4 * torch.finfo(torch.float32).eps * (4 * 12 * T).bit_length()
    errors, bounds = [], []
    for _ in range(4):
        name, options = KINDS[kind]
        module = getattr(fusedrnn, name)(5, 12, dtype=dtype, **options)
        x = torch.randn(T, 4, 5, dtype=dtype)
        if forget:
            with torch.no_grad():
                module.bias_ih_l0[12:24] += forget
        wide, wide_x = copy.deepcopy(module).double(), x.double()

        def emulated(*how: Any) -> list[Tensor]:
            return outputs_and_gradients(wide, lambda: emulate(wide, wide_x, *how))  # noqa: B023

        exact = emulated(None)
        if round_c:
            out = emulated(dtype, True)
        else:
            out = outputs_and_gradients(module, lambda: module(x))  # noqa: B023
            assert all(t.dtype == dtype for t in out)
        allowed = [t.to(dtype) for t in emulated(dtype)]
        errors.append([rms(o.double() - e).item() for o, e in zip(out, exact, strict=True)])
        bounds.append(
            [
                (2 * rms(a - e) + floor * e.abs().max()).item()
                for a, e in zip(allowed, exact, strict=True)
            ]
        )
    ratio = rms_rows(errors) / rms_rows(bounds)
    return ratio.tolist()


def rms_rows(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt()


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-tanh", "RNN-relu"])
def test_half_dtypes_sum_in_float32(kind: str, dtype: torch.dtype) -> None:
    assert max(half_errors(kind, dtype, T=40)) <= 1


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_half_dtypes_keep_c_in_float32(dtype: torch.dtype) -> None:
    """With an open forget gate, where c rounded at every step would be seen to be wrong."""
    _, _, c_n, *_ = half_errors("LSTM", dtype, T=100, forget=4.0)
    _, _, wrong, *_ = half_errors("LSTM", dtype, T=100, forget=4.0, round_c=True)
    assert c_n <= 1 < wrong


@pytest.mark.parametrize("kind", KINDS)
def test_grad_modes(kind: str) -> None:
    """The same numbers in every mode, and a graph only where one is wanted."""
    module, x = make(kind), make_input(kind)
    expected = tree_leaves(module(x))
    assert all(t.grad_fn is not None for t in expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = tree_leaves(module(x))
        for t, e in zip(out, expected, strict=True):
            assert torch.equal(t, e)
            assert not t.requires_grad
            assert t.is_inference() == (mode is torch.inference_mode)
    with torch.autograd.set_detect_anomaly(True):
        outputs_and_gradients(module, lambda: module(x))
    module.requires_grad_(False)
    assert all(t.grad_fn is None for t in tree_leaves(module(x)))
    x.requires_grad_()
    assert all(t.requires_grad for t in tree_leaves(module(x)))


def test_inference_tensors() -> None:
    """As torch.nn: good for inference, refused where they would be saved for backward."""
    with torch.inference_mode():
        x = torch.randn(4, 2, 5)
    module = fusedrnn.LSTM(5, 6)
    with torch.no_grad():
        assert not module(x)[0].requires_grad
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_has_a_backward(kind: str) -> None:
    module, x = make(kind).eval(), make_input(kind)
    eval_ = outputs_and_gradients(module, lambda: module(x))
    train = outputs_and_gradients(module.train(), lambda: module(x))
    assert all(torch.equal(a, b) for a, b in zip(eval_, train, strict=True))


def test_default_device() -> None:
    """Where new tensors go does not matter to a layer that is elsewhere."""
    module, x = fusedrnn.LSTM(5, 6, bidirectional=True), torch.randn(4, 2, 5)
    expected = module(x, lengths=[4, 2])
    try:
        torch.set_default_device("meta")
        actual = module(x, lengths=[4, 2])
        outputs_on_meta = tree_leaves(make("GRU")(torch.randn(4, 2, 5), lengths=[4, 2]))
    finally:
        torch.set_default_device(None)
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(a, e)
    assert all(t.is_meta for t in outputs_on_meta)


def test_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = fusedrnn.LSTM(5, 6)
        y, _ = module(torch.randn(4, 2, 5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.weight_ih_l0.dtype == y.dtype == torch.float64


def test_same_numbers_with_and_without_deterministic_algorithms() -> None:
    module, x = make("LSTM-proj-bi-2"), make_input("LSTM")
    results = []
    for on in (True, False):
        torch.use_deterministic_algorithms(on)
        results.append(outputs_and_gradients(module, lambda: module(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_private_names_exist() -> None:
    """Without them every call would take the reference, right but slow."""
    from torch.autograd import forward_ad

    assert not torch._C._are_functorch_transforms_active()
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
