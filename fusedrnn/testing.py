"""What tests and benchmarks share: inputs of one layer, a run of it, and accuracy bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fusedrnn.backends import (
    Backend,
    Call,
    Gradients,
    Noise,
    Reference,
    Run,
    Sequence,
    Weights,
    products,
    reference,
)
from fusedrnn.backends.cuda import Cuda
from fusedrnn.backends.native import Native
from fusedrnn.backends.triton import Triton
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
    reset_states: bool = False  # with resets: others than zeros enter there
    cell_states: bool = False
    dropout: bool = False  # of h, on its way into W_hh
    zoneout: str = ""  # "training" or "eval"
    layer_norm: bool = False
    recompute: str = "none"

    def __str__(self) -> str:
        names = ("reverse", "lengths", "resets", "reset_states", "cell_states", "dropout",
                 "layer_norm")  # fmt: skip
        flags = [name for name in names if getattr(self, name)]
        flags += [] if self.bias else ["nobias"]
        flags += [f"zoneout-{self.zoneout}"] if self.zoneout else []
        flags += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
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
    noise: Noise = field(default_factory=Noise)

    def call(self, case: Case) -> Call:
        """``case`` on these inputs."""
        return Call(
            case.cell, self.x, self.weights, self.h0, self.c0, self.seq, case.reverse,
            case.cell_states, self.noise,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Inputs:
        return self._map(lambda t: t.to(dtype), lambda t: t)

    def on(self, device: str) -> Inputs:
        return self._map(lambda t: t.to(device), lambda t: t.to(device))

    def _map(self, f: Callable[[Tensor], Tensor], of_seq: Callable[[Tensor], Tensor]) -> Inputs:
        named = zip(Noise._fields, self.noise.masks, strict=False)
        masks: dict[str, Any] = {name: of_seq(t) for name, t in named if t is not None}
        return Inputs(
            f(self.x),
            Weights(*(None if w is None else f(w) for w in self.weights)),  # type: ignore[arg-type]
            f(self.h0),
            None if self.c0 is None else f(self.c0),
            Sequence(
                *(None if t is None else of_seq(t) for t in self.seq.masks),
                *(None if t is None else f(t) for t in self.seq.states),
            ),
            {name: f(g) for name, g in self.grads.items()},
            self.noise._replace(**masks),
        )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of ``case``, rounded to its dtype: every state and output gradient nonzero,
    lengths from 0 to T with both ends present, resets at about a quarter of the steps; a third of h
    dropped, and a third of the states in zones."""
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
    if case.cell.params:
        weights = weights._replace(params=uniform(len(case.cell.params), case.H))
    if case.layer_norm:

        def about(mean: float, size: int) -> Tensor:
            x = torch.randn(size, generator=random, dtype=torch.float64)
            return (mean + 0.3 * x).to(case.dtype)

        of_state = (about(1, case.H), about(0, case.H)) if "c" in case.cell.states else (None,) * 2
        weights = weights._replace(norm_ih=about(1, gates), norm_hh=about(1, gates),
                                   norm_c=of_state[0], norm_c_bias=of_state[1])  # fmt: skip
    others = len(case.cell.states) - 1
    grads = {"y": normal(case.T, case.B, out), "h_n": normal(case.B, out)}
    if others:
        grads["c_n"] = normal(others, case.B, case.H)
    if case.cell_states:
        grads["c"] = normal(case.T, case.B, case.H)
    inputs = Inputs(
        normal(case.T, case.B, case.I),
        weights,
        normal(case.B, out),
        normal(others, case.B, case.H) if others else None,
        Sequence(lengths, resets),
        grads,
        _make_noise(case, random),
    )
    if case.reset_states:
        h, c = normal(out), normal(others, case.H) if others else None
        inputs = replace(inputs, seq=inputs.seq.with_states(h, c))
    return inputs


def _make_noise(case: Case, random: torch.Generator) -> Noise:
    def kept(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random) >= 1 / 3

    noise, out = Noise(), case.P or case.H
    if case.dropout:
        wide = reference.compute_dtype(case.dtype)
        noise = noise._replace(dropout=kept(case.B, out).to(wide) * 1.5)
    if case.zoneout == "training":
        renew = [kept(case.T, case.B, size).to(torch.uint8) for size in (out, case.H)]
        noise = noise._replace(renew_h=renew[0], renew_c=renew[1])
    elif case.zoneout == "eval":
        noise = noise._replace(rate_h=0.75, rate_c=0.625)
    return noise if len(case.cell.states) > 1 else noise._replace(renew_c=None, rate_c=1.0)


Outputs = tuple[Tensor, ...]


def run_case(case: Case, inputs: Inputs, backend: Backend | Reference) -> dict[str, Tensor]:
    """Every output of ``case`` by its name, and the gradient of every input by ``d`` + its name.

    Steps that are not computed get NaN, unless the backend reads x there.
    """
    if not getattr(backend, "reads_padding", True):
        inputs = _with_nan_in_padding(inputs)

    def function(call: Call) -> Outputs:
        return recurrence(backend, call, case.recompute)

    return differentiate(case, inputs, function)


def _with_nan_in_padding(inputs: Inputs) -> Inputs:
    """In x and in the gradients of what is made of it."""
    lengths = inputs.seq.lengths
    if lengths is None:
        return inputs
    steps = torch.arange(inputs.x.shape[0], device=lengths.device).unsqueeze(-1)
    padding = (steps >= lengths).unsqueeze(-1)
    spoiled = {name: g.masked_fill(padding, torch.nan) for name, g in inputs.grads.items()
               if name in ("y", "c")}  # fmt: skip
    x = inputs.x.masked_fill(padding, torch.nan)
    return replace(inputs, x=x, grads=inputs.grads | spoiled)


def differentiate(
    case: Case, inputs: Inputs, function: Callable[[Call], Outputs]
) -> dict[str, Tensor]:
    """What ``function`` makes of a call's tensors, named as by :func:`run_case`."""
    call = inputs.call(case)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in call.tensors]
    outputs = function(call.on(leaves))
    named = dict(zip(inputs.grads, outputs, strict=True))
    torch.autograd.backward(outputs, list(inputs.grads.values()))
    gradients = {
        f"d{k}": torch.zeros_like(v) if v.grad is None else v.grad
        for k, v in zip(Gradients._fields, leaves, strict=True)
        if v is not None
    }
    return {k: v.detach() for k, v in (named | gradients).items()}


def assert_as_accurate(
    case: Case, out: dict[str, Tensor], ref: dict[str, Tensor], ref64: dict[str, Tensor]
) -> None:
    """Passes iff for every tensor the maximum and the rms error of ``out`` against ``ref64`` are
    at most twice those of ``ref`` plus :func:`floor`.

    ``ref`` is the reference in the case's own dtype and ``ref64`` in float64, both on the same
    inputs.
    """
    assert out.keys() == ref64.keys(), f"got {list(out)}, expected {list(ref64)}"
    for name, exact in ref64.items():
        assert out[name].dtype == case.dtype, f"{name} is {out[name].dtype}"
        assert out[name].shape == exact.shape, f"{name} has shape {list(out[name].shape)}"
        if exact.numel() == 0:
            continue
        error = (out[name].double() - exact).abs()
        allowed = (ref[name].double() - exact).abs()
        for kind, e, a in (("max", error.max(), allowed.max()), ("rms", rms(error), rms(allowed))):
            bound = 2 * a + floor(case, exact)
            assert e <= bound, f"{case}: {kind} error of {name} is {e:.3g}, bound {bound:.3g}"


FINER = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def floor(case: Case, exact: Tensor) -> Tensor:
    """``4 * eps * ceil(log2(G*H*T)) * max|exact|``: eps of the dtype in which sums are made, times
    the depth of a pairwise sum over the recurrence."""
    eps = torch.finfo(reference.compute_dtype(case.dtype)).eps
    depth = math.ceil(math.log2(max(2, len(case.cell.gates) * case.H * case.T)))
    return 4 * eps * depth * exact.abs().max()


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_case(
    case: Case,
    backend: Backend | Reference,
    seed: int = 0,
    tf32: bool = False,
    device: str = "cpu",
) -> None:
    """Runs ``case`` on ``backend`` and asserts that it is as accurate as the reference on the CPU.

    Where kernels round on the way, to store 16 bits or for products in ``tf32``, each value they
    store is checked instead, see :func:`assert_stored`.
    """

    def here(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.cpu() for name, t in tensors.items()}

    inputs = make_inputs(case, seed)
    if isinstance(backend, Cuda | Triton) and (tf32 or case.dtype.itemsize == 2):
        with _recording(case, backend) as stored:
            out = run_case(case, inputs.on(device), backend)
        operand = to_tf32 if tf32 else unrounded
        return assert_stored(case, inputs, here(out), here(stored), operand)
    if isinstance(backend, Native) and case.dtype == torch.bfloat16:
        with _recording_on_cpu(inputs, backend) as stored:
            out = run_case(case, inputs, backend)
        if stored:
            return assert_stored(case, inputs, out, stored)
    ref64 = run_case(case, inputs.to(torch.float64), Reference())
    ref = _reference(case, inputs, ref64)
    if case.layer_norm:
        errors = _errors_with_norms(case, inputs)
        ref = {name: x + errors[name] for name, x in ref64.items()}
    out = run_case(case, inputs.on(device), backend)
    assert_as_accurate(case, here(out), ref, ref64)


def _reference(case: Case, inputs: Inputs, ref64: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference in the dtype of ``case``. In float64, where that is what is exact itself: as
    far from it as the arithmetic of float32 leads, but by as much less as float64 is finer."""
    if case.dtype != torch.float64:
        return run_case(case, inputs, Reference())
    rounded = inputs.to(torch.float32)
    low = run_case(replace(case, dtype=torch.float32), rounded, Reference())
    exact = run_case(case, rounded.to(torch.float64), Reference())
    return {name: x + FINER * (low[name].double() - exact[name]) for name, x in ref64.items()}


def _errors_with_norms(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """How far results are from exact ones, in the reference or, if that is more, where every input
    moves by its rounding: norms, with their cancelling gradients, may make more of an error than
    :func:`floor` and a single run know of. In float64 as much smaller as it is finer."""
    if case.dtype == torch.float64:
        single = replace(case, dtype=torch.float32)
        errors = _errors_with_norms(single, inputs.to(torch.float32))
        return {name: FINER * error for name, error in errors.items()}
    eps = torch.finfo(reference.compute_dtype(case.dtype)).eps
    random = torch.Generator().manual_seed(0)

    def move(t: Tensor) -> Tensor:
        signs = torch.randint(0, 2, t.shape, generator=random) * 2 - 1
        return t.to(torch.float64) * (1 + eps * signs)

    exact = run_case(case, inputs.to(torch.float64), Reference())
    runs = [run_case(case, inputs, Reference())]
    runs += [run_case(case, inputs._map(move, lambda t: t), Reference()) for _ in range(3)]
    return {
        name: torch.stack([(run[name].double() - exact[name]).abs() for run in runs]).amax(0)
        for name in exact
    }


# ---- Where values are rounded on the way, right runs may end further apart than a wrong one: a
# value that falls to the other side of a tie changes all that follows. But given the stored values
# it is made from, each stored value is right or wrong.

Rounding = Callable[[Tensor], Tensor]
SCALE = "scale"  # of the gradients among what is stored, see products.scaled


def unrounded(x: Tensor) -> Tensor:
    return x


def to_tf32(x: Tensor) -> Tensor:
    """``x`` rounded to ten bits, ties away from zero, as cvt.rna.tf32 does."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


def assert_stored(
    case: Case,
    inputs: Inputs,
    out: dict[str, Tensor],
    stored: dict[str, Tensor],
    operand: Rounding = unrounded,
) -> None:
    """Passes iff every value in ``out`` (:func:`run_case`) and ``stored`` is what the equations
    make, in float64, of the stored values it depends on, moved by at most :func:`floor`, far below
    one rounding to 16 bits, and then rounded.

    The largest number, to which the floor is relative, is that of the array; where no rounding to
    16 bits follows, it may also be one that flows in, since terms that cancel leave their errors.
    ``operand`` rounds the operands of all products; of those that a library makes, it only may.
    """
    scale = stored.pop(SCALE, torch.ones(())).double()
    model, exactly = OnStored(case, inputs, stored, operand), inputs.to(torch.float64)
    exactly = replace(exactly, grads={name: g * scale for name, g in exactly.grads.items()})
    expected = differentiate(case, exactly, model)
    expected = {name: t / scale if name[0] == "d" else t for name, t in expected.items()}
    expected |= model.made
    got = out | stored
    given = [t for t in inputs.call(case).tensors if t is not None]
    loose = {} if operand is unrounded else rounding_of_products(case, inputs, stored)
    assert got.keys() == expected.keys(), f"got {list(got)}, expected {list(expected)}"
    for name, exact in expected.items():
        value, terms = got[name], [exact]
        assert name not in out or value.dtype == case.dtype, f"{name} is {value.dtype}"
        assert value.shape == exact.shape, f"{name} has shape {list(value.shape)}"
        if exact.numel() == 0:
            continue
        if value.dtype == reference.compute_dtype(case.dtype):
            terms += inputs.grads.values() if name.startswith("d") else given
        error = floor(case, torch.stack([t.double().abs().max() for t in terms if t.numel()]))
        error = error + loose.get(name, 0)
        low, high = ((exact + e).to(value.dtype) for e in (-error, error))
        wrong = ~((low <= value) & (value <= high))
        assert not wrong.any(), (
            f"{case}: {int(wrong.sum())} of {wrong.numel()} values of {name} are wrong, error of "
            f"up to {(value - exact)[wrong].abs().max():.3g}, {error.max():.3g} before rounding "
            "allowed"
        )


def rounding_of_products(
    case: Case, inputs: Inputs, stored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """How far products that a library makes may be from those of operands in tf32: cuBLAS leaves
    them as they are where a shape does not suit its tensor core kernels."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        return 2**-10 * (a.double().abs() @ b.double().abs())  # two operands, half a bit of ten

    def rows(name: str) -> Tensor:
        return stored[name].flatten(0, 1)

    x, (w_ih, *_), dropout = inputs.x, inputs.weights, inputs.noise.dropout
    h = stored["h_prev"] if dropout is None else stored["h_prev"] * dropout
    of_x, d_x, d_h = ("wx", "dwx", "dwh") if "wx" in stored else ("gx", "dgx", "dgh")
    dw_hh = both(rows(d_h).t(), h.flatten(0, 1))
    if case.cell.late:
        late = slice(-case.cell.late * case.H, None)
        dw_hh[late] = both(rows(d_h)[:, late].t(), rows("late"))
    bounds = {
        of_x: both(x, w_ih.t()),
        "dx": both(stored[d_x], w_ih),
        "dw_ih": both(rows(d_x).t(), x.flatten(0, 1)),
        "dw_hh": dw_hh,
    }
    if "dh" in stored:
        bounds["dw_hr"] = both(rows("dh").t(), rows("m"))
    return bounds


@contextmanager
def _recording(case: Case, backend: Backend) -> Iterator[dict[str, Tensor]]:
    """What a backend of GPUs stores in the call inside, each ``[T,B,..]``. Where products are
    normalised, wx and wh are what they are before."""
    stored: dict[str, Tensor] = {}

    def inputs(*args: Any) -> Tensor:
        name = "wx" if case.layer_norm else "gx"
        stored[name] = inputs_themselves(*args)
        return stored[name]

    def normalised(*args: Any) -> tuple[Tensor, products.Normalised]:
        stored["gx"], of_x = normalised_itself(*args)
        stored["hats ih"] = of_x.hats
        return stored["gx"], of_x

    def forward(*args: Any) -> Run:
        run = forward_itself(*args)
        _, others = _record_reserve(run.reserve, stored)
        if case.layer_norm:
            stored["hats hh"] = others[0][0]
            stored.update({"hats c": others[1]} if len(case.cell.states) > 1 else {})
        if case.cell.late:
            stored["late"] = others[-1]
        return run

    def of_normalised(*args: Any) -> tuple[Tensor, Tensor]:
        found = of_normalised_itself(*args)
        stored["dwx"] = found[0]
        return found

    def gradients(*args: Any) -> Gradients:
        recurrent: products.Recurrent = args[2]
        if args[5] is not None:
            stored[SCALE] = args[5]
        for name in ("dgx", "dgh", *(("m", "dh") if case.P else ())):
            stored[name] = getattr(recurrent, name)
        if recurrent.norms is not None:
            stored["dwh"] = recurrent.norms.dproduct
        return gradients_themselves(*args)

    inputs_themselves, gradients_themselves = products.inputs, products.gradients
    normalised_itself, of_normalised_itself = products.normalised, products.of_normalised
    forward_itself = backend.forward
    with (
        patch.object(products, "inputs", inputs),
        patch.object(products, "normalised", normalised),
        patch.object(backend, "forward", forward),
        patch.object(products, "of_normalised", of_normalised),
        patch.object(products, "gradients", gradients),
    ):
        yield stored


def _record_reserve(
    reserve: tuple[Tensor, ...], stored: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """What any backend leaves for backward, by name; returns the m of it and what else there is."""
    stored["h_prev"], c_prev, saved, m, *others = reserve
    stored.update({f"c_prev {j}": t for j, t in enumerate(c_prev)})
    stored.update({f"saved {r}": t for r, t in enumerate(saved)})
    return m, others


@contextmanager
def _recording_on_cpu(inputs: Inputs, backend: Native) -> Iterator[dict[str, Tensor]]:
    """What the engine stores in the call inside, with zeros where a step is not computed; nothing
    if it does not store values as they are outside."""
    stored: dict[str, Tensor] = {}

    def forward(*args: Any) -> Run:
        run = forward_itself(*args)
        if run.reserve[0].dtype == run.y.dtype:
            m, _ = _record_reserve(run.reserve, stored)
            stored.update({"m": m} if m.numel() else {})
        return run

    def backward(*args: Any) -> tuple[Tensor, ...]:
        *found, dgx, dgh, dh = backward_itself(*args[:-1], bool(stored))
        if stored:
            stored.update({"dgx": dgx, "dgh": dgh}, **({"dh": dh} if dh.numel() else {}))
        return *found, dgx, dgh, dh

    ops = torch.ops.fusedrnn
    forward_itself, backward_itself = backend.forward, ops.recurrence_backward
    with (
        patch.object(backend, "forward", forward),
        patch.object(ops, "recurrence_backward", backward),
    ):
        yield stored
    if inputs.seq.lengths is not None:
        computed = torch.arange(inputs.x.shape[0])[:, None] < inputs.seq.lengths
        for name, t in stored.items():
            stored[name] = torch.where(computed[..., None], t, 0)


class _Product(torch.autograd.Function):
    """``a w'`` of rounded operands, as are those of its gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, operand: Rounding) -> Tensor:
        ctx.save_for_backward(a, w)
        ctx.operand = operand
        return operand(a) @ operand(w).t()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        a, w = ctx.saved_tensors
        a, w, d = map(ctx.operand, (a, w, d))
        return d @ w, d.t() @ a, None


class _Normalised(torch.autograd.Function):
    """``gain * hats``, in place of what layer norm makes of x, with the gradients that follow from
    these hats and one over x's standard deviation; that of x from ``d``, known in backward, if it
    is not the one that arrives."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, hats: Tensor, scale: Tensor, d: Tensor | None
    ) -> Tensor:
        ctx.tensors = gain.detach(), hats, scale, d
        return gain * hats

    @staticmethod
    def backward(ctx: Any, arrives: Tensor) -> Any:
        gain, hats, scale, d = ctx.tensors
        of_hats = (arrives if d is None else d) * gain
        means = of_hats.mean(-1, keepdim=True), (of_hats * hats).mean(-1, keepdim=True)
        dx = scale * (of_hats - means[0] - hats * means[1])
        return dx, (arrives * hats).sum(0), None, None, None


def normalised(
    x: Tensor, gain: Tensor, hats: Tensor, scale: Tensor, exact: Tensor, d: Tensor | None = None
) -> Tensor:
    """``gain * exact``, with the gradients of :class:`_Normalised`."""
    out: Tensor = _Normalised.apply(x, gain, hats, scale, d)  # type: ignore[no-untyped-call]
    return _with_value(out, exact * gain.detach())


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """The hats of x, and one over its standard deviation."""
    hats, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, reference.NORM_EPSILON)
    return hats, scale


def _with_value(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of ``x``."""
    return x + (value - x).detach()


class OnStored:
    """The reference, going on from what a backend ``stored``: where that has a value or gradient,
    the one ``made`` here is noted and the stored one taken."""

    def __init__(
        self, case: Case, inputs: Inputs, stored: dict[str, Tensor], operand: Rounding
    ) -> None:
        self.case, self.seq, self.stored, self.operand = case, inputs.seq, stored, operand
        self.noise = inputs.noise

    def __call__(self, call: Call) -> Outputs:
        x, weights = self.x, self.weights = call.x, call.weights
        self.made = {name: torch.zeros_like(t, dtype=x.dtype) for name, t in self.stored.items()}
        steps = range(self.case.T)
        self.times = reversed(steps) if self.case.reverse else iter(steps)
        cell = replace(self.case.cell, step=self.step)
        weights = Weights(*weights[:4], params=weights.params)
        return reference.recurrence(call._replace(cell=cell, weights=weights, noise=Noise()))

    def step(
        self,
        gx: Tensor,
        gh: Tensor,
        state: tuple[Tensor, ...],
        *params: tuple[Tensor, ...],
        **inside: Any,
    ) -> tuple[Tensor, ...]:
        t, planes, weights = next(self.times), gx.shape[-2:], self.weights
        w_ih, w_hh, bias, b_hh, w_hr, _, norm_ih, norm_hh, *_ = weights
        h = self.value("h_prev", t, state[0])
        others = [self.value(f"c_prev {j}", t, c) for j, c in enumerate(state[1:])]
        entering = h
        if self.noise.dropout is not None:
            dropped = h * self.noise.dropout
            entering = _with_value(dropped, dropped.to(self.case.dtype).to(h.dtype))
        early = slice((planes[0] - self.case.cell.late) * planes[1])
        gx, gh = self.product(self.x[t], w_ih), self.product(entering, w_hh[early])
        if norm_ih is not None and norm_hh is not None:
            gx = _with_value(gx, self.take("wx", t, gx.detach()))
            gx = self.gradient("dwx", t, gx)
            exact, scale = _normalise(gx.detach())
            gx = normalised(gx, norm_ih, self.take("hats ih", t, exact), scale, exact)
            gh = self.gradient("dwh", t, gh)
            exact, scale = _normalise(gh.detach())
            hats, unrounded = self.exchange("hats hh", t, exact), self.made["dgh"][t]
            gh = normalised(gh, norm_hh, hats, scale, exact, unrounded)
        if bias is not None and b_hh is not None:
            if not self.case.cell.additive:
                gh = gh + b_hh[early]
            elif "gx" in self.stored:  # which has their sum, as it is stored
                both = bias + b_hh
                bias = _with_value(both, both.to(self.case.dtype).to(both.dtype))
            else:
                bias = bias + b_hh
            gx = gx + bias
        if "gx" in self.stored:
            gx = _with_value(gx, self.take("gx", t, gx.detach()))
        gx = self.gradient("dgx", t, gx)
        gh = self.gradient("dgh", t, gh, early)
        gx, gh = gx.unflatten(-1, planes), gh.unflatten(-1, (-1, planes[1]))
        new = self.cell(t, gx, gh, (h, *others), params, entering)
        if w_hr is not None:
            projected = self.product(self.value("m", t, new[0]), w_hr)
            new = (self.gradient("dh", t, projected), *new[1:])
        if self.noise.zoneout:
            new = reference.zoned(self.noise, t, (h, *others), new)
        return new

    def cell(
        self,
        t: int,
        gx: Tensor,
        gh: Tensor,
        state: tuple[Tensor, ...],
        params: tuple[Any, ...],
        entering: Tensor,
    ) -> tuple[Tensor, ...]:
        """The cell's step, differentiated where it was saved: what autograd itself keeps for
        backward, such as the results of activations, it finds exchanged for the saved planes."""
        made: list[Tensor] = []
        planes: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of what was kept

        def note(*saved: Tensor) -> tuple[Tensor, ...]:
            made.extend(saved)
            return saved

        def keep(*saved: Tensor) -> tuple[Tensor, ...]:
            read = tuple(_with_value(x, next(stored)) for x in saved)
            planes.update({x.data_ptr(): (x, r.detach()) for x, r in zip(saved, read, strict=True)})
            return read

        def unpack(x: Tensor) -> Tensor:
            return planes[x.data_ptr()][1] if x.data_ptr() in planes else x

        # A normalised state is read anew from its hats, and what late gates see where it was
        # stored, as the planes are.
        exact_inside: dict[str, Any] = {}
        stored_inside: dict[str, Any] = {}
        if self.weights.norm_c is not None and self.weights.norm_c_bias is not None:
            gain, bias = self.weights.norm_c, self.weights.norm_c_bias
            of_c: list[tuple[Tensor, Tensor]] = []

            def norm(c: Tensor) -> Tensor:
                of_c.append(_normalise(c.detach()))
                return of_c[0][0] * gain + bias

            def norm_of_stored(c: Tensor) -> Tensor:
                hats = self.exchange("hats c", t, of_c[0][0])
                return normalised(c, gain, hats, of_c[0][1], hats) + bias

            exact_inside["norm"], stored_inside["norm"] = norm, norm_of_stored
        if self.case.cell.late:
            late = slice(-self.case.cell.late * gx.shape[-1], None)
            w_hh, b_hh = self.weights.w_hh[late], self.weights.b_hh

            def of_late(h: Tensor) -> Tensor:
                gates = self.product(h, w_hh)
                if b_hh is not None and not self.case.cell.additive:
                    gates = gates + b_hh[late]
                self.gradient("dgh", t, gates, late)
                out: Tensor = gates.unflatten(-1, (-1, gx.shape[-1]))
                return out

            def product(factor: Tensor) -> Tensor:
                return of_late(self.exchange("late", t, (factor * entering).detach()))

            def product_of_stored(factor: Tensor) -> Tensor:
                stored = self.stored["late"][t].to(factor.dtype)
                return of_late(_with_value(factor * entering, stored))

            exact_inside["product"], stored_inside["product"] = product, product_of_stored

        exact = self.case.cell.step(gx, gh, state, *params, keep=note, **exact_inside)
        stored = iter([self.exchange(f"saved {r}", t, x.detach()) for r, x in enumerate(made)])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            new = self.case.cell.step(gx, gh, state, *params, keep=keep, **stored_inside)
        return tuple(map(_with_value, new, exact))

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        out: Tensor = _Product.apply(a, w, self.operand)  # type: ignore[no-untyped-call]
        return out

    def value(self, name: str, t: int, x: Tensor) -> Tensor:
        return _with_value(x, self.exchange(name, t, x.detach()))

    def gradient(self, name: str, t: int, x: Tensor, columns: slice = slice(None)) -> Tensor:
        x.register_hook(lambda d: self.exchange(name, t, d, columns))
        return x

    def exchange(self, name: str, t: int, made: Tensor, columns: slice = slice(None)) -> Tensor:
        """The stored value for the one made of it; where step t is not computed, both are 0."""
        if self.seq.lengths is not None:
            made = made * (t < self.seq.lengths).unsqueeze(-1)
        return self.take(name, t, made, columns)

    def take(self, name: str, t: int, made: Tensor, columns: slice = slice(None)) -> Tensor:
        self.made[name][t][:, columns] = made
        return self.stored[name][t][:, columns].to(made.dtype)
