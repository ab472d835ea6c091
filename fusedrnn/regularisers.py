"""What regularises a recurrence from within: the rates, and the masks of a call.

All masks of a call come from one seed, see :mod:`fusedrnn.philox`, which is drawn from the default
generator only if one is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedrnn import philox
from fusedrnn.arguments import probability
from fusedrnn.backends import Noise, Weights
from fusedrnn.backends.reference import compute_dtype

Zoneout = float | tuple[float, float]


class Rates(NamedTuple):
    """Probabilities: of a number of W_hh, and of h on its way there, to be dropped, and of h and of
    c to keep their values."""

    weight_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: Zoneout = 0.0

    @classmethod
    def checked(
        cls, states: int, weight_dropout: float, recurrent_dropout: float, zoneout: Zoneout
    ) -> Rates:
        """ValueError for what is no probability; zoneout may be two for a cell of two states."""
        probability("weight_dropout", weight_dropout)
        probability("recurrent_dropout", recurrent_dropout)
        of_states = zoneout if isinstance(zoneout, tuple | list) else (zoneout,)
        if len(of_states) > states or not of_states:
            raise ValueError(
                f"zoneout should be a probability{', or two, of h and c' if states == 2 else ''}, "
                f"got {zoneout!r}"
            )
        for p in of_states:
            probability("zoneout", p)
        zone_h, zone_c = of_states[0], of_states[-1]
        zoneout = zone_h if zone_h == zone_c else (zone_h, zone_c)
        return cls(weight_dropout, recurrent_dropout, zoneout)

    @property
    def zones(self) -> tuple[float, float]:
        """Of h and c."""
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)


NO_RATES = Rates()


def regularised(
    rates: Rates, x: Tensor, weights: list[Weights], states: int, training: bool
) -> tuple[list[Weights], list[Noise]]:
    """For each layer and direction over ``x [T,B,I]`` its weights, some of which may be dropped,
    and what else happens inside; out of training only zoneout, by its expectation."""
    zone_h, zone_c = rates.zones if states == 2 else (rates.zones[0], 0.0)
    if not training:
        return weights, [Noise(rate_h=1 - zone_h, rate_c=1 - zone_c)] * len(weights)
    if rates == NO_RATES:
        return weights, [Noise()] * len(weights)
    seed, steps, batch = philox.seed(), x.shape[0], x.shape[1]

    def mask(p: float, place: int, kind: int, dtype: torch.dtype, *shape: int) -> Tensor | None:
        return philox.mask(x.new_empty(shape, dtype=dtype), seed, p, place, kind) if p else None

    dropped, noise = [], []
    for k, w in enumerate(weights):
        if rates.weight_dropout:
            of_weights = philox.mask(w.w_hh, seed, rates.weight_dropout, k, philox.WEIGHT)
            w = w._replace(w_hh=w.w_hh * of_weights)
        dropped.append(w)
        out = w.w_hh.shape[1]
        hidden = out if w.w_hr is None else w.w_hr.shape[1]
        wide, flags = compute_dtype(x.dtype), torch.uint8
        noise.append(
            Noise(
                mask(rates.recurrent_dropout, k, philox.RECURRENT, wide, batch, out),
                mask(zone_h, k, philox.ZONE_H, flags, steps, batch, out),
                mask(zone_c, k, philox.ZONE_C, flags, steps, batch, hidden),
            )
        )
    return dropped, noise
