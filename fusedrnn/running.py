"""From what users give to the layers: checks, weights by layer and direction, autocast."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedrnn.arguments import probability
from fusedrnn.backends import Names, Sequence, Weights, check_names
from fusedrnn.cells import Cell
from fusedrnn.layer import Between, Stack, run_layers, run_step
from fusedrnn.recompute import check_recompute
from fusedrnn.regularisers import NO_RATES, Rates, regularised

Lengths = Tensor | list[int] | None


def checked_run(
    cell: Cell,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: list[Weights],
    *,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Lengths,
    resets: Tensor | None,
    backend: Names,
    proj_size: int = 0,
    rates: Rates = NO_RATES,
    cell_states: bool = False,
    recompute: str = "none",
) -> Stack:
    """The checks of a public function (the drop-in modules have torch.nn's own), then :func:`run`.

    ``weights`` are those of each layer and direction, hx the states in the order of the cell.
    """
    if x.dim() != 3:
        raise ValueError(f"x should be 3-D, got {x.dim()}-D")
    probability("dropout", dropout)
    check_recompute(recompute)
    directions = 2 if bidirectional else 1
    hidden = weights[0].w_hh.shape[0] // len(cell.gates)
    out = proj_size or hidden
    rows = hidden * len(cell.gates)
    for k, w in enumerate(weights):
        inputs = x.shape[2] if k < directions else out * directions
        of_units = len(cell.params), hidden
        norms = ((rows,), (rows,), (hidden,), (hidden,))
        expected = ((rows, inputs), (rows, out), (rows,), (rows,), (out, hidden), of_units, *norms)
        for name, tensor, shape in zip(Weights._fields, w, expected, strict=True):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} of layer {k // directions} should have shape {list(shape)}, "
                    f"got {list(tensor.shape)}"
                )
    batch = x.shape[0 if batch_first else 1]
    for letter, state in zip(cell.states, hx or (), strict=False):
        size = out if letter == cell.states[0] else hidden
        if state.shape != (len(weights), batch, size):
            raise ValueError(
                f"{letter}_0 should have shape {[len(weights), batch, size]}, "
                f"got {list(state.shape)}"
            )
    if batch_first:
        x = x.transpose(0, 1)
    seq = sequence(x, lengths, resets, batch_first)
    stack = run(
        cell, x, hx, weights, directions, seq, between_layers(dropout, training), cell_states,
        check_names(backend), rates, training, recompute,
    )  # fmt: skip
    return to_batch_first(stack) if batch_first else stack


def between_layers(dropout: float, training: bool) -> Between:
    """What happens to the output of every layer but the last: torch.nn's own dropout, if any."""
    return (lambda y: F.dropout(y, dropout)) if dropout and training else None


def to_batch_first(stack: Stack) -> Stack:
    c = None if stack.c is None else stack.c.transpose(0, 1)
    return stack._replace(y=stack.y.transpose(0, 1), c=c)


def tensors_of_layer(
    cell: Cell, has_biases: bool, has_projection: bool, layer_norm: bool
) -> tuple[int, tuple[str, ...]]:
    """Of a layer and direction: the number of torch.nn's parameters, and the names of norms."""
    return 2 + 2 * has_biases + has_projection, norm_names(cell) if layer_norm else ()


def norm_names(cell: Cell) -> tuple[str, ...]:
    """The parameters of a layer and direction that layer norm adds."""
    return ("norm_ih", "norm_hh", *(("norm_c", "norm_c_bias") if "c" in cell.states else ()))


def new_norm(cell: Cell, name: str, hidden: int, like: Tensor) -> nn.Parameter:
    norm = nn.Parameter(like.new_empty(hidden * (1 if "norm_c" in name else len(cell.gates))))
    fill_norm(name, norm)
    return norm


def fill_norm(name: str, parameter: Tensor) -> None:
    """A gain is 1 at first, a bias 0."""
    nn.init.constant_(parameter, 0.0 if name.startswith("norm_c_bias") else 1.0)


def group(
    cell: Cell, params: Seq[Tensor], has_biases: bool, has_projection: bool, layer_norm: bool
) -> list[Weights]:
    """The flat parameters by layer and direction: those of torch.nn in its order; then, if the cell
    has params, one tensor ``[K*H]`` for each layer and direction; then likewise those of norms."""
    plain, names = tensors_of_layer(cell, has_biases, has_projection, layer_norm)
    layers = len(params) // (plain + bool(cell.params) + len(names))
    absent = () if has_biases else (None, None)
    weights = []
    for k in range(layers):
        w_ih, w_hh, *others = params[k * plain : (k + 1) * plain]
        weights.append(Weights(w_ih, w_hh, *absent, *others))
    if len(params) > plain * layers:
        more = iter(params[plain * layers :])
        of_cell = [next(more) for _ in weights] if cell.params else []
        for k, w in enumerate(weights):
            of_units = by_unit(cell, of_cell[k], w.w_hh) if of_cell else None
            norms = {name: next(more) for name in names}
            weights[k] = w._replace(params=of_units, **norms)
    return weights


def by_unit(cell: Cell, params: Tensor, w_hh: Tensor) -> Tensor:
    """``[K*H]`` as ``[K,H]``."""
    count, hidden = len(cell.params), w_hh.shape[0] // len(cell.gates)
    if params.shape != (count * hidden,):
        raise ValueError(
            f"{', '.join(cell.params)} of the cell {cell.name} should be one tensor of shape "
            f"{[count * hidden]}, got {list(params.shape)}"
        )
    return params.view(count, hidden)


def sequence(x: Tensor, lengths: Lengths, resets: Tensor | None, batch_first: bool) -> Sequence:
    """Checks ``lengths [B]`` and ``resets [T,B]`` (or ``[B,T]``) against ``x [T,B,I]``."""
    steps, batch = x.shape[0], x.shape[1]
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            values = torch.tensor(lengths, device="cpu")
            lengths = values if values.numel() else values.long()
        if lengths.dtype != torch.int64 or lengths.shape != (batch,):
            raise ValueError(
                f"lengths should be int64 of shape [{batch}], "
                f"got {lengths.dtype} of shape {list(lengths.shape)}"
            )
        if lengths.device.type != "cpu" and lengths.device != x.device:
            raise ValueError(
                f"lengths should be on the CPU or on {x.device} as x is, got {lengths.device}"
            )
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            if bool(((lengths < 0) | (lengths > steps)).any()):
                raise ValueError(f"lengths should be in [0, {steps}], got {lengths.tolist()}")
        lengths = lengths.to(x.device, non_blocking=True)
    if resets is not None:
        if not isinstance(resets, Tensor):
            raise TypeError(f"resets should be a bool tensor, got {type(resets).__name__}")
        expected = (batch, steps) if batch_first else (steps, batch)
        if resets.dtype != torch.bool or resets.shape != expected:
            raise ValueError(
                f"resets should be bool of shape {list(expected)}, "
                f"got {resets.dtype} of shape {list(resets.shape)}"
            )
        if resets.device != x.device:
            raise ValueError(f"resets should be on {x.device} as x is, got {resets.device}")
        if batch_first:
            resets = resets.t()
        if lengths is not None:  # in the padding no sequence begins
            resets = resets & (torch.arange(steps, device=x.device).unsqueeze(-1) < lengths)
    return Sequence(lengths, resets)


def run(
    cell: Cell,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: list[Weights],
    directions: int,
    seq: Sequence,
    between: Between = None,
    cell_states: bool = False,
    wish: tuple[str, ...] = (),
    rates: Rates = NO_RATES,
    training: bool = False,
    recompute: str = "none",
) -> Stack:
    """A stack over ``x [T,B,I]`` of checked shapes: autocast, zeros for hx, the last checks.

    ``hx`` holds S tensors ``[L*D,B,*]``, h first; ``between`` acts on the output of every layer
    but the last.
    """
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    shape = (len(weights), x.shape[1])
    x, hx, weights, scope = _prepared(cell, x, hx, weights, shape)
    if seq.h_reset is not None:
        seq = seq.with_states(*(None if s is None else s.to(x.dtype) for s in seq.states))
    with scope:
        weights, noise = regularised(rates, x, weights, len(cell.states), training)
        return run_layers(
            cell, x, weights, hx, seq, noise, directions, cell_states, between, wish, recompute
        )


def step(
    cell: Cell,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Weights,
    wish: tuple[str, ...],
    rates: Rates = NO_RATES,
    training: bool = False,
) -> tuple[Tensor, ...]:
    """One step over ``x [B,I]`` of checked shapes, as :func:`run`: S new states ``[B,H]``."""
    x, hx, each, scope = _prepared(cell, x, hx, [weights], x.shape[:1])
    with scope:
        x = x.unsqueeze(0)
        _, noise = regularised(rates, x, each, len(cell.states), training)
        return run_step(cell, x, each[0], hx, noise[0], wish)


def _prepared(
    cell: Cell,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: list[Weights],
    shape: tuple[int, ...],
) -> tuple[Tensor, tuple[Tensor, ...], list[Weights], AbstractContextManager[object]]:
    """Inputs in one dtype, hx of zeros ``[*shape,*]`` if it is None, and where to run them."""
    device = x.device.type
    scope: AbstractContextManager[object] = nullcontext()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x, hx, weights = _autocast(torch.get_autocast_dtype(device), x, hx, weights)
        scope = torch.autocast(device, enabled=False)
    _check_attributes(x, hx, weights)
    hidden = weights[0].w_hh.shape[0] // len(cell.gates)
    if hx is None:
        sizes = (weights[0].w_hh.shape[1], *(hidden,) * (len(cell.states) - 1))
        hx = tuple(x.new_zeros(*shape, size) for size in sizes)
    return x, hx, weights, scope


def _autocast(
    dtype: torch.dtype, x: Tensor, hx: tuple[Tensor, ...] | None, weights: list[Weights]
) -> tuple[Tensor, tuple[Tensor, ...] | None, list[Weights]]:
    """Everything in the autocast dtype, save a layer whose weights are float64 (as autocast), and
    integers, which the checks reject."""
    if weights[0].w_ih.dtype == torch.float64:
        return x, hx, weights

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    return (
        cast(x),
        None if hx is None else tuple(cast(s) for s in hx),
        [Weights(*(None if t is None else cast(t) for t in w)) for w in weights],  # type: ignore[arg-type]
    )


def _check_attributes(x: Tensor, hx: tuple[Tensor, ...] | None, weights: list[Weights]) -> None:
    device, dtype = x.device, x.dtype
    for name, tensors in (("hidden", hx or ()), ("parameter", [t for w in weights for t in w])):
        for t in tensors:
            if t is None or (t.device == device and t.dtype == dtype):
                continue
            if t.device != device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at "
                    f"{device} and {name} tensor at {t.device}"
                )
            raise RuntimeError(
                f"Input and {name} tensors are not the same dtype, found input tensor with "
                f"{dtype} and {name} tensor with {t.dtype}"
            )
