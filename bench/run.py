"""Times fusedrnn against torch.nn on the same weights and data, interleaved in one process.

    python bench/run.py             the default shapes, under 8 minutes on 2 cores
    python bench/run.py --full      every shape
    python bench/run.py --shape lstm-t100-b32-h512 --mode train --threads 1

Every shape first passes a correctness gate (outputs and every gradient against float64); a red gate
is not timed and the command exits with 1. Forward is also timed against ONNX Runtime, where that
and the package onnx are installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import measure
import onnx_layer
import report
import torch
from measure import Peak, Timing
from shapes import ALL, Shape, choose
from workload import Gate, Workload


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), help="only this cell's shapes")
    parser.add_argument("--backend", help="a backend by name (default: fusedrnn's own choice)")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="these shapes only (see --list)")
    parser.add_argument(
        "--mode", choices=("fwd", "train"), help="forward without grad, or forward and backward"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of both (%(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="every shape")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, help="time for all timing together (10 a row; 12 with --full)"
    )
    parser.add_argument("--csv", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="write a bar plot there (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="name the shapes and stop")
    return parser.parse_args(arguments)


def row(shape: Shape, mode: str, work: Workload, gate: Gate, timing: Timing) -> dict[str, object]:
    """One line of the CSV, times in milliseconds a call, without its share of the peak."""
    extra = [f"proj={shape.proj}"] if shape.proj else []
    extra += ["packed"] if shape.packed else []
    extra += ["stepping"] if shape.calls > 1 else []
    return {
        "cell": shape.cell,
        "shape": shape.name,
        **{letter: getattr(shape, letter) for letter in "TBIH"},
        "layers": shape.layers,
        "dirs": shape.dirs,
        "variant": " ".join(extra),
        "mode": mode,
        "dtype": str(work.dtype).removeprefix("torch."),
        **timing.ours.columns("ours_p{}_ms", 20, 1e3 / shape.calls),
        **timing.theirs.columns("torch_p{}_ms", 20, 1e3 / shape.calls),
        **timing.ratio.columns("ratio_p{}", 10),
        "gflops": shape.flops(work.rows, mode) / timing.ours.mid / 1e9,
        "pairs": timing.pairs,
        "dropped": timing.dropped,
        "undisturbed": int(timing.clean),
        "error_ours": gate.ours,
        "error_torch": gate.theirs,
    }


def against_onnx(work: Workload, mode: str, seconds: float) -> dict[str, object]:
    """Columns of a row beside those about torch.nn, empty where there is nothing to compare."""
    names = ["onnx_p50_ms", *(f"onnx_ratio_p{p}" for p in (10, 50, 90))]
    theirs = onnx_layer.forward(work) if mode == "fwd" else None
    if theirs is None:
        return dict.fromkeys(names, "")
    timing = measure.compare(work.call(work.ours, mode), theirs, seconds)
    return {names[0]: 1e3 * timing.theirs.mid} | timing.ratio.columns("onnx_ratio_p{}", 10)


def finished(rows: list[dict[str, object]], peak: Peak) -> list[dict[str, object]]:
    """The rows in the order of the list of shapes, with their share of the best torch.mm so far."""
    names = [shape.name for shape in ALL]
    return [
        r | {"mm_gflops": peak.gflops, "mm_share": float(str(r["gflops"])) / peak.gflops}
        for r in sorted(rows, key=lambda r: names.index(str(r["shape"])))
    ]


def run(
    shapes: list[Shape], options: argparse.Namespace, seconds: float
) -> tuple[list[dict[str, object]], int]:
    """Gates and times every shape, printing as it goes; returns the rows and the red gates."""
    todo = [(s, [m for m in s.modes if options.mode in (None, m)]) for s in shapes]
    left = sum(len(modes) for _, modes in todo)
    total, red = left, 0
    facts = measure.environment() | {
        "threads": torch.get_num_threads(),
        "backend": options.backend or "default",
    }
    dtype = getattr(torch, options.dtype)
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0  # of operands that are rounded
    with_onnx = onnx_layer.installed()
    peak = Peak()
    rows: list[dict[str, object]] = []
    print(report.heading(facts), f"peak: {peak}", "", report.header(), sep="\n", flush=True)
    # What a cheap row leaves of its share goes to those after it, so the cheap ones come first.
    for shape, modes in sorted(todo, key=lambda pair: pair[0].flops(pair[0].T * pair[0].B, "fwd")):
        work = Workload(shape, options.backend, dtype=dtype, eps=eps)
        gate = work.gate()
        if not gate.holds:
            red += 1
            left -= len(modes)
            print(f"{shape.name}: GATE RED, not timed: {gate}", flush=True)
            continue
        for mode in modes:
            start = time.perf_counter()
            peak.probe()
            ours, theirs = work.call(work.ours, mode), work.call(work.theirs, mode)
            share = max(0.0, seconds) / left
            timing = measure.compare(ours, theirs, share / 2 if with_onnx else share)
            rows.append(row(shape, mode, work, gate, timing) | facts)
            if with_onnx:
                rows[-1] |= against_onnx(work, mode, share / 2)
            left -= 1
            seconds -= time.perf_counter() - start
            newest = finished(rows[-1:], peak)[0]
            print(report.line(newest), f"[{total - left}/{total}]", flush=True)
            if options.csv:
                report.write_csv(options.csv, finished(rows, peak))
    print(f"\npeak: {peak}")
    return finished(rows, peak), red


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(f"{shape.name}{'' if shape.default else '  (--full)'}" for shape in ALL))
        return 0
    try:
        shapes = choose(options.shape, options.cell, options.full)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.plot and not report.can_plot():
        print("bench: --plot needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    count = sum(len([m for m in s.modes if options.mode in (None, m)]) for s in shapes)
    rows, red = run(shapes, options, options.seconds or (12.0 if options.full else 10.0) * count)
    print(report.summary(rows, red))
    if options.plot and rows:
        report.plot(rows, options.plot)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
