"""Drop-in modules for torch.nn.LSTM, GRU and RNN, and their cells."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import functional
from fusedrnn.backends import Names, Sequence, Weights, check_names
from fusedrnn.cell_modules import fill_forget_gate, finite
from fusedrnn.cells import CELLS, Cell
from fusedrnn.functional import Lengths
from fusedrnn.layer import Stack

State = Tensor | tuple[Tensor, ...]


def cell_of(module: nn.RNNBase) -> Cell:
    return CELLS[module.mode.lower()]


def initial_states(module: nn.RNNBase) -> tuple[Tensor, ...] | None:
    """The module's own initial states ``[L*D,P]`` and ``[L*D,H]``; None: zeros."""
    if not isinstance(module, _Layers) or module.initial_state == "zeros":
        return None
    return tuple(getattr(module, f"{letter}0") for letter in cell_of(module).states)


def wish_of(module: nn.RNNBase) -> tuple[str, ...]:
    """The backends that the module asks for; torch.nn's own asks for none."""
    return check_names(module.backend) if isinstance(module, _Layers) else ()


def weights_of(module: nn.RNNBase) -> list[Weights]:
    """The parameters as they are now: read by name at each call, never cached."""
    params = [getattr(module, name) for name in module._flat_weights_names]
    return functional.group(params, module.bias, module.proj_size > 0)


def run_module(
    module: nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: Any = None,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
) -> tuple[Any, ...]:
    """``module.forward`` for any nn.RNNBase of torch.nn's modes, with torch.nn's checks."""
    if isinstance(input, PackedSequence):
        if lengths is not None or resets is not None:
            raise ValueError("a PackedSequence takes neither lengths (it has its own) nor resets")
        return _run_packed(module, input, hx, return_cell_states)
    _check_dims(module, input, hx)
    batched, batch_dim = input.dim() == 3, 0 if module.batch_first else 1
    if not batched:
        input = input.unsqueeze(batch_dim)
        hx = None if hx is None else _map(hx, lambda s: s.unsqueeze(1))
        if isinstance(resets, Tensor):
            if resets.dim() != 1:
                raise ValueError(
                    f"resets should be of shape [{input.shape[batch_dim - 1]}] for unbatched "
                    f"input, got {list(resets.shape)}"
                )
            resets = resets.unsqueeze(batch_dim)
    _check_shapes(module, input, hx, None)
    x = input.transpose(0, 1) if module.batch_first else input
    seq = functional.sequence(x, lengths, resets, module.batch_first)
    between = functional.between_layers(module.dropout, module.training)
    stack = _run(module, x, hx, seq, between, return_cell_states)
    if module.batch_first:
        stack = functional.to_batch_first(stack)
    y, c, hidden = stack.y, stack.c, _state(stack)
    if not batched:
        y, hidden = y.squeeze(batch_dim), _map(hidden, lambda s: s.squeeze(1))
        c = None if c is None else c.squeeze(batch_dim)
    return (y, hidden) if c is None else (y, hidden, c)


def _run_packed(
    module: nn.RNNBase, packed: PackedSequence, hx: Any, return_cell_states: bool
) -> tuple[Any, ...]:
    """Pads (rows stay in their sorted order), runs with lengths, and packs again."""
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if hx is not None and _has_cell_state(module):
        _check_pair(hx)
    _check_shapes(module, data, hx, batch_sizes)
    hx = None if hx is None else module.permute_hidden(hx, sorted_indices)

    def pad(rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch._VF._pad_packed_sequence(rows, batch_sizes, False, 0.0, len(batch_sizes))

    x, lengths = pad(data)

    def pack(padded: Tensor) -> Tensor:
        if padded.is_complex():  # the operation has no complex gradient
            return torch.view_as_complex(pack(torch.view_as_real(padded)))
        return torch._VF._pack_padded_sequence(padded, lengths, False)[0]

    def between(y: Tensor) -> Tensor:  # on the packed rows, so that the mask is torch.nn's
        if module.dropout and module.training:
            return pad(F.dropout(pack(y), module.dropout))[0]
        return y

    seq = Sequence(lengths.to(x.device), None)
    stack = _run(module, x, hx, seq, between, return_cell_states)
    hidden = module.permute_hidden(_state(stack), unsorted_indices)  # type: ignore[arg-type]

    def packed_like(padded: Tensor) -> PackedSequence:
        return PackedSequence(pack(padded), batch_sizes, sorted_indices, unsorted_indices)

    y = packed_like(stack.y)
    return (y, hidden) if stack.c is None else (y, hidden, packed_like(stack.c))


def _run(
    module: nn.RNNBase, x: Tensor, hx: Any, seq: Sequence, between: Any, cell_states: bool
) -> Stack:
    hx = (hx,) if isinstance(hx, Tensor) else hx
    initial = initial_states(module)
    if initial is not None:
        seq = seq._replace(initial=initial)
        hx = tuple(s.unsqueeze(1).expand(-1, x.shape[1], -1) for s in initial) if hx is None else hx
    return functional.run(
        cell_of(module),
        x,
        hx,
        weights_of(module),
        2 if module.bidirectional else 1,
        seq,
        between,
        cell_states,
        wish_of(module),
    )


def _has_cell_state(module: nn.RNNBase) -> bool:
    return len(cell_of(module).states) > 1


def _state(stack: Stack) -> State:
    return (stack.h_n, *stack.c_n) if stack.c_n else stack.h_n


def _map(hx: Any, f: Any) -> Any:
    return f(hx) if isinstance(hx, Tensor) else tuple(f(s) for s in hx)


def _check_dims(module: nn.RNNBase, input: Tensor, hx: Any) -> None:
    if input.dim() not in (2, 3):
        kind, tensor = module.mode.split("_")[0], " tensor" if module.mode[:3] == "RNN" else ""
        raise ValueError(
            f"{kind}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead"
        )
    if hx is None:
        return
    wanted = "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
    if _has_cell_state(module):
        if hx[0].dim() != input.dim() or hx[1].dim() != input.dim():
            raise RuntimeError(
                f"For {wanted} input, hx and cx should also be {wanted[-3:]} "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        _check_pair(hx)
    elif hx.dim() != input.dim():
        raise RuntimeError(
            f"For {wanted} input, hx should also be {wanted[-3:]} but got {hx.dim()}-D tensor"
        )


def _check_pair(hx: Any) -> None:
    if isinstance(hx, Tensor):
        raise TypeError("hx should be a tuple of two tensors (h_0, c_0), got a tensor")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")


def _check_shapes(module: nn.RNNBase, input: Tensor, hx: Any, batch_sizes: Tensor | None) -> None:
    if hx is None:
        module.check_input(input, batch_sizes)
    else:
        module.check_forward_args(input, hx, batch_sizes)


INITIAL_STATES = ("zeros", "learned", "random")


class _Layers(nn.RNNBase):
    """What the three layers share. A layer is an nn.RNNBase, with its parameters, initialisation,
    state_dict and checks, but not an nn.LSTM: torch.compile breaks the graph on those."""

    backend: Names = None
    _initial_state: str = "zeros"

    def __init__(
        self, mode: str, *args: Any, backend: Names, initial_state: str, **kwargs: Any
    ) -> None:
        check_names(backend)
        if initial_state not in INITIAL_STATES:
            raise ValueError(
                f"initial_state should be one of {INITIAL_STATES}, got {initial_state!r}"
            )
        super().__init__(mode, *args, **kwargs)
        if backend is not None:
            self.backend = backend
        if initial_state != "zeros":  # else the class's: what is as torch.nn's has no more than it
            self._initial_state = initial_state
            self._register_initial_states()

    @property
    def initial_state(self) -> str:
        """Of the states that enter where no hx is given."""
        return self._initial_state

    def _register_initial_states(self) -> None:
        weight: Any = self.weight_ih_l0
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for letter in cell_of(self).states:
            size = self.proj_size or self.hidden_size if letter == "h" else self.hidden_size
            state = weight.new_empty(rows, size)
            if self.initial_state == "learned":
                self.register_parameter(f"{letter}0", nn.Parameter(state))
            else:
                self.register_buffer(f"{letter}0", state)
        self._reset_initial_states()

    def _reset_initial_states(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for state in initial_states(self) or ():
            if self.initial_state == "learned":
                nn.init.zeros_(state)
            else:
                nn.init.uniform_(state, -bound, bound)

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name not in ("h0", "c0"):  # as torch.nn, by the same random numbers
                nn.init.uniform_(parameter, -bound, bound)
        self._reset_initial_states()

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """torch.nn's cache of the parameters, which this layer has no need of."""
        for name, weight in zip(self._flat_weights_names, weights, strict=False):
            if self._parameters.get(name, weight) is not weight:
                raise AttributeError(f"assign {name}, not _flat_weights: weights are read by name")

    def flatten_parameters(self) -> None:
        """Does nothing: the weights need not lie in one chunk."""

    def extra_repr(self) -> str:
        own = {"initial_state": "zeros", "forget_bias": None, "backend": None}
        given = {name: getattr(self, name, default) for name, default in own.items()}
        changed = [f", {n}={value!r}" for n, value in given.items() if value != own[n]]
        return super().extra_repr() + "".join(changed)


class LSTM(_Layers):
    """A stack of LSTM layers, a drop-in for :class:`torch.nn.LSTM`.

    Equations and papers: :mod:`fusedrnn.cells.lstm`.

    Args:
        input_size .. dtype: as torch.nn's.
        forget_bias: what ``reset_parameters`` sets the forget gate's ``bias_ih`` to (Gers et al.
            2000; Jozefowicz et al. 2015); None: as the other biases.
        initial_state: what hx is if none is given, and enters at resets: "zeros"; "learned",
            parameters ``h0 [L*D,P]`` and ``c0 [L*D,H]``, at first zero, whose gradients are summed
            over the batch; "random", buffers of these names, drawn once from U(-1/sqrt(H),
            1/sqrt(H)) and fixed through training.
        backend: the name of a backend or a list of names, tried in order.

    Args (forward):
        input: ``[T,B,I]``; ``[B,T,I]`` with batch_first; ``[T,I]`` unbatched; a PackedSequence.
        hx: ``(h_0 [L*D,B,P], c_0 [L*D,B,H])``, without B if unbatched; None: zeros.
        lengths: ``[B]`` int64 tensor or list of ints in [0, T]: steps ``t >= lengths[b]`` are not
            computed, y is 0 there, the final state is that of the row's own last step, and the
            reverse direction starts at the row's own end.
        resets: bool ``[T,B]`` (``[B,T]`` with batch_first, ``[T]`` unbatched): true where a new
            sequence begins; nothing passes between t-1 and t, in either direction. With an
            initial_state other than zeros only the backend "reference" runs it.
        return_cell_states: also return c of every step of the last layer.

    Returns:
        ``y [T,B,D*P]`` in the layout of input, ``(h_n, c_n)`` in the shapes of hx, and with
        return_cell_states ``c [T,B,D*H]`` in the layout of y.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn, and for lengths and resets of a wrong
            shape, dtype, device or value.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.LSTM(8, 16, num_layers=2)
        >>> y, (h_n, c_n) = layer(torch.randn(5, 3, 8), lengths=[5, 2, 0])
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """

    _forget_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        forget_bias: float | None = None,
        initial_state: str = "zeros",
        backend: Names = None,
    ) -> None:
        if forget_bias is not None:
            if not bias:
                raise ValueError(f"forget_bias={forget_bias} needs bias=True, got bias=False")
        self._forget_bias = finite("forget_bias", forget_bias)
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype, backend=backend, initial_state=initial_state,
        )  # fmt: skip

    @property
    def forget_bias(self) -> float | None:
        """What ``reset_parameters`` sets the forget gate's ``bias_ih`` to."""
        return self._forget_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, bias in self.named_parameters():
            if name.startswith("bias_ih"):
                fill_forget_gate(bias, self.forget_bias)

    # (h, c) in place of h: torch.nn.LSTM's own checks, with their messages.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        return run_module(self, input, hx, lengths, resets, return_cell_states)


def _reject(kind: str, unknown: dict[str, Any]) -> None:
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in unknown:
        raise TypeError(f"{kind}.__init__() got an unexpected keyword argument '{name}'")


class GRU(_Layers):
    """A stack of GRU layers, a drop-in for :class:`torch.nn.GRU`.

    Equations and paper: :mod:`fusedrnn.cells.gru`. Arguments as :class:`LSTM`, but the only state
    is h: hx is ``[L*D,B,H]``, and forward returns ``y [T,B,D*H]`` and ``h_n [L*D,B,H]``.

    Example:
        >>> import fusedrnn, torch
        >>> y, h_n = fusedrnn.GRU(8, 16, bidirectional=True)(torch.randn(5, 3, 8))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))
    """

    def __init__(
        self,
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
        initial_state: str = "zeros",
        backend: Names = None,
        **unknown: Any,
    ) -> None:
        _reject("GRU", unknown)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype, backend=backend, initial_state=initial_state,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
    ) -> Any:
        return run_module(self, input, hx, lengths, resets)


class RNN(_Layers):
    """A stack of Elman RNN layers, a drop-in for :class:`torch.nn.RNN`.

    Equations and paper: :mod:`fusedrnn.cells.rnn`. Arguments as :class:`LSTM`, but the only state
    is h: hx is ``[L*D,B,H]``, and forward returns ``y [T,B,D*H]`` and ``h_n [L*D,B,H]``.

    Example:
        >>> import fusedrnn, torch
        >>> y, h_n = fusedrnn.RNN(8, 16, bidirectional=True)(torch.randn(5, 3, 8))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        initial_state: str = "zeros",
        backend: Names = None,
        **unknown: Any,
    ) -> None:
        _reject("RNN", unknown)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, device=device, dtype=dtype, backend=backend,
            initial_state=initial_state,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
    ) -> Any:
        return run_module(self, input, hx, lengths, resets)
