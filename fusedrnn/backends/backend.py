"""The narrow waist: what a backend is asked, and what it answers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fusedrnn.cells import Cell


class Request(NamedTuple):
    """What a backend must be able to run. T and B are not in it, so that a choice made while
    tracing holds for every sequence length and batch size."""

    cell: Cell
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    proj_size: int  # 0: none


class Weights(NamedTuple):
    """The weights of one layer and direction, in torch.nn's shapes; P is proj_size or H."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]


class Sequence(NamedTuple):
    """Where the rows of a batch end and begin anew; ``None``: nowhere."""

    lengths: Tensor | None = None  # [B] int64: steps t >= lengths[b] are not computed
    resets: Tensor | None = None  # [T, B] bool: a new sequence begins at t, where t < lengths[b]


class Run(NamedTuple):
    """One layer and direction over a sequence. What only backward reads is ``[0]`` in inference."""

    y: Tensor  # [T,B,P]
    h_n: Tensor  # [B,P]
    c_n: Tensor  # [S-1,B,H] the states beside h, at each row's last step
    c: Tensor  # [T,B,H] the cell state of every step, if asked for, else [0]
    h_prev: Tensor  # [T,B,P] the h that entered each step (0 where none was computed)
    m: Tensor  # [T,B,H] the output before projection, else [0]
    reserve: tuple[Tensor, ...]  # the backend's own


class Grads(NamedTuple):
    dgx: Tensor  # [T,B,G*H]
    dgh: Tensor  # [T,B,G*H], the same tensor as dgx for an additive cell
    dh0: Tensor  # [B,P]
    dc0: Tensor  # [S-1,B,H]
    dh: Tensor  # [T,B,P] the whole gradient of each h, with a projection, else [0]


class Backend(Protocol):
    """A fused implementation of the recurrence, forward and BPTT backward."""

    name: str
    algorithm: str

    def supports(self, request: Request) -> str | None:
        """None if this backend can run it, else the reason, quoted as it stands to users."""

    def forward(
        self,
        cell: Cell,
        x: Tensor,  # [T,B,I]
        weights: Weights,
        h0: Tensor,  # [B,P]
        c0: Tensor | None,  # [S-1,B,H], None if h is the only state
        seq: Sequence,
        reverse: bool,
        training: bool,
        cell_states: bool,
    ) -> Run: ...

    def backward(
        self,
        cell: Cell,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dc: Tensor | None,
        weights: Weights,
        seq: Sequence,
        reverse: bool,
        run: Run,  # y, h_n, c_n and c are not read, and may be empty
    ) -> Grads: ...

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a b`` of matrices, in the precision of the backend's other products."""
