"""Our modules beside torch.nn's: the same weights, inputs and upstream gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

# The layers by name: class and the options that make the kind.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN-tanh": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell-tanh": ("RNNCell", {}),
    "RNNCell-relu": ("RNNCell", {"nonlinearity": "relu"}),
}


def twins(kind: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Our module and torch.nn's with the same weights."""
    name, extra = (LAYERS | CELLS)[kind]
    theirs = getattr(nn, name)(*args, **extra, **options)
    ours = getattr(fusedrnn, name)(*args, **extra, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_hx(layer: nn.RNNBase, batch: int | None, generator: Any = None) -> Any:
    """A random initial state of a layer; batch None: unbatched."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    shape = (rows,) if batch is None else (rows, batch)
    dtype = layer.all_weights[0][0].dtype
    states = [torch.randn(*shape, size, generator=generator, dtype=dtype) for size in sizes]
    return tuple(states) if layer.mode == "LSTM" else states[0]


def flatten(value: Any, name: str = "out") -> dict[str, Tensor]:
    """Every tensor in nested tuples and PackedSequences, by name."""
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, PackedSequence):
        return {f"{name}.data": value.data}
    named: dict[str, Tensor] = {}
    for i, part in enumerate(value):
        named |= flatten(part, f"{name}.{i}")
    return named


def leaf(value: Any, dtype: torch.dtype | None = None) -> Any:
    """``value`` as leaves that need a gradient, on the same memory unless the dtype differs."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().to(dtype or value.dtype).requires_grad_()
    if isinstance(value, PackedSequence):
        return value._replace(data=leaf(value.data, dtype))
    return type(value)(leaf(part, dtype) for part in value)


def upstream(outputs: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
    """A random gradient of each output, the same for outputs of any dtype."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if next(iter(outputs.values())).is_complex() else torch.float64
    return [
        torch.randn(out.shape, generator=random, dtype=dtype).to(out.dtype)
        for out in outputs.values()
    ]


def run(
    module: nn.Module, input: Any, hx: Any = None, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor | None]:
    """Every output, and the gradient of every input and parameter, by name.

    Runs in ``dtype`` if given. Draws the module's random numbers from one fixed seed.
    """
    if dtype is not None:
        module = copy.deepcopy(module).to(dtype)
    torch.manual_seed(3)
    input, hx = leaf(input, dtype), leaf(hx, dtype)
    outputs = flatten(module(input, hx, **options))
    inputs = flatten(input, "input") | flatten(hx, "hx") | dict(module.named_parameters())
    inputs = {name: t for name, t in inputs.items() if t.requires_grad}
    grads = torch.autograd.grad(
        list(outputs.values()), list(inputs.values()), upstream(outputs), allow_unused=True
    )
    return outputs | {f"d {name}": g for name, g in zip(inputs, grads, strict=True)}


def assert_close(
    got: dict[str, Tensor | None],
    expected: dict[str, Tensor | None],
    exact: dict[str, Tensor | None],
    terms: int,
) -> None:
    """Passes iff the error of each tensor of ``got`` against ``exact`` is at most twice that of
    ``expected`` plus the floor ``4 * eps * ceil(log2(terms)) * scale``: what a pairwise sum of so
    many terms may lose. The scale is the largest number in the tensor; for a gradient, in any
    gradient or upstream gradient, as a saturated unit's factor (1 - h**2, computed from the rounded
    h) costs eps of the gradient that flows into it, however small what flows out is."""
    assert got.keys() == expected.keys() == exact.keys()
    outputs = {name: x for name, x in exact.items() if x is not None and name[:2] != "d "}
    flows = [*upstream(outputs), *(x for name, x in exact.items() if name[:2] == "d ")]
    flow = max(x.abs().max() for x in flows if x is not None and x.numel())
    for name, e in expected.items():
        g, x = got[name], exact[name]
        assert (g is None) == (e is None), f"{name}: got {g}, expected {e}"
        if g is None or e is None or x is None:
            continue
        assert g.shape == e.shape and g.dtype == e.dtype, f"{name} is {g.dtype} {list(g.shape)}"
        if g.numel() == 0:
            continue
        scale = x.abs().max() if name in outputs else flow
        floor = torch.finfo(e.dtype).eps * math.ceil(math.log2(max(2, terms))) * scale
        allowed = 2 * (e.to(x.dtype) - x).abs().max() + 4 * floor
        error = (g.to(x.dtype) - x).abs().max()
        assert error <= allowed, f"error of {name} is {error:.3g}, bound {allowed:.3g}"


def count_terms(module: nn.Module, input: Any) -> int:
    """The most numbers any output or gradient of this call sums up."""
    tensor = next(iter(flatten(input).values()))
    rows = tensor.numel() // max(1, tensor.shape[-1])
    return max(1, rows) * max(max(p.shape) for p in module.parameters())


def assert_equals_torch(
    ours: nn.Module, theirs: nn.Module, input: Any, hx: Any = None, **options: Any
) -> dict[str, Tensor | None]:
    """Outputs and every gradient of ours are as accurate as torch.nn's; returns ours."""
    tensor = next(iter(flatten(input).values()))
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    got = run(ours, input, hx, **options)
    expected, exact = run(theirs, input, hx), run(theirs, input, hx, wide)
    assert_close(got, expected, exact, count_terms(theirs, input))
    return got
