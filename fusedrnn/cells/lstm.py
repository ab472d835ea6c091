"""LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), gates i f g o.

``i f g o = gx + gh``; ``c = s(f) * c_prev + s(i) * tanh(g)``; ``h = s(o) * tanh(c)``, where s is
the sigmoid. With a projection (Sak et al. 2014) the driver makes ``h = W_hr (s(o) * tanh(c))``.

With peepholes (Gers & Schmidhuber 2000) ``i += p_i * c_prev``, ``f += p_f * c_prev``,
``o += p_o * c``, before the sigmoids. With coupled gates (Greff et al. 2017) there is no gate i,
and ``c = s(f) * c_prev + (1 - s(f)) * tanh(g)``.

With layer norm (Ba et al. 2016) ``gx = LN(W_ih x) + b_ih``, ``gh = LN(W_hh h) + b_hh``, each over
all gates' units together, and ``h = s(o) * tanh(LN(c))``; the c that goes on is not normalised.
"""

from __future__ import annotations

from torch import Tensor

from fusedrnn.cells.cell import Cell, Keep, Norm, keep, no_norm

States = tuple[Tensor, ...]


def step(gx: Tensor, gh: Tensor, state: States, keep: Keep = keep, norm: Norm = no_norm) -> States:
    i, f, g, o = (gx + gh).unbind(-2)
    i, f, g, o = keep(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid())
    c = f * state[1] + i * g
    return o * norm(c).tanh(), c


def step_peephole(
    gx: Tensor,
    gh: Tensor,
    state: States,
    params: States,
    keep: Keep = keep,
    norm: Norm = no_norm,
) -> States:
    p_i, p_f, p_o = params
    i, f, g, o = (gx + gh).unbind(-2)
    i, f = i + p_i * state[1], f + p_f * state[1]
    i, f, g = keep(i.sigmoid(), f.sigmoid(), g.tanh())
    c = f * state[1] + i * g
    (o,) = keep((o + p_o * c).sigmoid())
    return o * norm(c).tanh(), c


def step_coupled(
    gx: Tensor, gh: Tensor, state: States, keep: Keep = keep, norm: Norm = no_norm
) -> States:
    f, g, o = (gx + gh).unbind(-2)
    f, g, o = keep(f.sigmoid(), g.tanh(), o.sigmoid())
    c = f * state[1] + (1 - f) * g
    return o * norm(c).tanh(), c


def step_coupled_peephole(
    gx: Tensor,
    gh: Tensor,
    state: States,
    params: States,
    keep: Keep = keep,
    norm: Norm = no_norm,
) -> States:
    p_f, p_o = params
    f, g, o = (gx + gh).unbind(-2)
    f, g = keep((f + p_f * state[1]).sigmoid(), g.tanh())
    c = f * state[1] + (1 - f) * g
    (o,) = keep((o + p_o * c).sigmoid())
    return o * norm(c).tanh(), c


LSTM = Cell(
    "lstm",
    gates="ifgo",
    states="hc",
    step=step,
    triton="fusedrnn.backends.triton.cells.lstm",
)
LSTM_PEEPHOLE = Cell(
    "lstm_peephole",
    gates="ifgo",
    states="hc",
    step=step_peephole,
    params=("p_i", "p_f", "p_o"),
    triton="fusedrnn.backends.triton.cells.lstm_peephole",
)
LSTM_COUPLED = Cell(
    "lstm_coupled",
    gates="fgo",
    states="hc",
    step=step_coupled,
    triton="fusedrnn.backends.triton.cells.lstm_coupled",
)
LSTM_COUPLED_PEEPHOLE = Cell(
    "lstm_coupled_peephole",
    gates="fgo",
    states="hc",
    step=step_coupled_peephole,
    params=("p_f", "p_o"),
    triton="fusedrnn.backends.triton.cells.lstm_coupled_peephole",
)


def lstm(*, peephole: bool, coupled_gates: bool) -> Cell:
    """The cell with or without each of them."""
    if coupled_gates:
        return LSTM_COUPLED_PEEPHOLE if peephole else LSTM_COUPLED
    return LSTM_PEEPHOLE if peephole else LSTM
