"""The cell contract: the elementwise mathematics and the facts of one recurrent cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Keep = Callable[..., tuple[Tensor, ...]]


def keep(*saved: Tensor) -> tuple[Tensor, ...]:
    """Marks what a fused backend saves in a step; a check may read the saved planes instead."""
    return saved


class Step(Protocol):
    """step(gx [B,G,H], gh [B,G,H], state: S tensors [B,H]) -> S tensors [B,H], h first."""

    def __call__(
        self, gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], keep: Keep = keep
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Cell:
    """One recurrent cell: everything a driver must know to run it over a sequence.

    Args:
        name: the key of the cell in ``CELLS`` and in the native library.
        gates: one letter per gate, in the order of the weight rows.
        states: one letter per carried state, ``h`` first.
        saved: planes ``[T,B,H]`` a fused backend keeps from forward for backward.
        additive: ``gx`` and ``gh`` meet only as ``gx + gh``, so their gradients are equal and
            both biases can be added to ``gx``.
        step: the equations in PyTorch, the oracle of every backend. ``gx = W_ih x + b_ih`` and
            ``gh = W_hh h + b_hh``, both ``[B,G,H]``; returns the new states, h before projection.
            What is ``saved`` passes through ``keep``, in the order of its planes.
        triton: the functions ``forward`` and ``backward`` of the same cell in Triton, or the name
            of the module that has them; None: the Triton backend does not run the cell.
    """

    name: str
    gates: str
    states: str
    saved: int
    additive: bool
    step: Step
    triton: str | tuple[Any, Any] | None = None
