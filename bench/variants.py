"""Times variants, lengths and resets beside the plain layer, interleaved in one process.

    python bench/variants.py                 both shapes, about 2 minutes
    python bench/variants.py --shape lstm-t100-b1-h128 --seconds 30

A call is a training step: y, and the gradients of x and of every parameter for a given gradient
of y. Variants that are cells of their own are also timed beside the loop in plain PyTorch that one
would write for them. What is timed is first held against the reference in float64; a row outside
the bound is not timed, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import report
import torch
import torch.nn.functional as F
from measure import MIN_PAIRS, Timing
from shapes import ALL, Shape
from torch import Tensor, nn
from workload import largest

import fusedrnn
from fusedrnn.backends import Weights
from fusedrnn.regularisers import Rates, regularised

DEFAULT = (Shape("lstm", 100, 32, 128, 128), Shape("lstm", 100, 8, 256, 256))
# And what is in the list of shapes as a plain LSTM. A GRU takes the same numbers.
SHAPES = {
    shape.name: shape
    for shape in (*DEFAULT, *ALL)
    if shape == Shape("lstm", shape.T, shape.B, shape.I, shape.H, default=shape.default)
}
Layer = fusedrnn.LSTM | fusedrnn.GRU
Forward = Callable[[Any, Tensor], Tensor]
Step = Callable[[], list[Tensor]]


def all_lengths(shape: Shape) -> Tensor:
    """Even over 1..T, in a random order."""
    lengths = torch.linspace(1, shape.T, shape.B).round().long()
    return lengths[torch.randperm(shape.B, generator=torch.Generator().manual_seed(0))]


def some_resets(shape: Shape) -> Tensor:
    """True at about 2 % of all steps."""
    return torch.rand(shape.T, shape.B, generator=torch.Generator().manual_seed(0)) < 0.02


@dataclass(frozen=True)
class Variant:
    """A layer of these options, called with these arguments."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[Shape], dict[str, Tensor]] = lambda _: {}
    layer: type[Layer] = fusedrnn.LSTM

    @property
    def has_loop(self) -> bool:
        """It has a cell of its own."""
        return bool(self.options) and "initial_state" not in self.options


VARIANTS = (
    Variant("peephole", {"peephole": True}),
    Variant("coupled gates", {"coupled_gates": True}),
    Variant("coupled gates, peephole", {"coupled_gates": True, "peephole": True}),
    Variant("layer norm", {"layer_norm": True}),
    Variant("recurrent dropout", {"recurrent_dropout": 0.25}),
    Variant("zoneout", {"zoneout": 0.1}),
    Variant("GRU, reset before", {"reset_after": False}, layer=fusedrnn.GRU),
    Variant("lengths 1..T", arguments=lambda shape: {"lengths": all_lengths(shape)}),
    Variant("lengths T/2", arguments=lambda s: {"lengths": torch.full((s.B,), s.T // 2)}),
    Variant("resets", arguments=lambda shape: {"resets": some_resets(shape)}),
    Variant(
        "resets, learned states",
        {"initial_state": "learned"},
        lambda shape: {"resets": some_resets(shape)},
    ),
)


def eager_gru(layer: fusedrnn.GRU, x: Tensor) -> Tensor:
    """The layer with its reset gate before the product, as :func:`eager`."""
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    early = 2 * layer.hidden_size
    h = x.new_zeros(x.shape[1], layer.hidden_size)
    y = []
    for gx in F.linear(x, w_ih, b_ih + b_hh):
        r, z = (gx[:, :early] + F.linear(h, w_hh[:early])).sigmoid().chunk(2, -1)
        n = (gx[:, early:] + F.linear(r * h, w_hh[early:])).tanh()
        h = n + z * (h - n)
        y.append(h)
    return torch.stack(y)


def eager(layer: fusedrnn.LSTM, x: Tensor) -> Tensor:
    """The layer as a loop of PyTorch's own operations; all that can be is done before the loop."""
    w_ih, w_hh, b_ih, b_hh, *others = layer.parameters()
    peepholes, norms = ([], others) if layer.layer_norm else (others, [])
    if peepholes:
        *p_i, p_f, p_o = peepholes[0].chunk(2 if layer.coupled_gates else 3)
    rates = Rates(layer.weight_dropout, layer.recurrent_dropout, layer.zoneout)
    _, (noise,) = regularised(rates, x, [Weights(w_ih, w_hh, b_ih, b_hh)], 2, True)
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    y = []
    of_x = F.linear(x, w_ih, None if norms else b_ih + b_hh)
    if norms:
        of_x = F.layer_norm(of_x, norms[0].shape, norms[0], b_ih + b_hh)
    for t, gx in enumerate(of_x):
        before = h, c
        of_h = F.linear(h if noise.dropout is None else h * noise.dropout, w_hh)
        gates = gx + (F.layer_norm(of_h, norms[1].shape, norms[1]) if norms else of_h)
        if layer.coupled_gates:
            f, g, o = gates.chunk(3, -1)
            f = (f + p_f * c if peepholes else f).sigmoid()
            i = 1 - f
        else:
            i, f, g, o = gates.chunk(4, -1)
            f = (f + p_f * c if peepholes else f).sigmoid()
            i = (i + p_i[0] * c if peepholes else i).sigmoid()
        c = f * c + i * g.tanh()
        h = F.layer_norm(c, norms[2].shape, norms[2], norms[3]) if norms else c
        h = (o + p_o * c if peepholes else o).sigmoid() * h.tanh()
        if noise.renew_h is not None and noise.renew_c is not None:
            h = torch.where(noise.renew_h[t].bool(), h, before[0])
            c = torch.where(noise.renew_c[t].bool(), c, before[1])
        y.append(h)
    return torch.stack(y)


def training(layer: Layer, x: Tensor, dy: Tensor, forward: Forward) -> Step:
    """What is timed: y, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]

    def step() -> list[Tensor]:
        torch.manual_seed(0)  # the masks of all that is compared are the same
        y = forward(layer, x)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    return step


class Work:
    """The steps of one row on the same tensors (fixed seed); a loop only for cells of their own."""

    def __init__(self, variant: Variant, shape: Shape) -> None:
        torch.manual_seed(0)
        x, dy = (torch.randn(shape.T, shape.B, width) for width in (shape.I, shape.H))
        plain = variant.layer(shape.I, shape.H)
        layer = variant.layer(shape.I, shape.H, **variant.options)
        if layer.layer_norm:  # with gains of 1 it is chaotic, and every error grows to 1e-3
            nn.init.constant_(layer.get_parameter("norm_hh_l0"), 0.25)
        precise = copy.deepcopy(layer).double()
        arguments = variant.arguments(shape)

        def ours(layer: Layer, x: Tensor) -> Tensor:
            y: Tensor = layer(x, **arguments)[0]
            return y

        self.plain = training(plain, x, dy, lambda layer, x: layer(x)[0])
        self.ours = training(layer, x, dy, ours)
        loop = eager if variant.layer is fusedrnn.LSTM else eager_gru
        self.loop = training(layer, x, dy, loop) if variant.has_loop else None
        self._precise = training(precise, x.double(), dy.double(), ours)
        self._names = ["y", "dx", *(f"d{name}" for name, _ in layer.named_parameters())]
        self._terms = len(layer.weight_hh_l0) * shape.T

    def errors(self) -> dict[str, float]:
        """The largest error of all that the layer and the loop return, by name, relative to the
        largest value of each tensor, against the layer on the backend "reference" in float64."""
        with fusedrnn.backend("reference"):
            exact = dict(zip(self._names, self._precise(), strict=True))
        sides = {"": self.ours} | ({" of the eager loop": self.loop} if self.loop else {})
        tiny = torch.finfo(torch.float64).tiny
        return {
            name + side: largest(value.double() - exact[name]) / (largest(exact[name]) + tiny)
            for side, step in sides.items()
            for name, value in zip(exact, step(), strict=True)
        }

    @property
    def bound(self) -> float:
        """Of each of these errors: 4 eps ceil(log2(G H T)) with float32's eps, where eps times the
        logarithm is the rounding of a sum of G*H*T terms added in pairs, and the 4 leaves room for
        the few such sums in a row."""
        return 4 * torch.finfo(torch.float32).eps * math.ceil(math.log2(self._terms))


def row(
    variant: Variant, shape: Shape, error: float, plain: Timing, loop: Timing | None = None
) -> dict[str, object]:
    """One line of the CSV; where there is no loop its columns are missing."""
    found = {
        "variant": variant.name,
        "shape": shape.name,
        **{letter: getattr(shape, letter) for letter in "TBIH"},
        "error": error,
        **plain.theirs.columns("ours_p{}_ms", 20, 1e3),
        **plain.ours.columns("plain_p{}_ms", 20, 1e3),
        **plain.ratio.columns("ours_over_plain_p{}", 10),
        "plain_pairs": plain.pairs,
        "plain_undisturbed": int(plain.clean),
    }
    if loop:
        found |= {
            **loop.theirs.columns("loop_p{}_ms", 20, 1e3),
            **loop.ratio.columns("loop_over_ours_p{}", 10),
            "loop_pairs": loop.pairs,
            "loop_undisturbed": int(loop.clean),
        }
    return found


def line(variant: Variant, shape: Shape, plain: Timing, loop: Timing | None = None) -> str:
    """One line of the table; `!` marks that preempted pairs had to be kept."""

    def ratio(timing: Timing | None) -> str:
        if timing is None:
            return "-"
        of = timing.ratio
        return f"{of.mid:.2f} [{of.low:.2f}-{of.high:.2f}]{'' if timing.clean else '!'}"

    ms = report.digits(1e3 * plain.theirs.mid)
    return f"| {variant.name} | {shape.name} | {ms} | {ratio(plain)} | {ratio(loop)} |"


def run(shapes: list[Shape], seconds: float, csv: Path | None) -> int:
    """Gates and times every row, printing as it goes; returns the number of red gates."""
    facts = measure.environment() | {"threads": torch.get_num_threads(), "backend": "default"}
    print(
        report.heading(facts),
        "",
        "| variant | shape | ms | of the plain layer's time | eager loop / ours |",
        "|---|---|---:|---|---|",
        sep="\n",
        flush=True,
    )
    red: list[str] = []
    rows: list[dict[str, object]] = []
    left = len(shapes) * sum(2 if variant.has_loop else 1 for variant in VARIANTS)  # comparisons
    for shape, variant in itertools.product(shapes, VARIANTS):
        work = Work(variant, shape)
        pairs = [(work.plain, work.ours)] + ([(work.ours, work.loop)] if work.loop else [])
        errors = work.errors()
        # Not `>`, which is false for NaN.
        wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= work.bound]
        if wrong:
            left -= len(pairs)
            red.append(
                f"{variant.name}, {shape.name}: GATE RED, not timed: errors against float64, "
                f"relative to the largest value, beyond {work.bound:.1e}: {', '.join(wrong)}"
            )
            continue
        timings = []
        for ours, theirs in pairs:
            start = time.perf_counter()
            timings.append(measure.compare(ours, theirs, max(0.0, seconds) / left))
            left -= 1
            seconds -= time.perf_counter() - start
        print(line(variant, shape, *timings), flush=True)
        rows.append(row(variant, shape, max(errors.values()), *timings) | facts)
        if csv:
            missing = dict.fromkeys(key for some in rows for key in some)
            report.write_csv(csv, [missing | some for some in rows])
    print(
        f"\nmedian [p10-p90]; ! fewer than {MIN_PAIRS} pairs were undisturbed, all are kept",
        *red,
        sep="\n",
    )
    return len(red)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="time for all timing together (%(default)g)"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME",
        choices=list(SHAPES),
        default=[shape.name for shape in DEFAULT],
        help=f"of {', '.join(SHAPES)} (the first two)",
    )
    parser.add_argument("--csv", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    red = run([SHAPES[name] for name in options.shape], options.seconds, options.csv)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
