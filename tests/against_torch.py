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
        torch.randn(out.shape, generator=random, dtype=dtype).to(out) for out in outputs.values()
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


def rounding(module: nn.Module, input: Any, hx: Any = None) -> dict[str, float]:
    """The largest error of each output and gradient of torch.nn, by name, in units of its eps: its
    distance from the same call in double precision, the worst of four calls whose weights differ in
    the last digits, as one number's error may happen to be none. What runs in double is measured
    in single precision: a rounding error grows with eps."""
    dtype = next(iter(flatten(input).values())).dtype
    single, wide = torch.float32, torch.float64
    if dtype.is_complex:
        single, wide = torch.complex64, torch.complex128
    dtype = single if dtype == wide else dtype
    module, input, hx = copy.deepcopy(module).to(dtype), leaf(input, dtype), leaf(hx, dtype)
    eps, worst = torch.finfo(dtype).eps, {}
    for _ in range(4):
        got, exact = run(module, input, hx), run(module, input, hx, wide)
        for name, x in got.items():
            if x is not None and x.numel():
                error = (x.to(wide) - exact[name]).abs().max().item() / eps
                worst[name] = max(error, worst.get(name, 0.0))
        with torch.no_grad():
            for p in module.parameters():
                p *= 1 + 4 * eps * torch.rand_like(p)
    return worst


def assert_close(
    got: dict[str, Tensor | None],
    exact: dict[str, Tensor | None],
    rounding: dict[str, float],
    terms: int,
) -> None:
    """Passes iff the error of each tensor of ``got`` is at most twice that of torch.nn, given in
    ``rounding``, plus the floor ``4 * eps * ceil(log2(terms)) * scale``: what a pairwise sum of so
    many terms may lose, the scale being the largest number in the tensor. ``exact`` was computed in
    double precision by torch.nn and its own error there is allowed too."""
    assert got.keys() == exact.keys()
    for name, x in exact.items():
        g = got[name]
        assert (g is None) == (x is None), f"{name}: got {g}, expected {x}"
        if g is None or x is None:
            continue
        assert g.shape == x.shape, f"{name} is {list(g.shape)}"
        if g.numel() == 0:
            continue
        eps, eps64 = torch.finfo(g.dtype).eps, torch.finfo(x.dtype).eps
        floor = 4 * eps * math.ceil(math.log2(max(2, terms))) * x.abs().max()
        allowed = (2 * eps + eps64) * rounding.get(name, 0.0) + floor
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
    got = run(ours, input, hx, **options)
    assert all(t.dtype == tensor.dtype for t in got.values() if t is not None)
    exact = run(theirs, input, hx, torch.complex128 if tensor.is_complex() else torch.float64)
    assert_close(got, exact, rounding(theirs, input, hx), count_terms(theirs, input))
    return got
