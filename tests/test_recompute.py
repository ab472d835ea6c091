"""recompute: the gradients of what keeps all, from less memory."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import backends, recompute
from fusedrnn.backends import Call, Gradients, Request, Run, by_name, cudnn, native
from fusedrnn.backends import reference as oracle
from fusedrnn.cells import CELLS, GRU, LSTM, LSTM_PEEPHOLE
from fusedrnn.testing import Case, assert_as_accurate, make_inputs, run_case

pytestmark = pytest.mark.usefixtures("one_thread")
needs_engine = pytest.mark.skipif(not native.isas(), reason="no native library")

KINDS = ("gates", "chunks")
FEATURES = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "lengths-resets": {"lengths": True, "resets": True},
    "lengths-resets-reverse": {"lengths": True, "resets": True, "reverse": True},
    "reset_states": {"resets": True, "reset_states": True},
    "lengths-reset_states-reverse": {
        "lengths": True, "resets": True, "reset_states": True, "reverse": True,
    },
    "dropout": {"dropout": True, "lengths": True},
    "zoneout": {"zoneout": "training", "lengths": True, "resets": True},
    "zoneout-reverse": {"zoneout": "training", "dropout": True, "reverse": True},
    "zoneout-eval": {"zoneout": "eval", "resets": True},
}  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEPS = (1, 2, 7, 16, 37)


NORMS = {
    "layer_norm": {"layer_norm": True, "resets": True},
    "layer_norm-reverse": {"layer_norm": True, "lengths": True, "dropout": True, "reverse": True},
}


@contextmanager
def products_alike(kind, dtype):
    """On AMX a chunk has too few rows for the tiles that take more exact products of float32 where
    all is kept."""
    best = native.isa()
    if best == "amx" and kind == "chunks" and dtype != torch.bfloat16:
        native.set_isa("avx512")
    yield
    native.set_isa(best)


@needs_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("feature", (FEATURES | NORMS).values(), ids=[*FEATURES, *NORMS])
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_on_the_cpu(cell, feature, dtype):
    """As accurate as what keeps all."""
    if cell.late and "layer_norm" in feature:
        pytest.skip("has no layer norm")
    engine = by_name("cpu")
    projected = {"P": 7, "cell_states": True}
    for steps in STEPS:
        for more in ({}, projected) if len(cell.states) > 1 else ({},):
            case = Case(cell, steps, B=5, I=4, H=19, dtype=dtype, **feature, **more)
            inputs = make_inputs(case)
            wide = inputs.to(torch.float64)
            if case.dropout:
                dropout = inputs.noise.dropout.to(torch.float64)
                wide = replace(wide, noise=inputs.noise._replace(dropout=dropout))
            exact = run_case(replace(case, dtype=torch.float64), wide, engine)
            for kind in KINDS:
                again = replace(case, recompute=kind)
                with products_alike(kind, dtype):
                    plain = run_case(case, inputs, engine)
                    out = run_case(again, inputs, engine)
                assert_as_accurate(again, out, plain, exact)


class Plain:
    """The equations as a backend, of any cell and with all there is; its backward holds what it is
    given against what forward left."""

    name, reads_padding, runs_both = "plain", False, False

    def supports(self, request: Request) -> None:
        return None

    def runs_stack(self, request: Request) -> bool:
        return False

    def forward(self, call: Call, training: bool) -> Run:
        kept = []

        def step(gx, gh, state, *params):
            planes = []

            def keep(*saved):
                planes.extend(saved)
                return saved

            new = call.cell.step(gx, gh, state, *params, keep=keep)
            kept.append((state, torch.stack(planes), new[0]))
            return new

        cell = replace(call.cell, name="watched", step=step)
        with torch.no_grad():
            y, h_n, *rest = oracle.recurrence(call._replace(cell=cell))
        if call.reverse:
            kept.reverse()
        states, saved, m = zip(*kept, strict=True)
        h_prev, *others = (torch.stack(s) for s in zip(*states, strict=True))
        none = call.x.new_empty(0)
        reserve = (
            h_prev,
            torch.stack(others) if others else none,
            torch.stack(saved, 1),
            none if call.weights.w_hr is None else torch.stack(m),
        )
        c_n = none if call.c0 is None else rest[0]
        return Run(y, h_n, c_n, rest[-1] if call.cell_states else none, reserve)

    def backward(self, call, upstream, reserve, wanted):
        lengths = torch.full((call.x.shape[1],), call.x.shape[0])
        lengths = lengths if call.seq.lengths is None else call.seq.lengths
        for given, expected in zip(reserve, self.forward(call, True).reserve, strict=True):
            if expected.numel():
                time = expected.dim() - 3
                computed = torch.arange(expected.shape[time]).unsqueeze(-1) < lengths
                torch.testing.assert_close(
                    *(t.masked_fill(~computed.unsqueeze(-1), 0) for t in (given, expected))
                )
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in call.tensors]
            outputs = oracle.recurrence(call.on(leaves))
            dy, dh, dc, dcs = upstream
            given = (
                dy,
                dh,
                *([dc] if call.c0 is not None else []),
                *([dcs] if call.cell_states else []),
            )
            pairs = [(o, d) for o, d in zip(outputs, given, strict=True) if d is not None]
            torch.autograd.backward([o for o, _ in pairs], [d for _, d in pairs])

        def gradient(t):
            return torch.zeros_like(t) if t.grad is None else t.grad

        return Gradients(*(None if t is None else gradient(t) for t in leaves))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("cell", [LSTM, GRU, LSTM_PEEPHOLE], ids=lambda c: c.name)
def test_of_any_backend(monkeypatch, cell, feature, kind):
    """Of a backend that runs all there is: the masks of dropout and zoneout too."""
    monkeypatch.setitem(backends._ALL, "plain", Plain())
    for steps in (1, 7, 11):
        case = Case(cell, steps, B=4, I=2, H=3, dtype=torch.float64, **feature)
        case = replace(case, cell_states=cell is LSTM, P=2 if cell is LSTM else 0)
        inputs = make_inputs(case)
        expected = run_case(case, inputs, backends.REFERENCE)
        out = run_case(replace(case, recompute=kind), inputs, by_name("plain"))
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


def kept_bytes(layer: nn.RNNBase, *args) -> int:
    """What autograd keeps beside the arguments and parameters."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(*args)
    given = torch.utils._pytree.tree_leaves((args, list(layer.parameters())))
    return sum(kept[p] for p in kept.keys() - {t.untyped_storage().data_ptr() for t in given})


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind, options",
    [("LSTM", {}), ("LSTM", {"proj_size": 5}), ("LSTM", {"coupled_gates": True}), ("GRU", {}),
     ("RNN", {}), ("LSTM", {"layer_norm": True}), ("GRU", {"layer_norm": True})],
)  # fmt: skip
def test_bytes_kept(kind, options, dtype):
    """The formulas of the documentation."""
    B, H, P = 3, 11, options.get("proj_size", 11)
    numbers = {"GRU": 4, "RNN": 1}.get(kind, 3 if "coupled_gates" in options else 4)
    of_c = max(4, dtype.itemsize)
    tiles = dtype == torch.bfloat16 and native.isa() == "amx" and "layer_norm" not in options
    e = 2 if tiles else of_c
    c = of_c * B * (H if kind == "LSTM" else 0)
    states, wide_states = e * B * P + c, of_c * B * P + c
    gates = e * B * (numbers * H + (H if "proj_size" in options else 0))
    if "layer_norm" in options:
        gates += e * B * (2 * 4 * H + H + 3 if kind == "LSTM" else 2 * 3 * H + 3)
    for T, kept_states in ((1, 0), (16, 3), (37, 5), (64, 7), (100, 9)):
        expected = {
            "none": T * (states + gates),
            "gates": T * states,
            "chunks": kept_states * wide_states,
        }
        for how, count in expected.items():
            module = getattr(fusedrnn, kind)(4, H, recompute=how, dtype=dtype, **options)
            x, h = torch.randn(T, B, 4, dtype=dtype), torch.zeros(1, B, P, dtype=dtype)
            hx = (h, torch.zeros(1, B, H, dtype=dtype)) if kind == "LSTM" else h
            assert kept_bytes(module, x, hx) == count, (T, how)


def both(how: str, kind: str = "LSTM", **options):
    """The same layer, as it is and with ``recompute``."""
    plain = getattr(fusedrnn, kind)(4, 6, dtype=torch.float64, **options)
    again = getattr(fusedrnn, kind)(4, 6, dtype=torch.float64, recompute=how, **options)
    again.load_state_dict(plain.state_dict())
    return plain, again


def gradients(layer, run, x):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    outputs = torch.utils._pytree.tree_leaves(run(layer, x))
    outputs = [t for t in outputs if t is not None and t.is_floating_point()]
    random = torch.Generator().manual_seed(0)
    weights = [torch.rand(t.shape, generator=random) for t in outputs]
    sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)).backward()
    return [*outputs, x.grad, *(p.grad for p in layer.parameters())]


CALLS = {
    "plain": lambda layer, x: layer(x),
    "lengths-resets": lambda layer, x: layer(
        x, lengths=[11, 0, 4], resets=torch.arange(33).reshape(11, 3) % 5 == 0
    ),
    "packed": lambda layer, x: layer(pack_sequence([x[:, 0], x[:7, 1], x[:2, 2]])),
    "unbatched": lambda layer, x: layer(x[:, 0]),
    "cell_states": lambda layer, x: layer(x, return_cell_states=True),
    "unused": lambda layer, x: layer(x)[1],
    "edited": lambda layer, x: layer(x)[0].mul_(2),
}


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_layers(how, call):
    options = {"num_layers": 2, "bidirectional": call != "edited", "proj_size": 3}
    x = torch.randn(11, 3, 4, dtype=torch.float64)
    expected, out = (gradients(layer, CALLS[call], x) for layer in both(how, **options))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_layers_and_functions(how, kind):
    plain, again = both(how, kind, bidirectional=True, batch_first=True)
    x = torch.randn(3, 11, 4, dtype=torch.float64)
    expected = gradients(plain, lambda layer, x: layer(x), x)
    function = getattr(fusedrnn.functional, kind.lower())

    def run(layer, x):
        params = list(layer.parameters())
        return function(x, None, params, bidirectional=True, batch_first=True, recompute=how)

    for f in (lambda layer, x: layer(x), run):
        torch.testing.assert_close(gradients(again, f, x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("frozen", ["x", "weight_ih", "weight_hh", "bias", "all but x"])
def test_frozen(how, frozen):
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    found = []
    for layer in both(how):
        for name, p in layer.named_parameters():
            p.requires_grad_(frozen != "all but x" and not name.startswith(frozen))
        leaf = x.clone().requires_grad_(frozen != "x")
        layer(leaf)[0].sum().backward()
        found.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for t, expected in zip(*found, strict=True):
        assert (t is None) == (expected is None)
        if t is not None:
            torch.testing.assert_close(t, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", KINDS)
def test_backward_twice_and_of_backward(how):
    x = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True)
    second = []
    for layer in both(how):
        y, _ = layer(x)
        first = [torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*first)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*second, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", KINDS)
def test_autocast(how):
    plain, again = (layer.float() for layer in both(how))
    x = torch.randn(7, 3, 4)

    def run(layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    expected, out = gradients(plain, run, x), gradients(again, run, x)
    assert out[0].dtype == torch.bfloat16 and out[-1].dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("how", KINDS)
def test_transforms(how):
    plain, again = both(how, "GRU")
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected, out = (
        torch.func.vmap(torch.func.grad(lambda x, f=f: f(x)[0].square().sum()), 1)(x)
        for f in (plain, again)
    )
    torch.testing.assert_close(out, expected)


@needs_engine
@pytest.mark.parametrize("how", KINDS)
def test_compiled(how):
    """One graph, of chunks for each T that gives the same ones but for the length of the last."""
    _, layer = both(how)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for T, B in ((11, 5), (10, 3)):
        x = torch.randn(T, B, 4, dtype=torch.float64)
        resets = torch.rand(T, B) < 0.3
        expected, out = (
            gradients(layer, lambda _, x, f=f, r=resets: f(x, resets=r), x)
            for f in (layer, compiled)
        )
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    assert counters["stats"]["unique_graphs"] == 1


@needs_engine
@pytest.mark.parametrize("how", KINDS)
def test_exported(how):
    _, layer = both(how)
    T, x = torch.export.Dim("T"), torch.randn(11, 3, 4, dtype=torch.float64)
    program = torch.export.export(layer, (x[:7],), dynamic_shapes=({0: T},))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_argument():
    for kind in ("LSTM", "GRU", "RNN"):
        make, function = getattr(fusedrnn, kind), getattr(fusedrnn.functional, kind.lower())
        for wrong in ("all", None, True):
            message = r"recompute should be one of \('none', 'gates', 'chunks'\), got"
            with pytest.raises(ValueError, match=message):
                make(3, 4, recompute=wrong)
            with pytest.raises(ValueError, match=message):
                params = list(make(3, 4).parameters())
                function(torch.zeros(2, 1, 3), None, params, recompute=wrong)
        assert "recompute" not in vars(make(3, 4, recompute="none"))
        assert repr(make(3, 4)) == f"{kind}(3, 4)"
        layer = make(3, 4, recompute="chunks")
        layer.recompute = "all"
        with pytest.raises(ValueError, match="recompute should be one of"):
            layer(torch.zeros(2, 1, 3))
        layer.recompute = "chunks"
        assert repr(layer) == f"{kind}(3, 4, recompute='chunks')"
        assert copy.deepcopy(layer).recompute == "chunks"
        back = fusedrnn.to_torch(layer)
        assert type(back) is getattr(nn, kind) and "recompute" not in vars(back)
        assert fusedrnn.convert(back).recompute == "none"


def test_backends_are_asked(monkeypatch):
    """What hides its gates cannot make them; chunks are runs like others."""
    monkeypatch.setattr(cudnn, "_missing", None)
    request = Request(LSTM, torch.float32, torch.device("cuda"), 4, 0, recompute="gates")
    assert by_name("cudnn").supports(request) == "keeps the gates in a buffer of its own"
    assert by_name("cudnn").supports(request._replace(recompute="chunks")) is None
    seen = []
    monkeypatch.setattr(native.Native, "supports", lambda self, r: seen.append(r.recompute))
    layer = fusedrnn.LSTM(3, 4, recompute="gates", backend="cpu")
    fusedrnn.explain(layer, torch.randn(2, 1, 3))
    assert seen == ["gates"]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("arithmetic", ["float16", "float32"])
@pytest.mark.parametrize("cell", [LSTM, GRU, LSTM_PEEPHOLE], ids=lambda c: c.name)
def test_on_triton(monkeypatch, cell, arithmetic, layer_norm):
    """The gates that its kernels left, from the states alone; and chunks, which run in float32."""
    pytest.importorskip("triton")
    from test_triton import Machine

    machine = Machine(monkeypatch)
    case = Case(cell, 3, 5, 4, 20, dtype=machine.choose(arithmetic), lengths=True, resets=True)
    case = replace(case, layer_norm=layer_norm)
    call = make_inputs(case).call(case)
    kept = recompute.forward(machine.backend, "gates", [call])[0].reserve
    made = recompute._with_gates(machine.backend, call, *kept)
    for found, expected in zip(made, machine.backend.forward(call, True).reserve, strict=True):
        torch.testing.assert_close(found.view_as(expected), expected)
    inputs = make_inputs(case)
    out = run_case(replace(case, recompute="chunks"), inputs, machine.backend)
    exact = run_case(case, inputs.to(torch.float64), backends.REFERENCE)
    assert_as_accurate(case, out, run_case(case, inputs, backends.REFERENCE), exact)
