"""The cuDNN backend over a stand-in for PyTorch's ops, which need a GPU, and on one as it is.

The stand-in is registered as a kernel of the ops themselves, so that PyTorch checks number and
types of all arguments and results against their schemas.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import fusedrnn
from fusedrnn import layer
from fusedrnn.backends import Reference, Request, Weights, by_name, cuda, cudnn, weigh
from fusedrnn.cells import LSTM, PLAIN, Cell
from fusedrnn.recurrence import recurrence
from fusedrnn.testing import Case, check_case, make_inputs

CUDA = torch.device("cuda", 0)

# ---- The stand-in: torch.nn's layers on the CPU, under autograd, by cuDNN's mode.

VF = torch._VF
RUNS = [(VF.rnn_relu, 1), (VF.rnn_tanh, 1), (VF.lstm, 4), (VF.gru, 3)]


def shapes(inputs, mode, hidden, proj):
    """What lies in the buffer: always both biases, zero if there are none."""
    rows = RUNS[mode][1] * hidden
    both = [(rows, inputs), (rows, proj or hidden), (rows,), (rows,)]
    return [*map(torch.Size, both), *([torch.Size((proj, hidden))] if proj else [])]


def pieces(buffer, *sizes):
    expected = shapes(*sizes)
    parts = buffer.split([shape.numel() for shape in expected])
    return [part.view(shape) for part, shape in zip(parts, expected, strict=True)]


def given(parts, weight, proj):
    """Those of all the parts that correspond to the weights given."""
    biases = parts[2:4] if len(weight) > 3 else []
    return [*parts[:2], *biases, *(parts[4:] if proj else [])]


def flatten_weight(weight, stride, inputs, mode, hidden, proj, layers, batch_first, both):
    assert (stride, layers, batch_first, both) == (len(weight), 1, False, False)
    sizes = inputs, mode, hidden, proj
    buffer = weight[0].new_zeros(sum(shape.numel() for shape in shapes(*sizes)))
    for tensor, part in zip(weight, given(pieces(buffer, *sizes), weight, proj), strict=True):
        part.copy_(tensor)
        tensor.set_(part)  # as PyTorch's op does
    return buffer


def run(x, weight, stride, buffer, hx, cx, mode, hidden, proj, *others):
    """Leaves x, hx, cx and the parts of the buffer, and what torch.nn's layer makes of them."""
    layers, batch_first, dropout, _, both, batch_sizes, dropout_state = others
    assert (stride, layers, batch_first, dropout, both) == (len(weight), 1, False, 0.0, False)
    assert (list(batch_sizes), dropout_state) == ([], None)
    parts = pieces(buffer, x.shape[2], mode, hidden, proj)
    assert [w.shape for w in weight] == [p.shape for p in given(parts, weight, proj)]
    assert hx.shape == (1, x.shape[1], proj or hidden) and hx.is_contiguous()
    if RUNS[mode][0] is VF.lstm:
        assert cx.shape == (1, x.shape[1], hidden) and cx.is_contiguous()
    else:
        assert cx is None
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, hx, cx, *parts)]
        x, hx, cx, *parts = leaves
        state = hx if cx is None else (hx, cx)
        return leaves, RUNS[mode][0](x, state, parts, True, 1, 0.0, True, False, False)


def saved_of(y):
    return y.detach().contiguous().view(-1).view(torch.uint8) ^ 0x55


def forward(x, weight, stride, buffer, *rest):
    _, outputs = run(x, weight, stride, buffer, *rest)
    y, h_n, c_n = (t.detach().clone() for t in (*outputs, x.new_empty(0))[:3])
    training = rest[8]
    return y, h_n, c_n, saved_of(y) if training else x.new_empty(0, dtype=torch.uint8), buffer


def backward(x, weight, stride, buffer, hx, cx, output, dy, dh_n, dc_n, *rest):
    *rest, reserve, (want_x, want_h0, want_c0, want_weights) = rest
    assert rest[6], "forward was for inference"
    assert cx is not None or (dc_n is None and not want_c0)
    assert torch.equal(reserve, saved_of(output)), "the reserve is not what forward saved"
    reserve.zero_()
    leaves, outputs = run(x, weight, stride, buffer, hx, cx, *rest)
    assert torch.equal(outputs[0], output)
    pairs = [(o, d) for o, d in zip(outputs, (dy, dh_n, dc_n)) if d is not None]  # noqa: B905
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], [t for t in leaves if t is not None], [d for _, d in pairs],
            materialize_grads=True,
        )
    )  # fmt: skip
    dx, dh0, dc0, *parts = (None if t is None else next(found) for t in leaves)
    dw = given(parts, weight, rest[2]) if want_weights else []
    return dx if want_x else None, dh0 if want_h0 else None, dc0 if want_c0 else None, dw


@pytest.fixture
def stand_in():
    """The backend, its ops on CPU tensors."""
    with torch.library._scoped_library("aten", "IMPL") as scope:
        scope.impl("_cudnn_rnn_flatten_weight", flatten_weight, "CPU")
        # Above autograd, which is off in a kernel; tensors of inference mode go by it.
        scope.impl("_cudnn_rnn", forward, "AutogradCPU", allow_override=True)
        scope.impl("_cudnn_rnn", forward, "CPU")
        scope.impl("_cudnn_rnn_backward", backward, "AutogradCPU", allow_override=True)
        yield by_name("cudnn")


CASES = [(cell, 0) for cell in PLAIN.values()] + [(LSTM, 1), (LSTM, 3)]
cases = pytest.mark.parametrize(("cell", "proj"), CASES, ids=lambda v: getattr(v, "name", f"P{v}"))
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (1, 1, 1, 4)], ids=str)
@both_ways
@cases
def test_cases(stand_in, cell, proj, reverse, shape, bias):
    case = Case(cell, *shape, P=proj, dtype=torch.float64, reverse=reverse, bias=bias)
    check_case(case, stand_in)


def call(case, backend, wanted=None):
    """The inputs of which the gradient is wanted, and the outputs."""
    inputs = make_inputs(case)
    tensors = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0, **inputs.weights._asdict()}
    tensors = {name: t for name, t in tensors.items() if t is not None}
    leaves = [tensors[name].requires_grad_() for name in wanted or tensors]
    outputs = recurrence(backend, inputs.call(case))
    return leaves, dict(zip(inputs.grads, outputs, strict=True)), inputs.grads


def gradients(case, backend, wanted=None, upstream=None):
    leaves, outputs, grads = call(case, backend, wanted)
    names = upstream or outputs
    return torch.autograd.grad(
        [outputs[name] for name in names], leaves, [grads[name] for name in names],
        materialize_grads=True,
    )  # fmt: skip


@both_ways
@cases
def test_any_upstream_gradient_may_be_missing(stand_in, cell, proj, reverse):
    case = Case(cell, 3, 2, 4, 5, P=proj, dtype=torch.float64, reverse=reverse)
    names = ["y", "h_n", "c_n"][: 1 + len(cell.states)]
    for upstream in (u for n in (1, 2) for u in itertools.combinations(names, n)):
        expected = gradients(case, Reference(), upstream=upstream)
        torch.testing.assert_close(gradients(case, stand_in, upstream=upstream), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@both_ways
@cases
def test_any_gradient_may_be_wanted_alone(stand_in, cell, proj, reverse, bias):
    case = Case(cell, 3, 2, 4, 5, P=proj, dtype=torch.float64, reverse=reverse, bias=bias)
    names = ["x", "h0", *(["c0"] if len(cell.states) > 1 else []), "w_ih", "w_hh"]
    names += (["b_ih", "b_hh"] if bias else []) + (["w_hr"] if proj else [])
    for wanted in names:
        expected = gradients(case, Reference(), [wanted])
        torch.testing.assert_close(gradients(case, stand_in, [wanted]), expected)


@both_ways
@cases
def test_backward_again_after_outputs_are_edited(stand_in, cell, proj, reverse):
    """Nothing that forward saved is written to, by cuDNN or by the caller."""
    case = Case(cell, 3, 2, 4, 5, P=proj, dtype=torch.float64, reverse=reverse)
    leaves, outputs, grads = call(case, stand_in)
    loss = sum((out * grads[name]).sum() for name, out in outputs.items())
    for out in outputs.values():
        out.detach().zero_()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(first, gradients(case, Reference()))


@pytest.mark.parametrize("scope", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@both_ways
@cases
def test_the_callers_tensors_stay_as_they_are(stand_in, cell, proj, reverse, scope):
    case = Case(cell, 3, 2, 4, 5, P=proj, dtype=torch.float64, reverse=reverse)
    inputs = make_inputs(case)
    weights = Weights(*(None if w is None else w.requires_grad_() for w in inputs.weights))

    def facts():
        return [(w.data_ptr(), w._version) for w in weights if w is not None]

    before = facts()
    with scope():
        of_weights = inputs.call(case)._replace(weights=weights)
        out = recurrence(stand_in, of_weights)
        expected = recurrence(Reference(), of_weights)
        if scope is torch.enable_grad:
            torch.autograd.grad(out[0].sum(), weights.w_hh)
    torch.testing.assert_close(out, expected)
    assert facts() == before
    assert not any(t._is_view() for t in out[1:])


# ---- The choice.


@pytest.fixture
def present(monkeypatch):
    """A PyTorch with cuDNN 9.12 and a GPU with our kernels, as far as a choice is concerned."""
    monkeypatch.setattr(cudnn, "_missing", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "capability", lambda index: (9, 0))


UNKNOWN = Cell("unknown", gates="a", states="h", saved=1, additive=True, step=LSTM.step)
LAYER = Request(LSTM, torch.float32, CUDA, 8, 0)
REASONS = {
    "cpu": ({"device": torch.device("cpu")}, "runs on CUDA tensors, got cpu"),
    "dtype": (
        {"dtype": torch.complex64},
        "computes in float16, bfloat16, float32, float64, got torch.complex64",
    ),
    "bfloat16": (
        {"dtype": torch.bfloat16},
        "computes in bfloat16 from cuDNN 91300 on, this one is 91200",
    ),
    "cell": ({"cell": UNKNOWN}, "has no kernel for the cell unknown"),
    "hidden": ({"hidden_size": 0}, "needs a hidden size of at least 1"),
    "empty": ({"empty": True}, "needs a batch and an input size of at least 1"),
    "lengths": ({"lengths": True}, "has no lengths"),
    "resets": ({"resets": True}, "has no resets"),
    "cell states": ({"cell_states": True}, "has no cell states"),
}


@pytest.mark.parametrize(("fields", "reason"), REASONS.values(), ids=list(REASONS))
def test_reasons(present, fields, reason):
    assert by_name("cudnn").supports(LAYER._replace(**fields)) == reason


def test_switched_off(present, monkeypatch):
    assert by_name("cudnn").supports(LAYER) is None
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert by_name("cudnn").supports(LAYER) == "is switched off by torch.backends.cudnn.enabled"


@pytest.mark.skipif(torch.backends.cudnn.is_available(), reason="this PyTorch has cuDNN")
def test_reason_on_a_pytorch_without_cudnn():
    match = r"'cudnn' needs a PyTorch built with cuDNN, this one is "
    with pytest.raises(RuntimeError, match=match):
        fusedrnn.LSTM(3, 4, backend="cudnn")(torch.randn(5, 2, 3))


@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_supports(present, cell, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    for dtype in cudnn.DTYPES:
        assert by_name("cudnn").supports(Request(cell, dtype, CUDA, 8, 0)) is None


def test_a_compiled_layer_takes_another(present):
    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        reason = by_name("cudnn").supports(Request(LSTM, x.dtype, CUDA, 8, 0))
        return x if reason is None or "cannot be traced" not in reason else x + 1

    assert choose(torch.zeros(())) == 1


CALLS = {
    "plain": ({}, (5, 2, 3)),
    "lengths": ({"lengths": [5, 1]}, (5, 2, 3)),
    "resets": ({"resets": torch.zeros(5, 2, dtype=torch.bool)}, (5, 2, 3)),
    "cell_states": ({"return_cell_states": True}, (5, 2, 3)),
    "empty": ({}, (5, 0, 3)),
}


@pytest.mark.parametrize(("name", "arguments", "shape"), [(k, *v) for k, v in CALLS.items()])
def test_a_layer_says_what_it_needs(monkeypatch, name, arguments, shape):
    requests = []

    def select(request, wish):
        requests.append(request)
        return Reference()

    monkeypatch.setattr(layer, "select", select)
    fusedrnn.LSTM(3, 4)(torch.randn(shape), **arguments)
    fusedrnn.LSTMCell(3, 4)(torch.randn(shape[1:]))
    for request, names in zip(requests, ({name}, {name} & {"empty"}), strict=True):
        needs = ("lengths", "resets", "cell_states", "empty")
        assert {need for need in needs if getattr(request, need)} == names - {"plain"}


def test_explain_knows_packed_input(monkeypatch):
    asked = []
    monkeypatch.setattr(
        fusedrnn.backends._ALL["cudnn"], "supports", lambda request: asked.append(request)
    )
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    for x in (packed, torch.randn(5, 2, 3), torch.randn(5, 0, 3)):
        fusedrnn.explain(fusedrnn.GRU(3, 4), x)
    assert [(r.lengths, r.empty) for r in asked] == [(True, False), (False, False), (False, True)]


@pytest.mark.parametrize("need", [None, "lengths", "resets", "cell_states", "empty"])
def test_automatic_choice(present, need):
    reasons = weigh(LAYER if need is None else LAYER._replace(**{need: True}), ())
    able = [name for name, reason in reasons.items() if reason is None]
    assert able == (["cudnn"] if need is None else []) + ["cuda", "reference"]


# ---- On a device.


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@cases
def test_on_a_device(cell, proj, bias):
    """Two layers and directions: twice the same gradients, those of the reference, no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RNN module weights")
        options = {"proj_size": proj} if proj else {}
        if cell.name.startswith("rnn"):
            options["nonlinearity"] = cell.name.removeprefix("rnn_")
        kind = getattr(fusedrnn, cell.name.split("_")[0].upper())
        module = kind(
            4, 6, num_layers=2, bias=bias, bidirectional=True, device=CUDA, dtype=torch.double,
            **options,
        )  # fmt: skip
        where = [p.data_ptr() for p in module.parameters()]
        x = torch.randn(5, 3, 4, device=CUDA, dtype=torch.double, requires_grad=True)
        found = []
        for backend in ("cudnn", "reference"):
            with fusedrnn.backend(backend):
                y, hidden = module(x)
            outputs = [y, *(hidden if isinstance(hidden, tuple) else (hidden,))]
            loss = sum((out * out).sum() for out in outputs)
            for _ in range(2):
                grads = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)
                found.append([*outputs, *grads])
            with torch.no_grad(), fusedrnn.backend(backend):
                torch.testing.assert_close(module(x)[0], y)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])
    assert where == [p.data_ptr() for p in module.parameters()]
