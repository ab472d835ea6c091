"""What the drop-in layers share: torch.nn's checks, packed and unbatched input, initial states."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import running
from fusedrnn.arguments import changed, truth
from fusedrnn.backends import Names, Sequence, Weights, check_names
from fusedrnn.cells import PLAIN, Cell
from fusedrnn.layer import Stack, beside_h
from fusedrnn.recompute import check_recompute
from fusedrnn.regularisers import NO_RATES, Rates, Zoneout
from fusedrnn.running import Lengths

State = Tensor | tuple[Tensor, ...]


def cell_of(module: nn.RNNBase) -> Cell:
    return module._cell if isinstance(module, Layers) else PLAIN[module.mode.lower()]


def initial_states(module: nn.RNNBase) -> tuple[Tensor, ...] | None:
    """The module's own initial states ``[L*D,P]`` and ``[L*D,H]``; None: zeros."""
    if not isinstance(module, Layers) or module.initial_state == "zeros":
        return None
    return tuple(getattr(module, f"{letter}0") for letter in cell_of(module).states)


def wish_of(module: nn.RNNBase) -> tuple[str, ...]:
    """The backends that the module asks for; torch.nn's own asks for none."""
    return check_names(module.backend) if isinstance(module, Layers) else ()


def rates_of(module: nn.RNNBase) -> Rates:
    """Of the module's regularisers; torch.nn's own has none."""
    if not isinstance(module, Layers):
        return NO_RATES
    rates = Rates(module.weight_dropout, module.recurrent_dropout, module.zoneout)
    return rates if rates == NO_RATES else Rates.checked(len(cell_of(module).states), *rates)


def recompute_of(module: nn.RNNBase) -> str:
    """What backward recomputes; of torch.nn's own layers nothing."""
    return check_recompute(module.recompute) if isinstance(module, Layers) else "none"


def of_name(module: nn.Module, name: str, *default: Any) -> Any:
    """An attribute, which is a parameter unless a parametrisation has taken its place."""
    parameters = module._parameters  # to look in it first is four times as fast
    return parameters[name] if name in parameters else getattr(module, name, *default)


def weights_of(module: nn.RNNBase) -> list[Weights]:
    """The parameters as they are now: read by name at each call, never cached."""
    names = module._flat_weights_names
    if isinstance(module, Layers):
        names = names + module._params_names() + module._norm_names()
    params = [of_name(module, name) for name in names]
    return running.group(
        cell_of(module), params, module.bias, module.proj_size > 0,
        isinstance(module, Layers) and module.layer_norm,
    )  # fmt: skip


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
    seq = running.sequence(x, lengths, resets, module.batch_first)
    between = running.between_layers(module.dropout, module.training)
    stack = _run(module, x, hx, seq, between, return_cell_states)
    if module.batch_first:
        stack = running.to_batch_first(stack)
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

    def dropped(y: Tensor) -> Tensor:  # on the packed rows, so that the mask is torch.nn's
        return pad(F.dropout(pack(y), module.dropout))[0]

    seq = Sequence(lengths.to(x.device), None)
    between = dropped if module.dropout and module.training else None
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
        if seq.resets is not None:
            seq = seq.with_states(initial[0], beside_h(initial))
        hx = tuple(s.unsqueeze(1).expand(-1, x.shape[1], -1) for s in initial) if hx is None else hx
    return running.run(
        cell_of(module),
        x,
        hx,
        weights_of(module),
        2 if module.bidirectional else 1,
        seq,
        between,
        cell_states,
        wish_of(module),
        rates_of(module),
        module.training,
        recompute_of(module),
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


class Layers(nn.RNNBase):
    """What the three layers share. A layer is an nn.RNNBase, with its parameters, initialisation,
    state_dict and checks, but not an nn.LSTM: torch.compile breaks the graph on those."""

    backend: Names = None
    layer_norm = False
    weight_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: Zoneout = 0.0
    recompute: str = "none"
    _initial_state: str = "zeros"

    def __init__(
        self,
        mode: str,
        *args: Any,
        backend: Names,
        initial_state: str,
        layer_norm: bool = False,
        weight_dropout: float,
        recurrent_dropout: float,
        zoneout: Zoneout,
        recompute: str,
        **kwargs: Any,
    ) -> None:
        check_names(backend)
        if initial_state not in INITIAL_STATES:
            raise ValueError(
                f"initial_state should be one of {INITIAL_STATES}, got {initial_state!r}"
            )
        super().__init__(mode, *args, **kwargs)
        rates = Rates.checked(len(self._cell.states), weight_dropout, recurrent_dropout, zoneout)
        given: dict[str, Any] = {"backend": backend} if backend is not None else {}
        given |= {"layer_norm": True} if truth("layer_norm", layer_norm) else {}
        given |= {name: rate for name, rate in rates._asdict().items() if rate}
        given |= {"recompute": recompute} if check_recompute(recompute) != "none" else {}
        for name, value in given.items():  # else the class's
            setattr(self, name, value)
        self._register_params()
        if initial_state != "zeros":  # else the class's: what is as torch.nn's has no more than it
            self._initial_state = initial_state
            self._register_initial_states()

    @property
    def initial_state(self) -> str:
        """Of the states that enter where no hx is given."""
        return self._initial_state

    @property
    def _cell(self) -> Cell:
        """The cell of every layer."""
        return PLAIN[self.mode.lower()]

    def _params_names(self) -> list[str]:
        """Of the cell's params ``[K*H]``, by layer and direction."""
        if not self._cell.params:
            return []
        names = [names[0] for names in self._all_weights]
        return [name.replace("weight_ih", "weight_peephole") for name in names]

    def _register_params(self) -> None:
        weight: Any = self.weight_ih_l0
        bound = 1 / math.sqrt(self.hidden_size)
        for name in self._params_names():
            params = weight.new_empty(len(self._cell.params) * self.hidden_size)
            self.register_parameter(name, nn.Parameter(params.uniform_(-bound, bound)))
        for name in self._norm_names():
            norm = running.new_norm(self._cell, name, self.hidden_size, weight)
            self.register_parameter(name, norm)

    def _norm_names(self) -> list[str]:
        """Of the norms' gains and biases, by layer and direction."""
        if not self.layer_norm:
            return []
        ends = [names[0].removeprefix("weight_ih") for names in self._all_weights]
        return [name + end for end in ends for name in running.norm_names(self._cell)]

    def _reset_norms(self) -> None:
        for name in self._norm_names():
            running.fill_norm(name, getattr(self, name))

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
            if name not in ("h0", "c0", *self._norm_names()):  # as torch.nn, by the same numbers
                nn.init.uniform_(parameter, -bound, bound)
        self._reset_norms()
        self._reset_initial_states()

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [of_name(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """torch.nn's cache of the parameters, which this layer has no need of."""
        for name, weight in zip(self._flat_weights_names, weights, strict=False):
            if self._parameters.get(name, weight) is not weight:
                raise AttributeError(f"assign {name}, not _flat_weights: weights are read by name")

    def flatten_parameters(self) -> None:
        """Does nothing: the weights need not lie in one chunk."""

    def extra_repr(self) -> str:
        own = {
            "peephole": False, "coupled_gates": False, "reset_after": True, "layer_norm": False,
            "forget_bias": None,
            "initial_state": "zeros", **NO_RATES._asdict(), "recompute": "none",
            "backend": None,
        }  # fmt: skip
        return super().extra_repr() + changed(self, own)
