"""Gradients that float16 has few bits for."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedrnn.backends import Backend
from fusedrnn.cells import LSTM
from fusedrnn.testing import Case, make_inputs, run_case


def assert_as_accurate_as_large_ones(
    backend: Backend, device: str = "cpu", hidden: int = 24
) -> None:
    """Of outputs' gradients that are 2^-12 times as large all others are, too, rounded once each.
    Those of gates, kept in float16 as they are, would have lost most of their bits, and sums over
    all rows show it."""
    case = Case(LSTM, 8, 33, 4, hidden, dtype=torch.float16, cell_states=True)
    inputs = make_inputs(case).on(device)
    found = []
    for factor in (1, 2**-12):
        grads = {name: (16 * g).round() / 16 * factor for name, g in inputs.grads.items()}
        found.append(run_case(case, replace(inputs, grads=grads), backend))
    for name, large in found[0].items():
        if name.startswith("d"):
            expected, small = large.double() * 2**-12, found[1][name].double()
            wrong = (small - expected).abs() > 2**-10 * expected.abs() + 2**-24
            assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values of {name}"
