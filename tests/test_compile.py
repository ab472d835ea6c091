"""torch.compile and torch.export: one graph for any T and B, and the same numbers as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn.backends import native

pytestmark = pytest.mark.skipif(not native.isas(), reason="no native library")


def graphs() -> int:
    """How many graphs were compiled in this test."""
    return counters["stats"]["unique_graphs"]


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gradients(module: nn.Module, f: Callable[..., Any], args: Any) -> list[Tensor]:
    """Every output of ``f(*args)``, then the gradients of a random weighting of them."""
    outputs = tree_leaves(f(*args))
    generator = torch.Generator().manual_seed(0)
    loss = sum((t * torch.rand(t.shape, generator=generator)).sum() for t in outputs)
    wanted = [t for t in (*tree_leaves(args), *module.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def layer_args(module: nn.RNNBase, T: int, B: int, hx: bool = False) -> tuple[Any, ...]:
    x = random(B, T, 5) if module.batch_first else random(T, B, 5)
    if not hx:
        return (x.requires_grad_(),)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = random(rows, B, module.proj_size or module.hidden_size).requires_grad_()
    return x, (h, random(rows, B, module.hidden_size)) if module.mode == "LSTM" else h


# (T, B). The compiler takes sizes that are equal at first to stay so: none is another's here.
SIZES = ((7, 8), (4, 2), (11, 5))

CASES: dict[str, tuple[str, dict[str, Any], bool]] = {  # kind, constructor's options, hx
    "LSTM": ("LSTM", {}, False),
    "LSTM-2-bi-proj-batch_first": (
        "LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True}, True,
    ),
    "GRU-2-bi": ("GRU", {"num_layers": 2, "bidirectional": True}, False),
    "RNN-relu-nobias": ("RNN", {"nonlinearity": "relu", "bias": False}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers(case: str) -> None:
    """Training and inference, each one graph, whatever T and B are."""
    kind, options, hx = CASES[case]
    module = getattr(fusedrnn, kind)(5, 6, dtype=torch.float64, **options)
    f = compiled(module, dynamic=True)
    for T, B in SIZES:
        args = layer_args(module, T, B, hx)
        close(gradients(module, f, args), gradients(module, module, args))
    assert graphs() == 1
    with torch.no_grad():
        for T, B in SIZES:
            args = layer_args(module, T, B, hx)
            close(tree_leaves(f(*args)), tree_leaves(module(*args)))
    assert graphs() == 2


def test_lengths_resets_and_cell_states() -> None:
    module = fusedrnn.LSTM(5, 6, 2, bidirectional=True, proj_size=3, dtype=torch.float64)

    def g(x: Tensor, hx: Any, lengths: Tensor, resets: Tensor) -> Any:
        return module(x, hx, lengths=lengths, resets=resets, return_cell_states=True)

    f = compiled(g, dynamic=True)
    for T, B in SIZES[:2]:
        args = (
            *layer_args(module, T, B, True),
            torch.randint(0, T + 1, (B,)),
            torch.rand(T, B) < 0.3,
        )
        close(gradients(module, f, args), gradients(module, g, args))
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str) -> None:
    """A loop of steps in Python, unrolled into one graph."""
    cell = getattr(fusedrnn, kind)(5, 6, dtype=torch.float64)

    def f(x: Tensor) -> Any:
        state = cell(x[0])
        for step in x[1:]:
            state = cell(step, state)
        return state

    g = compiled(f)
    args = (random(3, 2, 5).requires_grad_(),)
    close(gradients(cell, g, args), gradients(cell, f, args))
    assert graphs() == 1


def test_automatic_dynamic() -> None:
    """Without dynamic=True the second length makes the graph dynamic, and then it holds."""
    module = fusedrnn.GRU(5, 6, dtype=torch.float64)
    f = compiled(module)
    for T in (7, 4, 11, 30, 8):
        args = layer_args(module, T, 3)
        close(gradients(module, f, args), gradients(module, module, args))
    assert graphs() == 2


@pytest.mark.parametrize("frozen", ["x", "weight_ih", "weight_hh", "bias"])
def test_some_inputs_without_gradient(frozen: str) -> None:
    module = fusedrnn.LSTM(5, 6, dtype=torch.float64)
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    args = (random(7, 3, 5).requires_grad_(frozen != "x"),)
    close(gradients(module, compiled(module), args), gradients(module, module, args))


def test_backend_is_guarded() -> None:
    """Another backend in the context recompiles; the first one's graph is still there after."""
    module = fusedrnn.LSTM(5, 6, dtype=torch.float64)
    seen: list[bool] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append("fusedrnn" in str([node.target for node in graph.graph.nodes]))
        return graph

    f = torch.compile(module, fullgraph=True, backend=record)
    x = random(4, 3, 5)
    with torch.no_grad():
        expected = module(x)[0]
        for names in ("cpu", "reference", "cpu", "reference"):
            with fusedrnn.backend(names):
                close([f(x)[0]], [expected])
    assert seen == [True, False]


def test_backend_context_inside() -> None:
    module = fusedrnn.LSTM(5, 6, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        with fusedrnn.backend("reference"):
            y = module(x)[0]
        return y - module(x)[0]

    with torch.no_grad():
        assert compiled(f)(random(3, 2, 5)).abs().max() < 1e-14
    assert graphs() == 1
    assert not fusedrnn.backends._context.names


class Model(nn.Module):
    """Embedding, layer with dropout, linear: a model for text."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(10, 5), layer
        self.linear = nn.Linear(6, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layer(self.embedding(tokens))
        return self.linear(y)


def test_inductor_trains_a_model() -> None:
    model = Model(fusedrnn.LSTM(5, 6, 2, dropout=0.2))
    step = compiled(model, backend="inductor", dynamic=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for T in range(8, 28):
        tokens = (torch.arange(T).unsqueeze(-1) + torch.arange(3)) % 10
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(step(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert graphs() == 1, "one for every T"
    assert losses[-1] < 0.5 * losses[0]


def test_inductor_equals_eager() -> None:
    """With its own backward, compiled too."""
    model = Model(fusedrnn.GRU(5, 6, bidirectional=False))
    f = compiled(model, backend="inductor")
    args = (torch.randint(0, 10, (7, 3)),)
    torch.testing.assert_close(gradients(model, f, args), gradients(model, model, args))


def test_transforms_inside() -> None:
    """torch.func inside torch.compile: per-sample gradients and a forward derivative."""
    module = fusedrnn.GRU(5, 6, dtype=torch.float64)
    params = {name: p.detach() for name, p in module.named_parameters()}
    x, v = random(3, 2, 5), random(3, 2, 5)

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, params, (sample.unsqueeze(1),))[0].square().sum()

    def per_sample(x: Tensor) -> Any:
        return vmap(grad(loss), in_dims=(None, 1))(params, x)

    def forward(x: Tensor, v: Tensor) -> Any:
        return jvp(lambda x: module(x)[0], (x,), (v,))[1]

    close(tree_leaves(compiled(per_sample)(x)), tree_leaves(per_sample(x)))
    close([compiled(forward)(x, v)], [forward(x, v)])
    assert forward(x, v).abs().max() > 1e-3


def test_autocast() -> None:
    module = fusedrnn.LSTM(5, 6)
    args = (torch.randn(4, 2, 5).requires_grad_(),)

    def f(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    eager = gradients(module, f, args)
    traced = gradients(module, compiled(f), args)
    assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))


def test_double_backward_is_refused() -> None:
    """As for every compiled module: an error, never a wrong derivative."""
    module = fusedrnn.LSTM(5, 6)
    x = torch.randn(4, 2, 5, requires_grad=True)
    y, _ = compiled(module)(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.sum().backward()


EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM-2-bi-proj": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU-batch_first": ("GRU", {"batch_first": True}),
    "RNN": ("RNN", {}),
}


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("case", EXPORTS)
def test_export(case: str, strict: bool) -> None:
    """One program for every T and B, in which a layer and direction is one op."""
    kind, options = EXPORTS[case]
    module = getattr(fusedrnn, kind)(5, 6, dtype=torch.float64, **options).eval()
    whole = case.startswith("LSTM")
    T, B = Dim("T"), Dim("B")

    def args(T: int, B: int) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        if not whole:
            return layer_args(module, T, B), {}
        lengths, resets = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3
        return layer_args(module, T, B, hx=True), {"lengths": lengths, "resets": resets}

    shapes: dict[str, Any] = {"input": {0: B, 1: T} if module.batch_first else {0: T, 1: B}}
    if whole:
        shapes |= {"hx": ({1: B}, {1: B}), "lengths": {0: B}, "resets": {0: T, 1: B}}
    program = export(module, *args(7, 3), dynamic_shapes=shapes, strict=strict)
    lowered = program.run_decompositions()
    ops = [n for n in lowered.graph.nodes if "recurrence_forward" in str(n.target)]
    assert len(ops) == (4 if whole else 1)
    for T_, B_ in ((7, 3), (4, 2), (50, 9)):
        positional, named = args(T_, B_)
        expected = tree_leaves(module(*positional, **named))
        for p in (program, lowered):
            close(tree_leaves(p.module()(*positional, **named)), expected)


def test_export_of_a_model_round_trips(tmp_path: Any) -> None:
    model = Model(fusedrnn.LSTM(5, 6)).eval()
    tokens = torch.randint(0, 10, (7, 3))
    program = export(model, (tokens,), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    tokens = torch.randint(0, 10, (11, 2))
    torch.testing.assert_close(loaded(tokens), model(tokens))
