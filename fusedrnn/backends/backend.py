"""The narrow waist: what a backend is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fusedrnn.cells import Cell


class Request(NamedTuple):
    """What a backend must be able to run. T and B are not in it, so that a choice made while
    tracing holds for every sequence length and batch size; ``empty`` is false while tracing."""

    cell: Cell
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    proj_size: int  # 0: none
    lengths: bool = False
    resets: bool = False
    reset_states: bool = False  # other states than zeros enter at resets
    cell_states: bool = False
    empty: bool = False  # x has no elements
    cell_update: bool = False  # the cell alone is asked for, see reference.cell_update
    recurrent_dropout: bool = False
    zoneout: bool = False
    layer_norm: bool = False
    recompute: str = "none"  # see fusedrnn.recompute, also for what "gates" ask of a reserve
    bidirectional: bool = False


class Weights(NamedTuple):
    """The weights of one layer and direction, in torch.nn's shapes; P is proj_size or H."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None = None  # [P, H]
    params: Tensor | None = None  # [K, H] those of the cell
    # Layer norm (Ba et al. 2016): gains of W_ih x and of W_hh h, and a gain and a bias of the
    # second state on its way into h; none where nothing is normalised.
    norm_ih: Tensor | None = None  # [G*H]
    norm_hh: Tensor | None = None  # [G*H]
    norm_c: Tensor | None = None  # [H]
    norm_c_bias: Tensor | None = None  # [H]

    @property
    def norms(self) -> tuple[Tensor | None, ...]:
        return self[6:]


class Sequence(NamedTuple):
    """Where the rows of a batch end and begin anew; ``None``: nowhere."""

    lengths: Tensor | None = None  # [B] int64: steps t >= lengths[b] are not computed
    resets: Tensor | None = None  # [T, B] bool: a new sequence begins at t, where t < lengths[b]
    h_reset: Tensor | None = None  # [P], the h that enters it; None: zeros
    c_reset: Tensor | None = None  # [S-1,H], the other states that do

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        return self.lengths, self.resets

    @property
    def states(self) -> tuple[Tensor | None, Tensor | None]:
        return self.h_reset, self.c_reset

    def with_states(self, h: Tensor | None, c: Tensor | None) -> Sequence:
        return self._replace(h_reset=h, c_reset=c)

    def without_padding(self, x: Tensor) -> Tensor:
        """``x [T,B,I]`` with zeros where no step is computed, which may hold NaN."""
        if self.lengths is None:
            return x
        steps = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
        return x.masked_fill((steps >= self.lengths).unsqueeze(-1), 0)


class Noise(NamedTuple):
    """What regularises a recurrence from within; as it stands here: nothing."""

    # [B,P] in the dtype of computation: what h is multiplied by on its way into W_hh (Gal &
    # Ghahramani 2016).
    dropout: Tensor | None = None
    # Zoneout (Krueger et al. 2017): [T,B,P] and [T,B,H] uint8, 0 where h and c keep the values they
    # had before the step; or, without, the new values' shares.
    renew_h: Tensor | None = None
    renew_c: Tensor | None = None
    rate_h: float = 1.0
    rate_c: float = 1.0

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.dropout, self.renew_h, self.renew_c

    @property
    def rates(self) -> tuple[float, float]:
        return self.rate_h, self.rate_c

    def of_rows(self, times: slice, steps: int) -> Noise:
        """Of some times, of which there are ``steps``, as rows of a single step."""

        def rows(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[times].flatten(0, 1).unsqueeze(0)

        dropout = None if self.dropout is None else self.dropout.repeat(steps, 1)
        return Noise(dropout, rows(self.renew_h), rows(self.renew_c), *self.rates)

    @property
    def zoneout(self) -> bool:
        return self.renew_h is not None or self.renew_c is not None or self.rates != (1.0, 1.0)


class Call(NamedTuple):
    """One layer and direction over a sequence; S is the number of the cell's states."""

    cell: Cell
    x: Tensor  # [T,B,I]
    weights: Weights
    h0: Tensor  # [B,P]
    c0: Tensor | None  # [S-1,B,H], None if h is the only state
    seq: Sequence
    reverse: bool
    cell_states: bool  # whether the cell state of every step is asked for
    noise: Noise = Noise()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What has gradients, in the order of :class:`Gradients`."""
        return (self.x, *self.weights, self.h0, self.c0, *self.seq.states)

    def on(self, tensors: Iterable[Tensor | None]) -> Call:
        """The same of other tensors, in that order."""
        x, *weights, h0, c0, h_reset, c_reset = tensors
        assert x is not None and h0 is not None
        of_layer = Weights(*weights)  # type: ignore[arg-type]
        seq = self.seq.with_states(h_reset, c_reset)
        return self._replace(x=x, weights=of_layer, h0=h0, c0=c0, seq=seq)

    def to(self, dtype: torch.dtype) -> Call:
        return self.on(None if t is None else t.to(dtype) for t in self.tensors)


class Run(NamedTuple):
    """What a call gives."""

    y: Tensor  # [T,B,P]
    h_n: Tensor  # [B,P]
    c_n: Tensor  # [S-1,B,H] the states beside h, at each row's last step
    c: Tensor  # [T,B,H] the cell state of every step, if asked for, else [0]
    reserve: tuple[Tensor, ...]  # what the same backend's backward reads, in training


class Upstream(NamedTuple):
    """The gradients of a run's outputs; ``None``: zero."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    c: Tensor | None


class Gradients(NamedTuple):
    """The gradients of a run's inputs; ``None``: not wanted, or no such input."""

    x: Tensor | None
    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    params: Tensor | None
    norm_ih: Tensor | None
    norm_hh: Tensor | None
    norm_c: Tensor | None
    norm_c_bias: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    h_reset: Tensor | None
    c_reset: Tensor | None


class Wanted(NamedTuple):
    """Which of the gradients are wanted; others may be given all the same."""

    x: bool
    w_ih: bool
    w_hh: bool
    b_ih: bool
    b_hh: bool
    w_hr: bool
    params: bool
    norm_ih: bool
    norm_hh: bool
    norm_c: bool
    norm_c_bias: bool
    h0: bool
    c0: bool
    h_reset: bool
    c_reset: bool


class Backend(Protocol):
    """A fused implementation of the recurrence, forward and BPTT backward."""

    name: str
    reads_padding: bool  # x must be finite where no step is computed
    runs_both: bool  # has BothDirections beside

    def supports(self, request: Request) -> str | None:
        """None if this backend can run it, else the reason, quoted as it stands to users."""

    def algorithm(self, request: Request, rows: int) -> str:
        """What runs a supported request over a batch of ``rows``, for people."""

    def runs_stack(self, request: Request) -> bool:
        """Whether it has ``forward_stack`` for a supported request."""

    def forward(self, call: Call, training: bool) -> Run:
        """``training``: backward will be asked for."""

    def backward(
        self, call: Call, upstream: Upstream, reserve: tuple[Tensor, ...], wanted: Wanted
    ) -> Gradients:
        """``reserve`` is that of the call's run, which stays as it is for another backward."""


class Stacks(Protocol):
    """What a backend has beside, if it runs all layers of one direction at once, without training
    and with nothing between them."""

    def forward_stack(
        self, cell: Cell, x: Tensor, weights: list[Weights], hx: tuple[Tensor, ...], seq: Sequence
    ) -> tuple[Tensor, ...]:
        """``y [T,B,P]``, then the final states in the shapes of hx ``[L,B,*]``."""


class BothDirections(Protocol):
    """What a backend has beside, if it can run both directions of a layer at once: calls on the
    same x, without projection, of which the second one is the reverse."""

    def forward_both(self, calls: list[Call], training: bool) -> list[Run]:
        """As ``forward`` of each."""

    def backward_both(
        self,
        calls: list[Call],
        upstreams: list[Upstream],
        reserves: list[tuple[Tensor, ...]],
        wanted: list[Wanted],
    ) -> list[Gradients]:
        """As ``backward`` of each."""


def forward_of(backend: Backend, calls: list[Call], training: bool) -> list[Run]:
    """Of one direction of a layer, or of both."""
    if len(calls) == 1:
        return [backend.forward(calls[0], training)]
    return cast(BothDirections, backend).forward_both(calls, training)


def backward_of(
    backend: Backend,
    calls: list[Call],
    upstreams: list[Upstream],
    reserves: list[tuple[Tensor, ...]],
    wanted: list[Wanted],
) -> list[Gradients]:
    """As :func:`forward_of`."""
    if len(calls) == 1:
        return [backend.backward(calls[0], upstreams[0], reserves[0], wanted[0])]
    return cast(BothDirections, backend).backward_both(calls, upstreams, reserves, wanted)


class CellUpdates(Protocol):
    """What a backend has beside, if it supports requests for ``cell_update``."""

    def cell_update(
        self, cell: Cell, gates: Tensor, c: Tensor, params: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As ``reference.cell_update``."""

    def cell_update_backward(
        self,
        cell: Cell,
        gates: Tensor,
        c: Tensor,
        params: Tensor | None,
        dh: Tensor | None,
        dc: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of gates, c and params from those of the new states; ``None``: zero."""
