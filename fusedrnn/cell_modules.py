"""Drop-in modules for torch.nn.LSTMCell, GRUCell and RNNCell: one step of a layer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from fusedrnn import arguments, running
from fusedrnn.arguments import changed, truth
from fusedrnn.backends import Names, Weights, check_names
from fusedrnn.cells import GRU, LSTM, PLAIN, Cell, gru, lstm
from fusedrnn.regularisers import NO_RATES, Rates, Zoneout


def cell_of(module: RNNCellBase) -> Cell:
    """The cell of one of these modules or of torch.nn's."""
    if isinstance(module, LSTMCell):
        return lstm(peephole=module.peephole, coupled_gates=module.coupled_gates)
    if isinstance(module, nn.LSTMCell):
        return LSTM
    if isinstance(module, GRUCell):
        return gru(reset_after=module.reset_after)
    if isinstance(module, nn.GRUCell):
        return GRU
    nonlinearity: Any = module.nonlinearity
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    return PLAIN[f"rnn_{nonlinearity}"]


def wish_of(module: RNNCellBase) -> tuple[str, ...]:
    """The backends that the module asks for; torch.nn's own asks for none."""
    return check_names(module.backend) if isinstance(module, _CellModule) else ()


def rates_of(module: RNNCellBase) -> Rates:
    """Of the module's regularisers; torch.nn's own has none."""
    if not isinstance(module, _CellModule) or module.zoneout == 0:
        return NO_RATES
    return Rates.checked(len(cell_of(module).states), 0.0, 0.0, module.zoneout)


def step_module(module: RNNCellBase, input: Tensor, hx: Any) -> tuple[Tensor, ...]:
    """``module.forward`` for any RNNCellBase, with torch.nn's checks: the new states."""
    cell = cell_of(module)
    _check_dims(cell, input, hx)
    batched = input.dim() == 2
    if len(cell.states) == 1 and hx is not None:
        hx = (hx,)
    if not batched:
        input = input.unsqueeze(0)
        hx = None if hx is None else tuple(s.unsqueeze(0) for s in hx)
    _check_sizes(module, cell, input, hx)
    weights = Weights(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    if cell.params:
        params: Any = module.weight_peephole
        of_units = running.by_unit(cell, params, module.weight_hh)
        weights = weights._replace(params=of_units)
    if isinstance(module, _CellModule):
        weights = weights._replace(**{name: getattr(module, name) for name in module._norm_names()})
    wish, rates = wish_of(module), rates_of(module)
    new = running.step(cell, input, hx, weights, wish, rates, module.training)
    return new if batched else tuple(s.squeeze(0) for s in new)


def _check_dims(cell: Cell, input: Tensor, hx: Any) -> None:
    kind = f"{cell.name.split('_')[0].upper()}Cell"
    if input.dim() not in (1, 2):
        raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is None:
        return
    if len(cell.states) == 1:
        if hx.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return
    for index, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(
                f"{kind}: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead"
            )
    if isinstance(hx, Tensor) and input.dim() == 2:
        raise TypeError("hx should be a tuple of two tensors (h, c), got a tensor")
    if len(hx) != len(cell.states):
        raise RuntimeError(f"{kind[:-4].lower()}_cell expects two hidden states")


def _check_sizes(
    module: RNNCellBase, cell: Cell, input: Tensor, hx: tuple[Tensor, ...] | None
) -> None:
    if input.shape[1] != module.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]} expected {module.input_size}"
        )
    for k, state in enumerate(hx or ()):
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size "
                f"{state.shape[0]}"
            )
        width = state.shape[min(1, state.dim() - 1)]
        if state.dim() != 2 or width != module.hidden_size:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {width}, "
                f"expected {module.hidden_size}"
            )


def fill_forget_gate(cell: Cell, bias: Tensor, value: float | None) -> None:
    """The forget gate's block of ``bias [G*H]``; None: it stays."""
    if value is not None:
        nn.init.constant_(bias.chunk(len(cell.gates))[cell.gates.index("f")], value)


class _CellModule(RNNCellBase):
    backend: Names = None
    layer_norm = False
    zoneout: Zoneout = 0.0

    def __init__(
        self, *args: Any, backend: Names, zoneout: Zoneout, layer_norm: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_names(backend)
        if backend is not None:  # else the class's
            self.backend = backend
        states = 2 if isinstance(self, LSTMCell) else 1
        rates = Rates.checked(states, 0.0, 0.0, zoneout)
        if rates.zoneout:
            self.zoneout = rates.zoneout
        if truth("layer_norm", layer_norm):
            self.layer_norm = True

    def _norm_names(self) -> tuple[str, ...]:
        return running.norm_names(cell_of(self)) if self.layer_norm else ()

    def _register_norms(self) -> None:
        for name in self._norm_names():
            norm = running.new_norm(cell_of(self), name, self.hidden_size, self.weight_ih)
            self.register_parameter(name, norm)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._norm_names():
            if name in self._parameters:  # not while torch.nn's own are made
                running.fill_norm(name, getattr(self, name))

    def extra_repr(self) -> str:
        own = {
            "peephole": False, "coupled_gates": False, "reset_after": True, "layer_norm": False,
            "forget_bias": None, "zoneout": 0.0, "backend": None,
        }  # fmt: skip
        return super().extra_repr() + changed(self, own)


class LSTMCell(_CellModule):
    """One LSTM step, a drop-in for :class:`torch.nn.LSTMCell`; see :mod:`fusedrnn.cells.lstm`.

    ``peephole``, ``coupled_gates``, ``layer_norm``, ``forget_bias`` and ``zoneout`` are those of
    :class:`fusedrnn.LSTM`.

    Args (forward):
        input: ``[B,I]`` or ``[I]``.
        hx: ``(h [B,H], c [B,H])`` or ``([H], [H])``; None: zeros.

    Returns:
        The new ``(h, c)`` in the shapes of hx.

    Raises:
        ValueError, RuntimeError: as torch.nn.

    Example:
        >>> import fusedrnn, torch
        >>> h, c = fusedrnn.LSTMCell(3, 4)(torch.randn(2, 3))
        >>> h.shape
        torch.Size([2, 4])
    """

    peephole = False
    coupled_gates = False
    _forget_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        forget_bias: float | None = None,
        zoneout: Zoneout = 0.0,
        backend: Names = None,
    ) -> None:
        self._forget_bias = arguments.forget_bias(forget_bias, bias)
        if truth("peephole", peephole):  # else the class's
            self.peephole = True
        if truth("coupled_gates", coupled_gates):
            self.coupled_gates = True
        cell = lstm(peephole=peephole, coupled_gates=coupled_gates)
        super().__init__(
            input_size, hidden_size, bias, num_chunks=len(cell.gates), device=device, dtype=dtype,
            backend=backend, zoneout=zoneout, layer_norm=layer_norm,
        )  # fmt: skip
        if cell.params:
            params = self.weight_ih.new_empty(len(cell.params) * hidden_size)
            bound = 1 / math.sqrt(hidden_size)
            self.weight_peephole = nn.Parameter(params.uniform_(-bound, bound))
        self._register_norms()

    @property
    def forget_bias(self) -> float | None:
        """What ``reset_parameters`` sets the forget gate's ``bias_ih`` to."""
        return self._forget_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, bias in self.named_parameters():
            if name == "bias_ih":
                fill_forget_gate(cell_of(self), bias, self.forget_bias)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h, c = step_module(self, input, hx)
        return h, c


class GRUCell(_CellModule):
    """One GRU step, a drop-in for :class:`torch.nn.GRUCell`; see :mod:`fusedrnn.cells.gru`.

    ``reset_after``, ``layer_norm`` and ``zoneout``, of h, are those of :class:`fusedrnn.GRU`.

    Args (forward):
        input: ``[B,I]`` or ``[I]``.
        hx: ``[B,H]`` or ``[H]``; None: zeros.

    Returns:
        The new h in the shape of hx.

    Raises:
        ValueError, RuntimeError: as torch.nn.

    Example:
        >>> import fusedrnn, torch
        >>> fusedrnn.GRUCell(3, 4)(torch.randn(2, 3)).shape
        torch.Size([2, 4])
    """

    reset_after = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        zoneout: Zoneout = 0.0,
        backend: Names = None,
    ) -> None:
        if not arguments.reset_after(reset_after, layer_norm):  # else the class's
            self.reset_after = False
        super().__init__(
            input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype,
            backend=backend, zoneout=zoneout, layer_norm=layer_norm,
        )  # fmt: skip
        self._register_norms()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return step_module(self, input, hx)[0]


class RNNCell(_CellModule):
    """One Elman RNN step, a drop-in for :class:`torch.nn.RNNCell`; see :mod:`fusedrnn.cells.rnn`.

    ``zoneout``, of h, is that of :class:`fusedrnn.RNN`.

    Args (forward):
        input: ``[B,I]`` or ``[I]``.
        hx: ``[B,H]`` or ``[H]``; None: zeros.

    Returns:
        The new h in the shape of hx.

    Raises:
        ValueError, RuntimeError: as torch.nn.

    Example:
        >>> import fusedrnn, torch
        >>> fusedrnn.RNNCell(3, 4, nonlinearity="relu")(torch.randn(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        zoneout: Zoneout = 0.0,
        backend: Names = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype,
            backend=backend, zoneout=zoneout,
        )  # fmt: skip
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return step_module(self, input, hx)[0]
