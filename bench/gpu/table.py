"""torch.nn.LSTM and GRU on cuDNN, with fusedrnn in turn where a BACKEND is named.

    python bench/gpu/table.py times ROWS.csv FACTS SECONDS BACKEND
    python bench/gpu/table.py kernels ROWS.csv FACTS SECONDS

`times` measures; `kernels` lists what torch.nn launches, which tells cuDNN's algorithm, in a
process of its own because a profiler slows later launches. Every row is written as soon as it is
known, and one that the file already has is not made again. FACTS has lines `key: value` that go
into each row. Exits with 1 if the time ended before the list of rows did, or if a row holds an
error.
"""

from __future__ import annotations

import functools
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

# Storage, and the rounding of what the products are taken of.
DTYPES = {
    "bf16": (torch.bfloat16, 2.0**-8),
    "fp16": (torch.float16, 2.0**-11),
    "tf32": (torch.float32, 2.0**-11),
    "fp32": (torch.float32, 0.0),
}
MODES = ("fwd", "train")
SECONDS_A_ROW = 0.4
KEYS = ("cell", "T", "B", "I", "H", "dirs", "dtype", "mode")
COLUMNS = {
    "times": (
        *(f"{side}_p{p}_ms" for side in ("torch", "ours") for p in (20, 50, 80)),
        *(f"ratio_p{p}" for p in (10, 50, 90)),
        *("torch_tflops", "pairs", "error_torch", "error_ours"),
    ),
    "kernels": ("torch_kernels",),
}
Values = dict[str, object]


def prepared(work: Workload, module: torch.nn.Module, mode: str) -> Callable[[], object]:
    """The call of a row. In training mode cuDNN keeps what backward needs, with or without one."""
    module.train(mode == "train")
    return work.call(module, mode)


def workload(shape: Shape, dtype: str, backend: str | None, device: str) -> Workload:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    return Workload(shape, backend, device, *DTYPES[dtype])


def times(
    shape: Shape, dtype: str, mode: str, backend: str | None, device: str, sample: measure.Sampler
) -> Values:
    """Both sides in turn; with no backend torch.nn against itself, and no ratio."""
    work = workload(shape, dtype, backend, device)
    gate = work.gate() if backend else None
    if gate and not gate.holds:
        raise RuntimeError(f"not timed: {gate}")
    theirs = prepared(work, work.theirs, mode)
    ours = prepared(work, work.ours, mode) if backend else theirs
    timing = measure.compare(ours, theirs, SECONDS_A_ROW, sample)
    found: Values = {
        **timing.theirs.columns("torch_p{}_ms", 20, 1e3),
        "torch_tflops": shape.flops(work.rows, mode) / timing.theirs.mid / 1e12,
        "pairs": timing.pairs,
    }
    if gate:
        found |= timing.ours.columns("ours_p{}_ms", 20, 1e3)
        found |= timing.ratio.columns("ratio_p{}", 10)
        found |= {"error_torch": gate.theirs, "error_ours": gate.ours}
    return found


def kernels(shape: Shape, dtype: str, mode: str) -> Values:
    """What a call launches most often, the most frequent first."""
    work = workload(shape, dtype, None, "cuda")
    call = prepared(work, work.theirs, mode)
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = Counter(
        event.name for event in profiler.events() if event.device_type.name == "CUDA"
    ).most_common(4)
    if not names:
        raise RuntimeError("the profiler saw no kernel")
    return {"torch_kernels": "; ".join(f"{count}x {name[:100]}" for name, count in names)}


def fill(
    path: Path,
    columns: tuple[str, ...],
    measured: Callable[[Shape, str, str], Values],
    facts: dict[str, str],
    seconds: float,
    shapes: tuple[Shape, ...] = GPU,
) -> int:
    """Adds the rows that the file lacks, in order, while there is time."""
    end = time.monotonic() + seconds
    rows: list[Values] = []
    if path.exists():
        rows += [row for row in report.read_csv(path) if not row["error"]]
    done = [tuple(row[name] for name in KEYS) for row in rows]
    cases = {
        (*(str(getattr(shape, name)) for name in KEYS[:6]), dtype, mode): (shape, dtype, mode)
        for shape, dtype, mode in itertools.product(shapes, DTYPES, MODES)
    }
    todo = [key for key in cases if key not in done]
    for count, key in enumerate(todo):
        if time.monotonic() > end:
            print(f"{len(todo) - count} of {len(cases)} rows are left: run this again")
            return 1
        try:
            found = measured(*cases[key])
        except RuntimeError as error:  # of this row; the others go on
            found = {"error": str(error).splitlines()[0]}
        row = dict.fromkeys((*KEYS, *columns, "error"), "") | dict(zip(KEYS, key, strict=True))
        rows.append(row | found | facts)
        report.write_csv(path, rows)
        print(*key, *found.values(), flush=True)
    wrong = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows)} rows, {wrong} with an error")
    return int(wrong > 0)


def main(what: str, path: str, facts: str, seconds: str, backend: str | None = None) -> int:
    measured: dict[str, Callable[[Shape, str, str], Values]] = {
        "times": functools.partial(
            times, backend=backend, device="cuda", sample=measure.DeviceTimer()
        ),
        "kernels": kernels,
    }
    pairs = dict(line.split(": ", 1) for line in Path(facts).read_text().splitlines())
    return fill(Path(path), COLUMNS[what], measured[what], pairs, float(seconds))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
