"""The backends, in the order in which they are tried, and how one is chosen."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fusedrnn.backends.backend import (
    Backend,
    Call,
    CellUpdates,
    Gradients,
    Noise,
    Request,
    Run,
    Sequence,
    Stacks,
    Upstream,
    Wanted,
    Weights,
    backward_of,
    forward_of,
)
from fusedrnn.backends.cuda import Cuda
from fusedrnn.backends.cudnn import Cudnn
from fusedrnn.backends.native import Native
from fusedrnn.backends.reference import Reference, is_watched
from fusedrnn.backends.triton import Triton

__all__ = [
    "REFERENCE",
    "Backend",
    "Call",
    "CellUpdates",
    "Gradients",
    "Names",
    "Noise",
    "Reference",
    "Request",
    "Run",
    "Sequence",
    "Stacks",
    "Upstream",
    "Wanted",
    "Weights",
    "backend",
    "backward_of",
    "by_name",
    "check_names",
    "forward_of",
    "list_backends",
    "select",
    "weigh",
]

REFERENCE = Reference()
_ALL: dict[str, Backend | Reference] = {
    b.name: b for b in (Cudnn(), Cuda(), Triton(), Native(), REFERENCE)
}
# cuDNN comes before our own CUDA kernels, which lose to it in many shapes (bench/results/h200). The
# Triton kernels have never run on a device: who wants them asks for them.
_AUTOMATIC = tuple(name for name in _ALL if name != "triton")

Names = str | list[str] | tuple[str, ...] | None


def list_backends() -> list[str]:
    """The names of all backends, in the order in which they are tried; "triton" only if asked for.

    Example:
        >>> import fusedrnn
        >>> fusedrnn.list_backends()
        ['cudnn', 'cuda', 'triton', 'cpu', 'reference']
    """
    return list(_ALL)


def check_names(names: Names) -> tuple[str, ...]:
    """``names`` as a tuple, in order; ValueError for an unknown one. None: no wish, ``()``."""
    if names is None:
        return ()
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in _ALL:
            raise ValueError(f"unknown backend {name!r}, expected one of {list_backends()}")
    return names


class _Context(threading.local):
    names: tuple[str, ...] = ()


_context = _Context()
_environment = check_names(
    [name.strip() for name in os.environ.get("FUSEDRNN_BACKEND", "").split(",") if name.strip()]
)


@contextmanager
def backend(names: Names) -> Iterator[None]:
    """Layers called inside run on this backend, or on the first of a list that supports the call.

    Holds for the calling thread and for the backward of what was computed inside. A layer's own
    ``backend=`` argument comes first, then this, then the environment variable
    ``FUSEDRNN_BACKEND``.

    Args:
        names: a name of :func:`list_backends`, or a list of them in order; None: the default.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import fusedrnn, torch
        >>> with fusedrnn.backend("reference"):
        ...     y, h_n = fusedrnn.GRU(3, 4)(torch.randn(5, 2, 3))
    """
    before, _context.names = _context.names, check_names(names)
    try:
        yield
    finally:
        _context.names = before


def _names(wish: tuple[str, ...]) -> tuple[str, ...]:
    """Of the backends that may run a call, in order."""
    return wish or _context.names or _environment or _AUTOMATIC


def weigh(request: Request, wish: tuple[str, ...]) -> dict[str, str | None]:
    """Why each backend that may run ``request`` cannot, in order; None for those that can."""
    return {name: _ALL[name].supports(request) for name in _names(wish)}


def select(request: Request, wish: tuple[str, ...] = ()) -> Backend | Reference:
    """The first backend, in order, that supports the request; RuntimeError with every reason."""
    if is_watched():
        return REFERENCE
    reasons = {}
    for name in _names(wish):
        reasons[name] = _ALL[name].supports(request)
        if reasons[name] is None:
            return _ALL[name]
    raise RuntimeError("; ".join(f"backend {name!r} {reason}" for name, reason in reasons.items()))


def by_name(name: str) -> Backend | Reference:
    return _ALL[name]
