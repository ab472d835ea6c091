"""torch.nn.LSTM and GRU on cuDNN, with fusedrnn's backend "cuda" in turn where there is one.

    python bench/gpu/table.py ROWS.csv FACTS SECONDS

Every row is written as soon as it is measured, and a row that the file already has is not measured
again. FACTS has lines `key: value` that go into each row. Exits with 1 if the time ended before
the list of rows did, or if a row holds an error.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
import report
from shapes import GPU, Shape
from workload import Workload

import fusedrnn

# Storage, and the rounding of what the products are taken of.
DTYPES = {
    "bf16": (torch.bfloat16, 2.0**-8),
    "fp16": (torch.float16, 2.0**-11),
    "tf32": (torch.float32, 2.0**-11),
    "fp32": (torch.float32, 0.0),
}
MODES = ("fwd", "train")
SECONDS_A_ROW = 0.4
KEYS = ("cell", "T", "B", "I", "H", "dtype", "mode")


def kernels(call: Callable[[], object]) -> str:
    """The kernels of a call by how often they run, the most frequent first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = Counter(
        event.name for event in profiler.events() if event.device_type.name == "CUDA"
    ).most_common(4)
    return "; ".join(f"{count}x {name[:100]}" for name, count in names)


def key(shape: Shape, dtype: str, mode: str) -> dict[str, str]:
    values = [getattr(shape, name) for name in KEYS[:5]]
    return dict(zip(KEYS, map(str, [*values, dtype, mode]), strict=True))


def figures(
    shape: Shape, dtype: str, mode: str, backend: str | None, device: str, sample: measure.Sampler
) -> dict[str, object]:
    """What is measured of a row: with no backend torch.nn against itself, without a ratio."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    work = Workload(shape, backend, device, *DTYPES[dtype])
    gate = work.gate() if backend else None
    if gate and not gate.holds:
        raise RuntimeError(f"not timed: {gate}")
    for module in (work.theirs, work.ours):
        module.train(mode == "train")  # in training cuDNN keeps what backward needs
    theirs = work.call(work.theirs, mode)
    ours = work.call(work.ours, mode) if backend else theirs
    timing = measure.compare(ours, theirs, SECONDS_A_ROW, sample)
    return {
        **timing.theirs.columns("torch_p{}_ms", 20, 1e3),
        **(timing.ours.columns("ours_p{}_ms", 20, 1e3) if backend else {}),
        **(timing.ratio.columns("ratio_p{}", 10) if backend else {}),
        "tflops": shape.flops(work.rows, mode) / timing.theirs.mid / 1e12,
        "pairs": timing.pairs,
        "error_torch": gate.theirs if gate else "",
        "error_ours": gate.ours if gate else "",
        "torch_kernels": kernels(theirs) if device == "cuda" else "",
    }


COLUMNS = (
    *KEYS,
    *(f"{side}_p{p}_ms" for side in ("torch", "ours") for p in (20, 50, 80)),
    *(f"ratio_p{p}" for p in (10, 50, 90)),
    *("tflops", "pairs", "error_torch", "error_ours", "torch_kernels", "error"),
)


def main(
    path: Path,
    facts: dict[str, str],
    seconds: float,
    shapes: tuple[Shape, ...] = GPU,
    device: str = "cuda",
) -> int:
    end = time.monotonic() + seconds
    backend = "cuda" if "cuda" in fusedrnn.list_backends() else None
    sample = measure.DeviceTimer() if device == "cuda" else measure.sample
    rows: list[dict[str, object]] = []
    if path.exists():
        rows += [row for row in report.read_csv(path) if not row["error"]]
    done = [{name: row[name] for name in KEYS} for row in rows]
    cases = list(itertools.product(shapes, DTYPES, MODES))
    todo = [case for case in cases if key(*case) not in done]
    for count, case in enumerate(todo):
        if time.monotonic() > end:
            print(f"{len(todo) - count} of {len(cases)} rows are left: run this again")
            return 1
        try:
            found = figures(*case, backend, device, sample)
        except RuntimeError as error:  # of this row; the others go on
            found = {"error": str(error).splitlines()[0]}
        rows.append(dict.fromkeys(COLUMNS, "") | key(*case) | found | facts)
        report.write_csv(path, rows)
        print(*key(*case).values(), found.get("torch_p50_ms"), found.get("error", ""), flush=True)
    wrong = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows)} rows, {wrong} with an error")
    return int(wrong > 0)


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text().splitlines()
    pairs = dict(line.split(": ", 1) for line in lines)
    sys.exit(main(Path(sys.argv[1]), pairs, float(sys.argv[3])))
