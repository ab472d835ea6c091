"""Drop-in modules for torch.nn.LSTM, GRU and RNN; their cells are in cell_modules.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import arguments
from fusedrnn.arguments import truth
from fusedrnn.backends import Names
from fusedrnn.base import Layers, run_module
from fusedrnn.cell_modules import fill_forget_gate
from fusedrnn.cells import Cell, gru, lstm
from fusedrnn.regularisers import Zoneout
from fusedrnn.running import Lengths


class LSTM(Layers):
    """A stack of LSTM layers, a drop-in for :class:`torch.nn.LSTM`.

    Equations and papers: :mod:`fusedrnn.cells.lstm`.

    Args:
        input_size .. dtype: as torch.nn's.
        peephole: the gates see the cell state, by a weight a unit: parameters
            ``weight_peephole_l0 [3*H]``, those of i, f and o (Gers & Schmidhuber 2000).
        coupled_gates: there is no input gate, and ``1 - s(f)`` stands for it (Greff et al. 2017):
            weights and biases have 3*H rows, gates f g o, peepholes 2*H, those of f and o.
        layer_norm: ``W_ih x`` and ``W_hh h`` are normalised, each over all gates' units together,
            with gains ``norm_ih_l0`` and ``norm_hh_l0 [G*H]`` before the biases, and so is c on its
            way into h, with ``norm_c_l0`` and ``norm_c_bias_l0 [H]`` (Ba et al. 2016; eps 1e-5);
            on the backends "cpu" and "reference".
        forget_bias: what ``reset_parameters`` sets the forget gate's ``bias_ih`` to (Gers et al.
            2000; Jozefowicz et al. 2015); None: as the other biases.
        initial_state: what hx is if none is given, and enters at resets: "zeros"; "learned",
            parameters ``h0 [L*D,P]`` and ``c0 [L*D,H]``, at first zero, whose gradients are summed
            over the batch; "random", buffers of these names, drawn once from U(-1/sqrt(H),
            1/sqrt(H)) and fixed through training.
        weight_dropout: in training each number of ``weight_hh`` is zero with this probability, else
            divided by one minus it; one mask a call, layer and direction (DropConnect, Merity et
            al. 2018), from the default generator's seed.
        recurrent_dropout: in training each unit of h is zero with this probability, else divided
            by one minus it, where it enters the product with ``weight_hh``; one mask a call, layer,
            direction and row, the same at every step (Gal & Ghahramani 2016).
        zoneout: the probability with which in training, at each step, a unit keeps its old value,
            of h and c alike or two of them, ``(h, c)``; else the new ones become ``p * old + (1 -
            p) * new`` (Krueger et al. 2017).
        recompute: what backward makes anew, so that less is kept for it, to the same gradients.
            Beside the layer's input and masks, each step of a row in a layer and direction keeps
            ``e*(P + H + R*H)`` bytes with "none": h, c (of an LSTM alone) and R numbers a unit, the
            gates and of a GRU with reset_after one more; with a projection ``e*H`` more, and with
            layer_norm ``e*(2*G*H + H + 3)`` (of a GRU ``e*(2*G*H + 3)``). "gates" keeps h and c,
            ``e*(P + H)``, and makes the rest of all steps at once; "chunks" keeps them at every
            ceil(sqrt(T))-th step after the first, and runs the steps between again, in float32 for
            16 bits. e is the size of a number: 4 for 16 bits in "chunks", of c, and on a CPU, there
            but for bfloat16 on AMX tiles. The backend "reference" keeps what autograd does.
        backend: the name of a backend or a list of names, tried in order.

    Args (forward):
        input: ``[T,B,I]``; ``[B,T,I]`` with batch_first; ``[T,I]`` unbatched; a PackedSequence.
        hx: ``(h_0 [L*D,B,P], c_0 [L*D,B,H])``, without B if unbatched; None: zeros.
        lengths: ``[B]`` int64 tensor or list of ints in [0, T]: steps ``t >= lengths[b]`` are not
            computed, y is 0 there, the final state is that of the row's own last step, and the
            reverse direction starts at the row's own end.
        resets: bool ``[T,B]`` (``[B,T]`` with batch_first, ``[T]`` unbatched): true where a new
            sequence begins, with the initial_state; nothing passes between t-1 and t, in either
            direction. The backend "cuda" takes resets with initial_state="zeros" only.
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

    peephole = False
    coupled_gates = False
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
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        forget_bias: float | None = None,
        initial_state: str = "zeros",
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        recompute: str = "none",
        backend: Names = None,
    ) -> None:
        self._forget_bias = arguments.forget_bias(forget_bias, bias)
        if truth("peephole", peephole):  # else the class's
            self.peephole = True
        if truth("coupled_gates", coupled_gates):
            self.coupled_gates = True
        super().__init__(
            "GRU" if coupled_gates else "LSTM",  # whose weights have rows for as many gates
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, backend=backend, initial_state=initial_state,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout, recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            recompute=recompute,
        )  # fmt: skip
        self.mode = "LSTM"

    @property
    def _cell(self) -> Cell:
        return lstm(peephole=self.peephole, coupled_gates=self.coupled_gates)

    @property
    def forget_bias(self) -> float | None:
        """What ``reset_parameters`` sets the forget gate's ``bias_ih`` to."""
        return self._forget_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, bias in self.named_parameters():
            if name.startswith("bias_ih"):
                fill_forget_gate(self._cell, bias, self.forget_bias)

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


class GRU(Layers):
    """A stack of GRU layers, a drop-in for :class:`torch.nn.GRU`.

    Equations and paper: :mod:`fusedrnn.cells.gru`. Arguments as :class:`LSTM`, but for those of its
    gates (peephole, coupled_gates, forget_bias); with layer_norm there is no ``norm_c``. The only
    state is h: hx is ``[L*D,B,H]``, and forward returns ``y [T,B,D*H]`` and ``h_n [L*D,B,H]``.

    Args:
        reset_after: the reset gate acts on the product ``W_hn h + b_hn``, as in torch.nn; else on
            the h that enters it, as in Cho et al. (2014). Then there is no layer_norm.

    Example:
        >>> import fusedrnn, torch
        >>> y, h_n = fusedrnn.GRU(8, 16, bidirectional=True)(torch.randn(5, 3, 8))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))
    """

    reset_after = True

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
        reset_after: bool = True,
        layer_norm: bool = False,
        initial_state: str = "zeros",
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        recompute: str = "none",
        backend: Names = None,
        **unknown: Any,
    ) -> None:
        _reject("GRU", unknown)
        if not arguments.reset_after(reset_after, layer_norm):  # else the class's
            self.reset_after = False
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype, backend=backend, initial_state=initial_state,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout, recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            recompute=recompute,
        )  # fmt: skip

    @property
    def _cell(self) -> Cell:
        return gru(reset_after=self.reset_after)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
    ) -> Any:
        return run_module(self, input, hx, lengths, resets)


class RNN(Layers):
    """A stack of Elman RNN layers, a drop-in for :class:`torch.nn.RNN`.

    Equations and paper: :mod:`fusedrnn.cells.rnn`. Arguments as :class:`LSTM`, but for those of its
    gates (peephole, coupled_gates, forget_bias) and layer_norm. The only state is h: hx is
    ``[L*D,B,H]``, and forward returns ``y [T,B,D*H]`` and ``h_n [L*D,B,H]``.

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
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        recompute: str = "none",
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
            weight_dropout=weight_dropout, recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            recompute=recompute,
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
