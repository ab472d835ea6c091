"""Elman RNN (Elman 1990): ``h = act(gx + gh)``, act = tanh or relu."""

from __future__ import annotations

from torch import Tensor

from fusedrnn.cells.cell import Cell, Keep, keep


def step_tanh(
    gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], keep: Keep = keep
) -> tuple[Tensor, ...]:
    return keep((gx + gh).squeeze(-2).tanh())


def step_relu(
    gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], keep: Keep = keep
) -> tuple[Tensor, ...]:
    return keep((gx + gh).squeeze(-2).relu())


RNN_TANH = Cell(
    "rnn_tanh",
    gates="h",
    states="h",
    saved=1,
    additive=True,
    step=step_tanh,
    triton="fusedrnn.backends.triton.cells.rnn_tanh",
)
RNN_RELU = Cell(
    "rnn_relu",
    gates="h",
    states="h",
    saved=1,
    additive=True,
    step=step_relu,
    triton="fusedrnn.backends.triton.cells.rnn_relu",
)
