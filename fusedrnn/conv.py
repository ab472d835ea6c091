"""The convolutional LSTM: its products are PyTorch's convolutions, its cell update is fused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedrnn import arguments, functional
from fusedrnn.arguments import changed, probability, size, truth
from fusedrnn.backends import Names, check_names
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.cell_modules import fill_forget_gate
from fusedrnn.cells import Cell, lstm

State = tuple[Tensor, Tensor]


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[B,C,Y,X]`` as ``[B*Y*X,C]``."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class ConvLSTM(nn.Module):
    """A stack of convolutional LSTM layers (Shi et al. 2015).

    The equations of :mod:`fusedrnn.cells.lstm`, where both products are convolutions with as much
    padding as keeps the size, and peepholes are weights of a channel. With batch norm (Cooijmans et
    al. 2017) ``gates = BN(W_ih * x) + BN(W_hh * h) + b_ih + b_hh``; both are shared over time, and
    in training take the statistics of each step.

    Parameters, with C the hidden channels: ``weight_ih_l0 [4*C,in,*kernel]``, ``weight_hh_l0
    [4*C,C,*kernel]``, ``bias_ih_l0``, ``bias_hh_l0 [4*C]``, gates i f g o, and ``weight_peephole_l0
    [3,C,1,1]``, those of i, f and o, all from U(-1/sqrt(n), 1/sqrt(n)), n the numbers in a kernel
    of ``weight_hh``; ``norm_ih_l0``, ``norm_hh_l0``: BatchNorm2d, gains 0.1. Those of the reverse
    direction end with ``_reverse``.

    Args:
        input_channels, hidden_channels: of x and of h.
        kernel_size: an odd number, or two, along Y and X.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as of
            :class:`torch.nn.LSTM`.
        peephole, forget_bias: as of :class:`fusedrnn.LSTM`.
        batch_norm: both products are normalised.
        backend: of the cell update, a name or a list of names, tried in order.

    Args (forward):
        input: ``[T,B,in,Y,X]``; ``[B,T,in,Y,X]`` with batch_first.
        hx: ``(h_0, c_0)``, ``[L*D,B,C,Y,X]``; None: zeros.

    Returns:
        ``y [T,B,D*C,Y,X]`` in the layout of input and ``(h_n, c_n)`` in the shapes of hx.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong size, shape, dtype, device or backend.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.ConvLSTM(3, 8, kernel_size=3, num_layers=2)
        >>> y, (h_n, c_n) = layer(torch.randn(5, 2, 3, 16, 16))
        >>> y.shape, c_n.shape
        (torch.Size([5, 2, 8, 16, 16]), torch.Size([2, 2, 8, 16, 16]))
    """

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        kernel_size: int | tuple[int, int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        batch_norm: bool = False,
        forget_bias: float | None = None,
        backend: Names = None,
    ) -> None:
        super().__init__()
        sizes = {
            "input_channels": input_channels,
            "hidden_channels": hidden_channels,
            "num_layers": num_layers,
        }
        for name, value in sizes.items():
            size(name, value)
        kernel = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size,) * 2
        if len(kernel) != 2 or not all(size("kernel_size", k) % 2 for k in kernel):
            raise ValueError(f"kernel_size should be odd, or two odd numbers, got {kernel_size!r}")
        self.input_channels, self.hidden_channels = input_channels, hidden_channels
        self.kernel_size, self.num_layers = tuple(kernel), num_layers
        self.bias, self.batch_first = truth("bias", bias), truth("batch_first", batch_first)
        self.dropout = probability("dropout", dropout)
        self.bidirectional = truth("bidirectional", bidirectional)
        self.peephole, self.batch_norm = (
            truth("peephole", peephole),
            truth("batch_norm", batch_norm),
        )
        self.forget_bias = arguments.forget_bias(forget_bias, bias)
        check_names(backend)
        self.backend = backend

        options = {"device": device, "dtype": dtype}
        channels, gates = hidden_channels, len(self._cell.gates) * hidden_channels
        for layer, suffix in self._places():
            inputs = channels * (2 if bidirectional else 1) if layer else input_channels
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (gates, inputs, *kernel),
                "weight_hh": (gates, channels, *kernel),
                **({"bias_ih": (gates,), "bias_hh": (gates,)} if bias else {}),
                **({"weight_peephole": (3, channels, 1, 1)} if peephole else {}),
            }
            for name, shape in shapes.items():
                empty = torch.empty(shape, **options)
                self.register_parameter(name + suffix, nn.Parameter(empty))
            if batch_norm:
                self.register_module("norm_ih" + suffix, nn.BatchNorm2d(gates, **options))
                self.register_module("norm_hh" + suffix, nn.BatchNorm2d(gates, **options))
        self.reset_parameters()

    @property
    def _cell(self) -> Cell:
        return lstm(peephole=self.peephole, coupled_gates=False)

    def _places(self) -> list[tuple[int, str]]:
        """Each layer and direction, and what the names of its parameters end with."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(k, f"_l{k}{end}") for k in range(self.num_layers) for end in directions]

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_channels * math.prod(self.kernel_size))
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
            if name.startswith("bias_ih"):
                fill_forget_gate(self._cell, parameter, self.forget_bias)
        for norm in self.children():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.reset_parameters()
                nn.init.constant_(norm.weight, 0.1)

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        self._check(input, hx)
        if hx is not None:
            hx = self._as_input(input, hx)
        y = input.transpose(0, 1) if self.batch_first else input
        directions = 2 if self.bidirectional else 1
        final: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                y = F.dropout(y, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                state = None if hx is None else (hx[0][k], hx[1][k])
                out, *states = self._direction(y, self._places()[k][1], state, direction == 1)
                outputs.append(out)
                final.append((states[0], states[1]))
            y = outputs[0] if directions == 1 else torch.cat(outputs, 2)
        y = y.transpose(0, 1) if self.batch_first else y
        h_n, c_n = torch.stack([h for h, _ in final]), torch.stack([c for _, c in final])
        return y.contiguous(), (h_n.contiguous(), c_n.contiguous())

    def _direction(
        self, x: Tensor, suffix: str, state: State | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y ``[T,B,C,Y,X]`` and the final states of one layer and direction.

        Channels lie last in memory, where convolutions are faster, and where to the cell each
        position is a row of a batch.
        """
        products = self._products(suffix)
        steps = _channels_last(x.flatten(0, 1)).unflatten(0, x.shape[:2]).unbind(0)
        batch, _, *space = steps[0].shape
        shape = batch, self.hidden_channels, *space
        h, c = (x.new_zeros(shape),) * 2 if state is None else state
        h, c = _channels_last(h), _rows(c)
        c = c.to(compute_dtype(c.dtype))  # in which it loses nothing from step to step
        peepholes = getattr(self, "weight_peephole" + suffix).flatten(1) if self.peephole else None
        out = list(steps)
        for t in range(len(steps) - 1, -1, -1) if reverse else range(len(steps)):
            gates = _rows(products(steps[t], h))
            if peepholes is not None:
                peepholes = peepholes.to(gates.dtype)
            rows, c = functional.update(self._cell, gates, c, peepholes, check_names(self.backend))
            out[t] = rows.view(batch, *space, self.hidden_channels)
            h = out[t].permute(0, 3, 1, 2)
        c = c.to(h.dtype).view(batch, *space, self.hidden_channels).permute(0, 3, 1, 2)
        return torch.stack(out).permute(0, 1, 4, 2, 3), h, c

    def _products(self, suffix: str) -> Callable[[Tensor, Tensor], Tensor]:
        """What the gates of one step get from x and h, ``[B,4*C,Y,X]``."""
        padding = self.kernel_size[0] // 2, self.kernel_size[1] // 2
        names = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm_ih", "norm_hh"
        own: list[Any] = [getattr(self, name + suffix, None) for name in names]
        w_ih, w_hh, b_ih, b_hh, norm_ih, norm_hh = own
        bias = None if b_ih is None else b_ih + b_hh
        if not self.batch_norm:  # one convolution costs less than two
            weight = _channels_last(torch.cat((w_ih, w_hh), 1))
            return lambda x, h: F.conv2d(torch.cat((x, h), 1), weight, bias, padding=padding)
        w_ih, w_hh = _channels_last(w_ih), _channels_last(w_hh)

        def normalised(x: Tensor, h: Tensor) -> Tensor:
            gates: Tensor = norm_ih(F.conv2d(x, w_ih, padding=padding))
            gates = gates + norm_hh(F.conv2d(h, w_hh, padding=padding))
            return gates if bias is None else gates + bias.to(gates.dtype).view(-1, 1, 1)

        return normalised

    def _as_input(self, input: Tensor, hx: State) -> State:
        """The states, which autocast takes in every dtype it casts, in the dtype of input."""
        device = input.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        for name, s in zip(("h_0", "c_0"), hx, strict=True):
            if s.dtype != input.dtype and not (
                cast and torch.float64 not in (s.dtype, input.dtype)
            ):
                raise RuntimeError(f"{name} should be {input.dtype} as input is, got {s.dtype}")
        return hx[0].to(input.dtype), hx[1].to(input.dtype)

    def _check(self, input: Tensor, hx: State | None) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input should be a tensor, got {type(input).__name__}")
        if input.dim() != 5 or input.shape[2] != self.input_channels:
            layout = "[B,T" if self.batch_first else "[T,B"
            raise ValueError(
                f"input should have shape {layout},{self.input_channels},Y,X], got "
                f"{list(input.shape)}"
            )
        if input.shape[self.batch_first] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in ConvLSTM")
        if hx is None:
            return
        given = isinstance(hx, tuple | list) and all(isinstance(s, Tensor) for s in hx)
        if not given or len(hx) != 2:
            raise TypeError(f"hx should be a tuple of two tensors, got {type(hx).__name__}")
        batch = input.shape[not self.batch_first]
        shape = (len(self._places()), batch, self.hidden_channels, *input.shape[3:])
        for name, s in zip(("h_0", "c_0"), hx, strict=True):
            if s.shape != shape:
                raise ValueError(f"{name} should have shape {list(shape)}, got {list(s.shape)}")

    def extra_repr(self) -> str:
        shown = f"{self.input_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False, "peephole": False, "batch_norm": False, "forget_bias": None,
            "backend": None,
        }  # fmt: skip
        return shown + changed(self, defaults)
