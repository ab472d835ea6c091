"""Times fusedrnn.ConvLSTM beside the loop of convolutions that one would write in plain PyTorch.

    python bench/conv.py                 both shapes, about 2 minutes

A call is a training step: y, and the gradients of x and of every parameter for a given gradient of
y. The loop makes one convolution a step, of x and h together, and the gates from it; its
convolutions alone, without the cell, stand beside it: no cell update can be faster than none. Ours
and the loop are first compared; where they differ nothing is timed, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import report
import torch
import torch.nn.functional as F
from measure import Spread
from torch import Tensor
from workload import largest

import fusedrnn

# T, B, channels, hidden channels, Y, X
SHAPES = ((10, 4, 16, 16, 32, 32), (10, 8, 16, 32, 64, 64))
Cell = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def none(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """In place of a cell, so that the convolutions alone remain."""
    return gates[:, : c.shape[1]], c


def loop(layer: fusedrnn.ConvLSTM, x: Tensor, cell: Cell) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    weight, bias = torch.cat((w_ih, w_hh), 1), b_ih + b_hh
    h = c = x.new_zeros(x.shape[1], layer.hidden_channels, *x.shape[3:])
    y = []
    for x_t in x.unbind(0):
        gates = F.conv2d(torch.cat((x_t, h), 1), weight, bias, padding="same")
        h, c = cell(gates, c)
        y.append(h)
    return torch.stack(y)


def work(shape: tuple[int, ...]) -> list[Callable[[], list[Tensor]]]:
    """Ours, the loop, and the loop's convolutions, on the same tensors (fixed seed)."""
    torch.manual_seed(0)
    steps, batch, channels, hidden, *size = shape
    layer = fusedrnn.ConvLSTM(channels, hidden, 3)
    x = torch.randn(steps, batch, channels, *size, requires_grad=True)
    dy = torch.randn(steps, batch, hidden, *size)
    wanted = [x, *layer.parameters()]

    def training(forward: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            y = forward()
            return [y, *torch.autograd.grad(y, wanted, dy)]

        return step

    sides = lambda: layer(x)[0], lambda: loop(layer, x, cell), lambda: loop(layer, x, none)
    return [training(side) for side in sides]


def agree(ours: list[Tensor], theirs: list[Tensor], terms: int) -> bool:
    """Within the rounding of both, 4 eps ceil(log2(terms)) of each tensor's largest value, where a
    gradient of a weight is a sum of `terms` products."""
    bound = 2 * 4 * torch.finfo(torch.float32).eps * math.ceil(math.log2(terms))
    # Not `>`, which is false for NaN.
    return all(largest(a - b) <= bound * largest(b) for a, b in zip(ours, theirs, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="time for all timing together (%(default)g)"
    )
    parser.add_argument(
        "--shape", nargs=6, type=int, metavar="N", help="T B channels hidden Y X, this one only"
    )
    parser.add_argument("--csv", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    shapes = (tuple(options.shape),) if options.shape else SHAPES
    facts = measure.environment() | {"threads": torch.get_num_threads(), "backend": "default"}
    print(
        report.heading(facts),
        "",
        "| T, B, channels, hidden, Y, X | ms | loop / ours | convolutions alone / ours |",
        "|---|---:|---|---|",
        sep="\n",
        flush=True,
    )
    rows: list[dict[str, object]] = []
    for shape in shapes:
        ours, theirs, convolutions = work(shape)
        if not agree(ours(), theirs(), shape[0] * shape[1] * shape[4] * shape[5]):
            print(f"{shape}: GATE RED, not timed: ours and the loop differ")
            return 1
        budget = options.seconds / len(shapes) / 2
        of_loop, of_convolutions = (
            measure.compare(ours, side, budget) for side in (theirs, convolutions)
        )

        def text(spread: Spread) -> str:
            return f"{spread.mid:.2f} [{spread.low:.2f}-{spread.high:.2f}]"

        name, ms = ", ".join(map(str, shape)), report.digits(1e3 * of_loop.ours.mid)
        print(f"| {name} | {ms} | {text(of_loop.ratio)} | {text(of_convolutions.ratio)} |")
        rows.append(
            {
                "shape": " ".join(map(str, shape)),
                **of_loop.ours.columns("ours_p{}_ms", 20, 1e3),
                **of_loop.ratio.columns("loop_over_ours_p{}", 10),
                **of_convolutions.ratio.columns("convolutions_over_ours_p{}", 10),
                "pairs": of_loop.pairs,
            }
            | facts
        )
    if options.csv:
        report.write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
