"""How times are taken: in interleaved pairs, preempted ones marked, beside the machine's peak."""

from __future__ import annotations

import datetime
import gc
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fusedrnn

ROOT = Path(__file__).resolve().parent.parent
MIN_PAIRS = 6
MAX_PAIRS = 200


@dataclass(frozen=True)
class Spread:
    """Three percentiles of one quantity."""

    low: float
    mid: float
    high: float

    def columns(self, name: str, tail: int, scale: float = 1.0) -> dict[str, float]:
        """The three as columns: `ratio_p{}` with tail 10 gives ratio_p10, ratio_p50, ratio_p90."""
        values = {tail: self.low, 50: self.mid, 100 - tail: self.high}
        return {name.format(p): scale * value for p, value in values.items()}


def spread(values: list[float], tail: int) -> Spread:
    """The percentiles `tail`, 50 and 100 - `tail`."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return Spread(cuts[tail - 1], cuts[49], cuts[99 - tail])


@dataclass(frozen=True)
class Timing:
    """Seconds a call of both sides and the paired ratio theirs / ours, over the `pairs` kept.

    `clean`: none of them was preempted; else too few others were left to drop those.
    """

    ours: Spread
    theirs: Spread
    ratio: Spread
    pairs: int
    clean: bool
    dropped: int


def sample(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of one call, and whether no thread of this process was preempted meanwhile."""
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches


class DeviceTimer:
    """`sample` for calls that run on the GPU: seconds between events around the call.

    What the call reads is first driven out of the L2 cache, and the call is given to the device
    while that still runs, so that only a call the host cannot keep up with shows the host's time.
    """

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties("cuda").L2_cache_size
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], object]) -> tuple[float, bool]:
        start, end = self._events
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, True


Sampler = Callable[[Callable[[], object]], tuple[float, bool]]


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    budget: float,
    sample: Sampler = sample,
) -> Timing:
    """Times both sides in pairs for `budget` seconds, or up to thrice that to reach MIN_PAIRS.

    The order turns round in every pair (A B, B A, ...), so that neither side always inherits the
    other's caches. Pairs with a preempted sample are dropped where at least MIN_PAIRS others
    remain, else all are kept.
    """
    start = time.perf_counter()
    for call in (theirs, ours):
        call()
        call()
    pairs: list[tuple[float, float, bool]] = []
    gc.collect()
    gc.disable()
    try:
        while len(pairs) < MAX_PAIRS:
            spent = time.perf_counter() - start
            if spent > budget and (
                len(pairs) >= MIN_PAIRS or (spent > 3 * budget and len(pairs) > 1)
            ):
                break
            first, second = (theirs, ours) if len(pairs) % 2 else (ours, theirs)
            (a, a_clean), (b, b_clean) = sample(first), sample(second)
            pairs.append(
                (a, b, a_clean and b_clean) if first is ours else (b, a, a_clean and b_clean)
            )
    finally:
        gc.enable()
    undisturbed = [pair for pair in pairs if pair[2]]
    clean = len(undisturbed) >= MIN_PAIRS
    kept = undisturbed if clean else pairs
    return Timing(
        ours=spread([pair[0] for pair in kept], 20),
        theirs=spread([pair[1] for pair in kept], 20),
        ratio=spread([pair[1] / pair[0] for pair in kept], 10),
        pairs=len(kept),
        clean=clean,
        dropped=len(pairs) - len(kept),
    )


class Peak:
    """The best rate of float32 torch.mm in this run, probed before every row: machines drift."""

    SIZES = (512, 1024, 2048)

    def __init__(self) -> None:
        self.gflops = 0.0
        self.size = 0
        self._matrices = {
            n: (torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)) for n in self.SIZES
        }
        for _ in range(3):
            self.probe()

    def probe(self) -> None:
        for n, (a, b, out) in self._matrices.items():
            for _ in range(max(2, (1024 // n) ** 3)):
                seconds, _ = sample(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
                if 2e-9 * n**3 / seconds > self.gflops:
                    self.gflops, self.size = 2e-9 * n**3 / seconds, n

    def __str__(self) -> str:
        return f"{self.gflops:.0f} GFLOP/s (best float32 torch.mm of this run, n={self.size})"


def cpu_model() -> str:
    """The processor's own name, as the kernel tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """Git's answer about this checkout, or None where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """What a reader needs to place a figure: machine, versions, commit.

    A tree is dirty when a tracked file is changed, but for the results and the README's table.
    """
    changed = git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        ":!/bench/results",
        ":!/README.md",
    )
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fusedrnn": fusedrnn.__version__,
        "commit": git("rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": "unknown" if changed is None else str(int(bool(changed))),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
