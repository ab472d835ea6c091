"""Recurrent layers as functions of tensors; the modules call these.

Letters in shapes: T time, B batch, I input size, H hidden size, P projection size or H, D
directions, L layers, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from torch import Tensor

from fusedrnn import arguments
from fusedrnn.arguments import truth
from fusedrnn.backends import Names, Request, check_names, select
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.cells import LSTM, PLAIN, Cell
from fusedrnn.cells import gru as gru_cell
from fusedrnn.cells import lstm as lstm_cell
from fusedrnn.layer import Stack
from fusedrnn.recurrence import cell_update
from fusedrnn.regularisers import Rates, Zoneout
from fusedrnn.running import Lengths, checked_run, group, tensors_of_layer

__all__ = ["gru", "lstm", "lstm_cell_update", "rnn"]


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
    plain, names = tensors_of_layer(cell, has_biases, proj_size > 0, layer_norm)
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
