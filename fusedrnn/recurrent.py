"""Layers of any cell, the user's own included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusedrnn import running
from fusedrnn.arguments import changed, probability, size
from fusedrnn.backends import Names, Weights, check_names
from fusedrnn.cells import Cell
from fusedrnn.running import Lengths


class Recurrent(nn.Module):
    """A stack of layers of one :class:`fusedrnn.Cell`, on every backend that supports the cell.

    Parameters have torch.nn's names and shapes, with G the number of the cell's gates:
    ``weight_ih_l0 [G*H,I]``, ``weight_hh_l0 [G*H,H]``, ``bias_ih_l0``, ``bias_hh_l0 [G*H]``, and by
    its name each of the cell's params, ``{name}_l0 [H]``; the initial values are from
    U(-1/sqrt(H), 1/sqrt(H)).

    Args:
        cell: the cell.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as of :class:`torch.nn.LSTM`.
        backend: the name of a backend or a list of names, tried in order.

    Args (forward):
        input: ``[T,B,I]``; ``[B,T,I]`` with batch_first.
        hx: the initial states ``[L*D,B,H]``, h first: a tensor if the cell has one state, else a
            tuple; None: zeros.
        lengths, resets, return_cell_states: as of :class:`fusedrnn.LSTM`; the cell state is the
            cell's last.

    Returns:
        ``y [T,B,D*H]`` in the layout of input, the final states in the form of hx, and with
        return_cell_states the last state of every step ``[T,B,D*H]``.

    Raises:
        TypeError: ``cell`` is no Cell, input no tensor (lengths do what a PackedSequence does), or
            hx not of the form that the states ask for.
        ValueError, RuntimeError: a wrong size, shape, dtype, device or backend, or a step that does
            not return the cell's states.

    Example:
        >>> import fusedrnn, torch
        >>> from fusedrnn.cells import LSTM
        >>> layer = fusedrnn.Recurrent(LSTM, 3, 4, num_layers=2)
        >>> y, (h_n, c_n) = layer(torch.randn(5, 2, 3), lengths=[5, 2])
        >>> y.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 2, 4]))
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: Names = None,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"cell should be a fusedrnn.Cell, got {type(cell).__name__}")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, value in sizes.items():
            size(name, value)
        check_names(backend)
        _try_step(cell, hidden_size, device, dtype)
        self.cell, self.backend = cell, backend
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first = bias, batch_first
        self.dropout = probability("dropout", dropout)
        self.bidirectional = bidirectional
        rows = len(cell.gates) * hidden_size
        for layer, suffix in self.places():
            inputs = hidden_size * (2 if bidirectional else 1) if layer else input_size
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (rows, inputs),
                "weight_hh": (rows, hidden_size),
                **({"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}),
                **{name: (hidden_size,) for name in cell.params},
            }
            for name, shape in shapes.items():
                empty = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name + suffix, nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def places(self) -> list[tuple[int, str]]:
        """Each layer and direction, and what the names of its parameters end with."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(k, f"_l{k}{end}") for k in range(self.num_layers) for end in directions]

    def _weights(self, suffix: str) -> Weights:
        def get(name: str) -> Any:
            return getattr(self, name + suffix, None)

        params = [get(name) for name in self.cell.params]
        return Weights(
            get("weight_ih"), get("weight_hh"), get("bias_ih"), get("bias_hh"),
            params=torch.stack(params) if params else None,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, ...] | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        states = len(self.cell.states)
        if not isinstance(input, Tensor):
            raise TypeError(f"input should be a tensor, got {type(input).__name__}")
        if input.dim() == 3 and input.shape[2] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, "
                f"got {input.shape[2]}"
            )
        if hx is not None:
            got = (hx,) if isinstance(hx, Tensor) else hx
            tensors = isinstance(got, tuple | list) and all(isinstance(s, Tensor) for s in got)
            if not tensors or len(got) != states:
                wanted = "a tensor" if states == 1 else f"a tuple of {states} tensors"
                found = f"{len(got)} tensors" if tensors else type(hx).__name__
                raise TypeError(f"hx should be {wanted}, got {found}")
            hx = tuple(got)
        stack = running.checked_run(
            self.cell, input, hx, [self._weights(suffix) for _, suffix in self.places()],
            dropout=self.dropout, training=self.training, bidirectional=self.bidirectional,
            batch_first=self.batch_first, lengths=lengths, resets=resets, backend=self.backend,
            cell_states=return_cell_states,
        )  # fmt: skip
        final = stack.h_n if states == 1 else (stack.h_n, *stack.c_n)
        return (stack.y, final, stack.c) if return_cell_states else (stack.y, final)

    def extra_repr(self) -> str:
        shown = f"{self.cell.name}, {self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False, "backend": None,
        }  # fmt: skip
        return shown + changed(self, defaults)


def _try_step(cell: Cell, hidden_size: int, device: Any, dtype: Any) -> None:
    """The step of a user's cell returns as many states as there are, each ``[B,H]``."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, hidden_size, device=device, dtype=dtype)

    gates, states = zeros(2, len(cell.gates)), (zeros(2),) * len(cell.states)
    params = (tuple(zeros() for _ in cell.params),) if cell.params else ()
    early = gates[:, : len(cell.gates) - cell.late]
    late = {"product": lambda factor: factor.unsqueeze(-2) + zeros(cell.late)} if cell.late else {}
    new = cell.step(gates, early, states, *params, **late)
    tensors = isinstance(new, tuple) and all(isinstance(n, Tensor) for n in new)
    if not tensors or [n.shape for n in new] != [s.shape for s in states]:
        found = [list(n.shape) for n in new] if tensors else type(new).__name__
        raise ValueError(
            f"step of the cell {cell.name} should return a tuple of {len(states)} tensors, of "
            f"shape {list(states[0].shape)} here, got {found}"
        )
