"""The cell contract: the elementwise mathematics and the facts of one recurrent cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

Keep = Callable[..., tuple[Tensor, ...]]
Step = Callable[..., tuple[Tensor, ...]]
Norm = Callable[[Tensor], Tensor]
Product = Callable[[Tensor], Tensor]

_registered: dict[str, Cell] = {}


def keep(*saved: Tensor) -> tuple[Tensor, ...]:
    """Marks what a fused backend saves in a step; a check may read the saved planes instead."""
    return saved


def no_norm(state: Tensor) -> Tensor:
    """In place of what may normalise the second state on its way into h: of cells whose step has an
    argument ``norm``, layer norm may make one of it."""
    return state


def _is_identifier(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()


@dataclass(frozen=True)
class Cell:
    """One recurrent cell: everything that backends must know to run it over a sequence.

    Args:
        name: what the cell is called; a backend knows the package's own by it.
        gates: one letter per gate, in the order of the weight rows.
        states: one letter per carried state, ``h`` first.
        step: the equations in PyTorch: ``step(gx, gh, state)``, or ``step(gx, gh, state, params)``
            for a cell with params, returns the new states ``[B,H]``, as many as in the tuple
            ``state``. ``gx = W_ih x + b_ih`` and ``gh = W_hh h + b_hh`` are ``[B,G,H]``. It may
            have an argument ``keep``, a function through which it passes what a fused backend
            saves, in that order; tests use it.
        params: the names of parameters that a unit has beside the weights, each ``[H]``.
        saved: planes ``[T,B,H]`` that a fused backend keeps from forward for backward; None: as
            many as there are gates.
        additive: ``gx`` and ``gh`` meet only as ``gx + gh``, so their gradients are equal and
            both biases can be added to ``gx``.
        late: how many of the gates, the last ones, see h only as the others leave it: ``gh`` is
            without them, and step has an argument ``product``, a function that makes of a factor
            ``[B,H]`` what is theirs, ``W_hh (factor * h) + b_hh``, ``[B,late,H]``.
        triton: the functions ``forward`` and ``backward`` of the same cell in Triton, as
            :mod:`fusedrnn.backends.triton.cells` describes them, or the name of a module that has
            them; None: the Triton backend does not run the cell.

    Raises:
        TypeError: a name, step or params of another kind.
        ValueError: no gate, no state, h not first, a letter or name twice, params named as the
            weights of a layer, as many late gates as there are, something else for triton.

    Example:
        >>> import fusedrnn, torch
        >>> def step(gx, gh, state):
        ...     f, g = (gx + gh).unbind(-2)
        ...     return (torch.lerp(g.tanh(), state[0], f.sigmoid()),)
        >>> minimal = fusedrnn.Cell("minimal", gates="fg", states="h", step=step)
        >>> y, h_n = fusedrnn.Recurrent(minimal, 3, 4)(torch.randn(5, 2, 3))
        >>> y.shape
        torch.Size([5, 2, 4])
    """

    name: str
    gates: str
    states: str
    step: Step
    _: KW_ONLY
    params: tuple[str, ...] = ()
    saved: int = None  # type: ignore[assignment]
    additive: bool = True
    late: int = 0
    triton: str | tuple[Any, Any] | None = None
    key: str = field(init=False, compare=False, repr=False)  # by which ops name the cell

    def __post_init__(self) -> None:
        for what in ("name", "gates", "states"):
            if not isinstance(getattr(self, what), str):
                raise TypeError(f"{what} should be a string, got {getattr(self, what)!r}")
        if isinstance(self.params, str) or not all(map(_is_identifier, self.params)):
            raise TypeError(f"params should be a tuple of names, got {self.params!r}")
        if not callable(self.step):
            raise TypeError(f"step should be a function, got {self.step!r}")
        object.__setattr__(self, "params", tuple(self.params))
        for what in ("gates", "states", "params"):
            names = getattr(self, what)
            if len(set(names)) != len(names) or (what != "params" and not names):
                raise ValueError(f"{what} should be distinct and not empty, got {names!r}")
        if self.states[0] != "h":
            raise ValueError(f"states should begin with h, got {self.states!r}")
        taken = {"weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"}.intersection(
            self.params
        )
        if taken:
            raise ValueError(f"params should not be named as weights are, got {min(taken)!r}")
        if self.saved is None:
            object.__setattr__(self, "saved", len(self.gates))
        if not isinstance(self.saved, int) or self.saved < 0:
            raise ValueError(f"saved should be an integer, not negative, got {self.saved}")
        if not isinstance(self.late, int) or not 0 <= self.late < len(self.gates):
            raise ValueError(
                f"late should be an integer in [0, {len(self.gates)}), got {self.late}"
            )
        pair = self.triton
        if not (pair is None or isinstance(pair, str) or (type(pair) is tuple and len(pair) == 2)):
            raise ValueError(f"triton should be two functions or a module's name, got {pair!r}")
        # A name may come again with other equations, as it does in a notebook.
        key, number = self.name, 1
        while _registered.setdefault(key, self) != self:
            number += 1
            key = f"{self.name}#{number}"
        object.__setattr__(self, "key", key)

    def __deepcopy__(self, memo: object) -> Cell:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return _restored, (fields,)


def _restored(fields: dict[str, Any]) -> Cell:
    """A pickled cell, which in another process must be registered anew."""
    return Cell(**fields)


def by_key(key: str) -> Cell:
    return _registered[key]
