"""Training on sequences longer than backward can reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def tbptt(module: nn.Module, x: Tensor, chunk: int, hx: Any = None) -> Iterator[tuple[Tensor, Any]]:
    """Truncated backpropagation through time (Williams & Peng 1990): a layer over ``x`` in chunks,
    the state carried from one to the next, but no gradient.

    Take the loss of a chunk, call ``backward`` and, if you like, an optimizer's step, before the
    next is asked for; memory is that of a chunk. An ``x`` that is itself computed from parameters
    has one graph for all chunks, which the first ``backward`` frees: compute it in the module,
    chunk by chunk.

    Args:
        module: a layer of one direction, of fusedrnn or torch.nn: ``module(x, hx)`` returns its
            outputs and its state. One without an attribute ``batch_first`` has time first.
        x: ``[T,B,I]``; ``[B,T,I]`` with batch_first; ``[T,I]`` unbatched.
        chunk: steps of a chunk; the last may have fewer.
        hx: the state before the first; None: the module's initial state.

    Yields:
        ``y`` of the chunk in the layout of x, and the state after it, detached.

    Raises:
        TypeError: x is no tensor, or chunk no integer.
        ValueError: chunk < 1, or a module of two directions, which has no state to carry back.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.GRU(3, 4)
        >>> for y, state in fusedrnn.tbptt(layer, torch.randn(10, 2, 3), chunk=4):
        ...     y.square().mean().backward()
        >>> y.shape, state.shape
        (torch.Size([2, 2, 4]), torch.Size([1, 2, 4]))
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x should be a tensor, got {type(x).__name__}")
    if not isinstance(chunk, int) or isinstance(chunk, bool):
        raise TypeError(f"chunk should be an integer, got {chunk!r}")
    if chunk < 1:
        raise ValueError(f"chunk should be at least 1, got {chunk}")
    if getattr(module, "bidirectional", False):
        raise ValueError("tbptt needs a module of one direction, got bidirectional=True")
    return _chunks(module, x, chunk, hx)


def _chunks(module: nn.Module, x: Tensor, chunk: int, hx: Any) -> Iterator[tuple[Tensor, Any]]:
    batch_first = x.dim() == 3 and getattr(module, "batch_first", False)
    for part in x.split(chunk, 1 if batch_first else 0):
        y, state, *_ = module(part, hx)
        hx = _detached(state)
        yield y, hx


def _detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else tuple(map(_detached, state))
