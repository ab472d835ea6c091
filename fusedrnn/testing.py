"""What tests and benchmarks share: inputs of one layer, a run of it, and the accuracy bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedrnn.backends import Backend, Reference, Sequence, Weights, reference
from fusedrnn.cells import Cell
from fusedrnn.recurrence import recurrence


@dataclass(frozen=True)
class Case:
    """One layer and direction to run; ``T B I H P`` as everywhere, P = 0: no projection."""

    cell: Cell
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    dtype: torch.dtype = torch.float32
    bias: bool = True
    reverse: bool = False
    lengths: bool = False
    resets: bool = False
    cell_states: bool = False

    def __str__(self) -> str:
        flags = [f for f in ("reverse", "lengths", "resets", "cell_states") if getattr(self, f)]
        flags += [] if self.bias else ["nobias"]
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}" + (f"-P{self.P}" if self.P else "")
        return "-".join([self.cell.name, shape, str(self.dtype).split(".")[1], *flags])


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weights: Weights
    h0: Tensor
    c0: Tensor | None
    seq: Sequence
    grads: dict[str, Tensor]  # the upstream gradient of each output

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(
            self,
            x=self.x.to(dtype),
            weights=Weights(*(None if w is None else w.to(dtype) for w in self.weights)),  # type: ignore[arg-type]
            h0=self.h0.to(dtype),
            c0=None if self.c0 is None else self.c0.to(dtype),
            grads={name: g.to(dtype) for name, g in self.grads.items()},
        )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of ``case``, rounded to its dtype: every state and output gradient nonzero,
    lengths from 0 to T with both ends present, resets at about a quarter of the steps."""
    random = torch.Generator().manual_seed(seed)
    out, gates = case.P or case.H, len(case.cell.gates) * case.H

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(case.dtype)

    def uniform(*shape: int) -> Tensor:
        u = torch.rand(shape, generator=random, dtype=torch.float64)
        return ((2 * u - 1) / math.sqrt(case.H)).to(case.dtype)

    weights = Weights(
        uniform(gates, case.I),
        uniform(gates, out),
        uniform(gates) if case.bias else None,
        uniform(gates) if case.bias else None,
        uniform(case.P, case.H) if case.P else None,
    )
    lengths = resets = None
    if case.lengths:
        lengths = torch.randint(0, case.T + 1, (case.B,), generator=random)
        lengths[:1], lengths[-1:] = 0, case.T
    if case.resets:
        resets = torch.rand(case.T, case.B, generator=random) < 0.25
        if lengths is not None:
            resets &= torch.arange(case.T).unsqueeze(-1) < lengths
    others = len(case.cell.states) - 1
    grads = {"y": normal(case.T, case.B, out), "h_n": normal(case.B, out)}
    if others:
        grads["c_n"] = normal(others, case.B, case.H)
    if case.cell_states:
        grads["c"] = normal(case.T, case.B, case.H)
    return Inputs(
        normal(case.T, case.B, case.I),
        weights,
        normal(case.B, out),
        normal(others, case.B, case.H) if others else None,
        Sequence(lengths, resets),
        grads,
    )


def run_case(case: Case, inputs: Inputs, backend: Backend | Reference) -> dict[str, Tensor]:
    """Every output of ``case`` by its name, and the gradient of every input by ``d`` + its name."""
    leaves = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0, **inputs.weights._asdict()}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items() if v is not None}
    weights = Weights(*(leaves.get(name) for name in Weights._fields))  # type: ignore[arg-type]
    outputs = recurrence(
        case.cell, backend, leaves["x"], weights, leaves["h0"], leaves.get("c0"), inputs.seq,
        case.reverse, case.cell_states,
    )  # fmt: skip
    named = dict(zip(inputs.grads, outputs, strict=True))
    torch.autograd.backward(outputs, list(inputs.grads.values()))
    gradients = {f"d{k}": v.grad for k, v in leaves.items()}
    return {k: v.detach() for k, v in (named | gradients).items() if v is not None}


def assert_as_accurate(
    case: Case, out: dict[str, Tensor], ref: dict[str, Tensor], ref64: dict[str, Tensor]
) -> None:
    """Passes iff for every tensor the maximum and the rms error of ``out`` against ``ref64`` are
    at most twice those of ``ref`` plus a floor from the depth of the sums.

    ``ref`` is the reference in the case's own dtype and ``ref64`` in float64, both on the same
    inputs. The floor is ``4 * eps * ceil(log2(G*H*T)) * max|ref64|``: eps of the dtype in which
    sums are made, times the depth of a pairwise sum over the recurrence.
    """
    eps = torch.finfo(reference.compute_dtype(case.dtype)).eps
    depth = math.ceil(math.log2(max(2, len(case.cell.gates) * case.H * case.T)))
    assert out.keys() == ref64.keys(), f"got {list(out)}, expected {list(ref64)}"
    for name, exact in ref64.items():
        assert out[name].dtype == case.dtype, f"{name} is {out[name].dtype}"
        assert out[name].shape == exact.shape, f"{name} has shape {list(out[name].shape)}"
        if exact.numel() == 0:
            continue
        error = (out[name].double() - exact).abs()
        allowed = (ref[name].double() - exact).abs()
        floor = 4 * eps * depth * exact.abs().max()
        for kind, e, a in (("max", error.max(), allowed.max()), ("rms", rms(error), rms(allowed))):
            bound = 2 * a + floor
            assert e <= bound, f"{case}: {kind} error of {name} is {e:.3g}, bound {bound:.3g}"


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_case(case: Case, backend: Backend | Reference, seed: int = 0) -> None:
    """Runs ``case`` on ``backend`` and asserts that it is as accurate as the reference."""
    inputs = make_inputs(case, seed)
    ref = run_case(case, inputs, Reference())
    ref64 = run_case(case, inputs.to(torch.float64), Reference())
    assert_as_accurate(case, run_case(case, inputs, backend), ref, ref64)
