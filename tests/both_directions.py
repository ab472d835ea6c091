"""Both directions of a layer at once, beside each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusedrnn.backends import Backend, Call
from fusedrnn.recurrence import recurrence, recurrences
from fusedrnn.testing import Case, make_inputs


def assert_as_alone(
    backend: Backend,
    case: Case,
    device: str = "cpu",
    between: Callable[[], object] = lambda: None,
    factors: tuple[float, float] = (1, 1),
) -> None:
    """To the bit, all outputs and gradients. ``between`` is called once each has run alone;
    ``factors`` are of the gradients of each one's outputs."""
    inputs = [make_inputs(case, seed).on(device) for seed in (0, 1)]
    one, other = (i.call(replace(case, reverse=k == 1)) for k, i in enumerate(inputs))
    calls = [one, other._replace(x=one.x, seq=one.seq)]
    each = zip(inputs, factors, strict=True)
    grads = [g * factor for i, factor in each for g in i.grads.values()]

    def run(function: Callable[[list[Call]], list[tuple[Tensor, ...]]]) -> list[Tensor]:
        leaves = [
            [None if t is None else t.detach().clone().requires_grad_() for t in call.tensors]
            for call in calls
        ]
        outputs = function([call.on(of) for call, of in zip(calls, leaves, strict=True)])
        flat = [t for of_call in outputs for t in of_call]
        torch.autograd.backward(flat, grads)
        return flat + [t.grad for of_call in leaves for t in of_call if t is not None]

    alone = run(lambda calls: [recurrence(backend, call) for call in calls])
    between()
    at_once = run(lambda calls: recurrences(backend, calls))
    assert len(alone) == len(at_once) and all(map(torch.equal, alone, at_once))
