"""Recurrent layers as functions of tensors; the modules call these.

Letters in shapes: T time, B batch, I input size, H hidden size, P projection size or H, D
directions, L layers, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedrnn import arguments
from fusedrnn.arguments import probability, truth
from fusedrnn.backends import Names, Request, Sequence, Weights, check_names, select
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.cells import LSTM, PLAIN, Cell
from fusedrnn.cells import gru as gru_cell
from fusedrnn.cells import lstm as lstm_cell
from fusedrnn.layer import Between, Stack, run_layers, run_step
from fusedrnn.recompute import check_recompute
from fusedrnn.recurrence import cell_update
from fusedrnn.regularisers import NO_RATES, Rates, Zoneout, regularised

__all__ = ["gru", "lstm", "lstm_cell_update", "rnn"]

Lengths = Tensor | list[int] | None


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Seq[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    peephole: bool = False,
    coupled_gates: bool = False,
    layer_norm: bool = False,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: Zoneout = 0.0,
    recompute: str = "none",
    lengths: Lengths = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
    backend: Names = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A stack of LSTM layers; equations in :mod:`fusedrnn.cells.lstm`.

    Args:
        x: ``[T,B,I]``, or ``[B,T,I]`` with batch_first.
        hx: ``(h_0 [L*D,B,P], c_0 [L*D,B,H])``; None: zeros.
        params: flat, in the order of the module's state_dict.
        peephole, coupled_gates, layer_norm, weight_dropout, recurrent_dropout, zoneout, recompute:
            as of :class:`fusedrnn.LSTM`.
        lengths: ``[B]`` int64 or a list; steps ``t >= lengths[b]`` are not computed.
        resets: ``[T,B]`` bool (``[B,T]`` with batch_first); true where a new sequence begins.
        return_cell_states: also return c of every step of the last layer.
        backend: a name or a list of names, tried in order.

    Returns:
        ``y [T,B,D*P]`` (or ``[B,T,D*P]``), ``(h_n, c_n)`` in the shapes of hx, and with
        return_cell_states ``c [T,B,D*H]`` in the layout of y.

    Raises:
        ValueError, RuntimeError: a wrong number, shape, dtype or device of an argument.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.LSTM(3, 4)
        >>> y, (h_n, c_n) = fusedrnn.functional.lstm(
        ...     torch.randn(5, 2, 3), None, list(layer.parameters()))
        >>> y.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    if hx is not None and (isinstance(hx, Tensor) or len(hx) != 2):
        raise TypeError(f"hx should be a tuple of two tensors (h_0, c_0), got {type(hx).__name__}")
    cell = lstm_cell(
        peephole=truth("peephole", peephole), coupled_gates=truth("coupled_gates", coupled_gates)
    )
    stack = _run_flat(
        cell, x, hx, params, has_biases=has_biases, num_layers=num_layers, dropout=dropout,
        training=training, rates=Rates.checked(2, weight_dropout, recurrent_dropout, zoneout),
        bidirectional=bidirectional, batch_first=batch_first, proj_size=proj_size, lengths=lengths,
        resets=resets, cell_states=return_cell_states, recompute=recompute, backend=backend,
        layer_norm=truth("layer_norm", layer_norm),
    )  # fmt: skip
    if return_cell_states:
        assert stack.c is not None
        return stack.y, (stack.h_n, stack.c_n[0]), stack.c
    return stack.y, (stack.h_n, stack.c_n[0])


def gru(
    x: Tensor,
    hx: Tensor | None,
    params: Seq[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    reset_after: bool = True,
    layer_norm: bool = False,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: Zoneout = 0.0,
    recompute: str = "none",
    lengths: Lengths = None,
    resets: Tensor | None = None,
    backend: Names = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers; equations in :mod:`fusedrnn.cells.gru`, arguments as :func:`lstm`, and
    ``reset_after`` as of :class:`fusedrnn.GRU`.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.GRU(3, 4)
        >>> y, h_n = fusedrnn.functional.gru(torch.randn(5, 2, 3), None, list(layer.parameters()))
        >>> y.shape
        torch.Size([5, 2, 4])
    """
    cell = gru_cell(reset_after=arguments.reset_after(reset_after, layer_norm))
    stack = _run_flat(
        cell, x, _only(hx), params, has_biases=has_biases,
        num_layers=num_layers, dropout=dropout, training=training,
        rates=Rates.checked(1, weight_dropout, recurrent_dropout, zoneout),
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, resets=resets,
        recompute=recompute, backend=backend, layer_norm=truth("layer_norm", layer_norm),
    )  # fmt: skip
    return stack.y, stack.h_n


def rnn(
    x: Tensor,
    hx: Tensor | None,
    params: Seq[Tensor],
    *,
    nonlinearity: str = "tanh",
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: Zoneout = 0.0,
    recompute: str = "none",
    lengths: Lengths = None,
    resets: Tensor | None = None,
    backend: Names = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Elman RNN layers; equations in :mod:`fusedrnn.cells.rnn`, arguments as
    :func:`lstm`, and ``nonlinearity`` "tanh" or "relu".

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.RNN(3, 4, nonlinearity="relu")
        >>> y, h_n = fusedrnn.functional.rnn(
        ...     torch.randn(5, 2, 3), None, list(layer.parameters()), nonlinearity="relu")
        >>> y.shape
        torch.Size([5, 2, 4])
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    stack = _run_flat(
        PLAIN[f"rnn_{nonlinearity}"], x, _only(hx), params,
        has_biases=has_biases, num_layers=num_layers, dropout=dropout, training=training,
        rates=Rates.checked(1, weight_dropout, recurrent_dropout, zoneout),
        bidirectional=bidirectional, batch_first=batch_first,
        lengths=lengths, resets=resets, recompute=recompute, backend=backend,
    )  # fmt: skip
    return stack.y, stack.h_n


def lstm_cell_update(gates: Tensor, c: Tensor, *, backend: Names = None) -> tuple[Tensor, Tensor]:
    """The elementwise part of one LSTM step alone, for loops of one's own; equations in
    :mod:`fusedrnn.cells.lstm`.

    Args:
        gates: ``[B,4*H,*]``, what reaches the gates i f g o from x and h together; ``*`` may be
            positions, as in a convolutional LSTM.
        c: ``[B,H,*]``, of the dtype of gates or, beside gates of 16 bits, float32, in which it
            loses nothing from step to step.
        backend: a name or a list of names, tried in order: "cpu", "triton" or "reference".

    Returns:
        The new ``h`` in the dtype of gates and ``c`` in its own, both ``[B,H,*]``.

    Raises:
        ValueError, RuntimeError: a wrong shape, dtype or device.

    Example:
        >>> import fusedrnn, torch
        >>> w, h, c = torch.randn(4 * 6, 6), torch.zeros(2, 6), torch.zeros(2, 6)
        >>> for gx in torch.randn(5, 2, 4 * 6):
        ...     h, c = fusedrnn.functional.lstm_cell_update(gx + h @ w.t(), c)
        >>> h.shape
        torch.Size([2, 6])
    """
    planes = len(LSTM.gates)
    if c.dim() < 2 or gates.shape != (c.shape[0], planes * c.shape[1], *c.shape[2:]):
        raise ValueError(
            f"gates should have shape [B,{planes}*H,*] for c [B,H,*], got {list(gates.shape)} and "
            f"{list(c.shape)}"
        )
    if not (gates.is_floating_point() or gates.is_complex()):
        raise RuntimeError(f"gates should be floating-point, got {gates.dtype}")
    dtypes = dict.fromkeys((gates.dtype, compute_dtype(gates.dtype)))
    if c.dtype not in dtypes or c.device != gates.device:
        raise RuntimeError(
            f"c should be {' or '.join(map(str, dtypes))} on {gates.device} as gates are, got "
            f"{c.dtype} on {c.device}"
        )
    return update(LSTM, gates, c, None, check_names(backend))


def update(
    cell: Cell, gates: Tensor, c: Tensor, params: Tensor | None, wish: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """:func:`lstm_cell_update` of checked shapes, for any such cell; ``params [K,H*]``."""
    shape, rows, units = c.shape, c.shape[0], c.shape[1:].numel()
    gates, c = gates.reshape(rows, len(cell.gates), units), c.reshape(rows, units)
    request = Request(cell, gates.dtype, c.device, units, 0, cell_update=True)
    h, c = cell_update(select(request, wish), cell, gates, c, params)
    return h.view(shape), c.view(shape)


def _only(hx: Tensor | None) -> tuple[Tensor, ...] | None:
    if not isinstance(hx, Tensor | None):
        raise TypeError(f"hx should be a tensor, got {type(hx).__name__}")
    return None if hx is None else (hx,)


def _run_flat(
    cell: Cell,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    params: Seq[Tensor],
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    proj_size: int = 0,
    layer_norm: bool = False,
    **options: Any,
) -> Stack:
    """:func:`checked_run` on the flat parameters of torch.nn's order."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    directions = 2 if bidirectional else 1
    plain, names = _tensors(cell, has_biases, proj_size > 0, layer_norm)
    each = plain + bool(cell.params) + len(names)
    if len(params) != each * directions * num_layers:
        raise ValueError(
            f"params should hold {each} tensors for each of {num_layers} layers and {directions} "
            f"directions, got {len(params)} in all"
        )
    weights = group(cell, params, has_biases, proj_size > 0, layer_norm)
    return checked_run(
        cell, x, hx, weights, bidirectional=bidirectional, proj_size=proj_size, **options
    )


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


def _tensors(
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
    plain, names = _tensors(cell, has_biases, has_projection, layer_norm)
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
