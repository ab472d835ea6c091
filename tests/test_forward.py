"""Calls of layers and cells beside torch.nn's: outputs, every gradient, and what shares memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from against_torch import (
    CELLS,
    LAYERS,
    assert_equals_torch,
    flatten,
    make_hx,
    run,
    twins,
    upstream,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.backends import Request, by_name
from fusedrnn.cells import LSTM

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 6, 3, 5, 4  # noqa: E741


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request):
    missing = by_name(request.param).supports(
        Request(LSTM, torch.float32, torch.device("cpu"), H, 0)
    )
    if missing is not None:
        pytest.skip(f"backend {request.param} {missing}")
    with fusedrnn.backend([request.param, "reference"]):
        yield request.param


OPTIONS = {
    "plain": {},
    "L2-D2-nobias": {"num_layers": 2, "bidirectional": True, "bias": False},
    "L3-dropout1": {"num_layers": 3, "dropout": 1.0},
    "L2-D2-dropout-batch_first": {
        "num_layers": 2, "dropout": 0.4, "bidirectional": True, "batch_first": True,
    },
}  # fmt: skip


def padded(layer, steps=T, batch=B):
    shape = (batch, steps, I) if layer.batch_first else (steps, batch, I)
    return torch.randn(*shape, dtype=layer.all_weights[0][0].dtype)


def packed(layer, lengths, enforce_sorted):
    x = padded(layer, batch=len(lengths))
    return pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=enforce_sorted)


def expanded(hx):
    return hx[:, :1].expand_as(hx) if isinstance(hx, Tensor) else tuple(map(expanded, hx))


def strided(hx):
    if isinstance(hx, Tensor):
        return torch.stack([hx, torch.full_like(hx, torch.nan)], -1)[..., 0]
    return tuple(map(strided, hx))


# What a layer is called with.
FORMS = {
    "zeros": lambda m: (padded(m), None),
    "hx": lambda m: (padded(m), make_hx(m, B)),
    "hx-expanded": lambda m: (padded(m), expanded(make_hx(m, B))),
    "hx-strided": lambda m: (padded(m), strided(make_hx(m, B))),
    "hx-list": lambda m: (padded(m), list(make_hx(m, B)) if m.mode == "LSTM" else make_hx(m, B)),
    "x-strided": lambda m: (strided(padded(m)), None),
    "x-expanded": lambda m: (padded(m)[:1].expand(padded(m).shape), make_hx(m, B)),
    "T1": lambda m: (padded(m, steps=1), make_hx(m, B)),
    "B1": lambda m: (padded(m, batch=1), make_hx(m, 1)),
    "B0": lambda m: (padded(m, batch=0), make_hx(m, 0)),
    "B0-zeros": lambda m: (padded(m, batch=0), None),
    "unbatched": lambda m: (padded(m).select(0 if m.batch_first else 1, 0), None),
    "unbatched-hx": lambda m: (padded(m).select(0 if m.batch_first else 1, 0), make_hx(m, None)),
    "packed": lambda m: (packed(m, [T, 4, 4, 1], True), None),
    "packed-hx": lambda m: (packed(m, [T, 4, 4, 1], True), make_hx(m, 4)),
    "packed-unsorted": lambda m: (packed(m, [2, T, 1, T], False), None),
    "packed-unsorted-hx": lambda m: (packed(m, [2, T, 1, T], False), make_hx(m, 4)),
    "packed-full": lambda m: (packed(m, [T, T, T], True), make_hx(m, 3)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer(kind, options, form):
    ours, theirs = twins(kind, I, H, **options)
    input, hx = FORMS[form](ours)
    got = assert_equals_torch(ours, theirs, input, hx)
    run(ours, input, hx)
    next_number = torch.rand(1)
    run(theirs, input, hx)
    assert next_number == torch.rand(1)  # as many random numbers drawn
    states = [t for name, t in got.items() if name.startswith("out.1")]
    assert all(s.is_contiguous() for s in states) or form.startswith(("packed-un", "unbatched"))
    if isinstance(input, PackedSequence):
        for part, expected in zip(ours(input, hx)[0][1:], input[1:], strict=True):
            assert part is expected or torch.equal(part, expected)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("form", ["hx", "packed-unsorted-hx", "unbatched"])
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "RNN-relu"])
def test_dtypes(kind, form, dtype):
    ours, theirs = twins(kind, I, H, dtype=dtype, bidirectional=True)
    assert_equals_torch(ours, theirs, *FORMS[form](ours))


@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [None, 0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cell(kind, bias, dtype, batch, hx):
    ours, theirs = twins(kind, I, H, bias, dtype=dtype)
    shape = () if batch is None else (batch,)
    h, c = (torch.randn(*shape, H, dtype=dtype) for _ in "hc")
    state = None if not hx else (h, c) if kind == "LSTMCell" else h
    assert_equals_torch(ours, theirs, torch.randn(*shape, I, dtype=dtype), state)


@pytest.mark.parametrize("kind", LAYERS)
def test_eval_mode(kind):
    """Backward runs, and dropout does not."""
    ours, theirs = twins(kind, I, H, 2, dropout=0.5)
    assert_equals_torch(ours.eval(), theirs.eval(), *FORMS["hx"](ours))
    ours.train().dropout = theirs.train().dropout = 0.2  # may change between calls
    assert_equals_torch(ours, theirs, *FORMS["hx"](ours))


@pytest.mark.parametrize("kind", LAYERS)
def test_without_grad(kind):
    ours, _ = twins(kind, I, H, 2, bidirectional=True)
    input, hx = FORMS["hx"](ours)
    expected = flatten(ours(input, hx))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = flatten(ours(input, hx))
        assert not any(t.requires_grad for t in out.values())
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["hx", "packed-unsorted-hx", "T1"])
@pytest.mark.parametrize("options", [{}, OPTIONS["L2-D2-nobias"]], ids=["L1", "L2"])
@pytest.mark.parametrize("kind", [*LAYERS, "LSTMCell"])
def test_gradient_of_one_output_alone(kind, options, form):
    """Also with parameters that are frozen, and inputs that need no gradient."""
    cell = kind == "LSTMCell"
    ours, theirs = twins(kind, I, H, dtype=torch.float64, **({} if cell else options))
    x, h, c = (torch.randn(B, n, dtype=torch.float64) for n in (I, H, H))
    input, hx = (x, (h, c)) if cell else FORMS[form](ours)
    frozen = list(dict(ours.named_parameters()))[1::3]
    for name in flatten(ours(input, hx)):
        for freeze in (False, True):
            for module in (ours, theirs):
                module.zero_grad(set_to_none=True)
                for key, p in module.named_parameters():
                    p.requires_grad_(not (freeze and key in frozen))
                out = flatten(module(input, hx))[name]
                out.backward(upstream({"": out})[0])
            for key, p in theirs.named_parameters():
                mine = dict(ours.named_parameters())[key].grad
                assert key not in frozen or not freeze or mine is None
                zero = torch.zeros_like(p)  # no gradient and a zero one are as good
                mine, expected = (zero if g is None else g for g in (mine, p.grad))
                torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_backward_twice(kind):
    ours, _ = twins(kind, I, H)
    x = torch.randn(T, B, I) if kind in LAYERS else torch.randn(B, I)
    out = next(iter(flatten(ours(x)).values()))
    out.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    out.sum().backward()
    for p, g in zip(ours.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", ["hx", "T1", "zeros", "packed-hx", "unbatched-hx", "B1"])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_shares_memory(kind, form, grad):
    ours, _ = twins(kind, I, H)
    input, hx = FORMS[form](ours)
    with torch.set_grad_enabled(grad):
        outputs = flatten(ours(input, hx))
    tensors = [*outputs.values(), *flatten(input).values(), *flatten(hx).values()]
    for a, b in itertools.combinations([*tensors, *ours.parameters()], 2):
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


EDITED = [*itertools.product(LAYERS, ["hx", "T1", "packed-hx", "packed-unsorted-hx", "unbatched"])]


@pytest.mark.parametrize(("kind", "form"), [*EDITED, *((kind, "") for kind in CELLS)])
def test_editing_outputs_in_place_is_right(kind, form):
    """As after torch.nn's GRU: masking or scaling an output does not disturb the gradients."""
    if kind in CELLS:
        ours, _ = twins(kind, I, H)
        h, c = torch.randn(2, B, H)
        input, hx = torch.randn(B, I), (h, c) if kind == "LSTMCell" else h
    else:
        ours, _ = twins(kind, I, H, 2, batch_first=form == "T1")
        input, hx = FORMS[form](ours)
    grads = []
    for in_place in (False, True):
        outputs = list(flatten(ours(input, hx)).values())
        if in_place:
            for out in outputs:
                out.mul_(2)
                out[0] = 0
        else:
            keep = [torch.ones_like(out) * 2 for out in outputs]
            for k in keep:
                k[0] = 0
            outputs = [out * k for out, k in zip(outputs, keep, strict=True)]
        loss = sum((out * out).sum() for out in outputs)
        grads.append(torch.autograd.grad(loss, list(ours.parameters())))
    torch.testing.assert_close(grads[0], grads[1])
    with torch.no_grad():
        for out in flatten(ours(input, hx)).values():
            out.zero_()


@pytest.mark.parametrize("target", ["input", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("kind", LAYERS)
def test_editing_what_backward_reads_raises(kind, target):
    ours, _ = twins(kind, I, H)
    x, hx = FORMS["hx"](ours)
    x = x.requires_grad_().clone()
    y, _ = ours(x, hx)
    with torch.no_grad():
        (x if target == "input" else getattr(ours, target)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("how", ["packed", "lengths"])
@pytest.mark.parametrize("kind", LAYERS)
def test_nan_in_padding_never_leaks(kind, how, bidirectional):
    """Not from x, and not from the gradient of y."""
    ours, _ = twins(kind, I, H, 2, bidirectional=bidirectional)
    x, hx, lengths = padded(ours, batch=4), make_hx(ours, 4), torch.tensor([2, T, 0, 5])
    if how == "packed":
        lengths[2] = 1
    padding = (torch.arange(T).unsqueeze(-1) >= lengths).unsqueeze(-1)

    def call(fill):
        filled = x.masked_fill(padding, fill).requires_grad_()
        if how == "packed":
            y, state = ours(pack_padded_sequence(filled, lengths, enforce_sorted=False), hx)
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
        else:
            y, state = ours(filled, hx, lengths=lengths)
            assert not y.masked_select(padding).any()
        outputs = list(flatten((y, state)).values())
        down = upstream(flatten((y, state)))
        down[0] = down[0].masked_fill(padding, fill)
        return [*outputs, *torch.autograd.grad(outputs, [filled, *ours.parameters()], down)]

    for clean, dirty in zip(call(0.0), call(torch.nan), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", LAYERS)
def test_non_finite_input_stays_in_its_row(kind):
    ours, theirs = twins(kind, I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    x[1, 1, 2], x[2, 0, 0] = torch.inf, torch.nan
    got, expected = flatten(ours(x)), flatten(theirs(x))
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert got["out.0"][:, 2].isfinite().all() and not got["out.0"][:, 0].isfinite().any()


@pytest.mark.parametrize("kind", LAYERS)
def test_long_and_wide(kind):
    """Beyond what one tile or one vector holds, off their multiples."""
    ours, theirs = twins(kind, 33, 67)
    assert_equals_torch(ours, theirs, torch.randn(50, 19, 33), make_hx(ours, 19))
