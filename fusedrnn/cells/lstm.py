"""LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), gates i f g o.

``i f g o = gx + gh``; ``c = s(f) * c_prev + s(i) * tanh(g)``; ``h = s(o) * tanh(c)``, where s is
the sigmoid. With a projection (Sak et al. 2014) the driver makes ``h = W_hr (s(o) * tanh(c))``.
"""

from __future__ import annotations

from torch import Tensor

from fusedrnn.cells.cell import Cell, Keep, keep


def step(
    gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], keep: Keep = keep
) -> tuple[Tensor, ...]:
    i, f, g, o = (gx + gh).unbind(-2)
    i, f, g, o = keep(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid())
    c = f * state[1] + i * g
    return o * c.tanh(), c


LSTM = Cell(
    "lstm",
    gates="ifgo",
    states="hc",
    saved=4,
    additive=True,
    step=step,
    triton="fusedrnn.backends.triton.cells.lstm",
)
