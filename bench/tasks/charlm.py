"""`make demo`: a character language model, trained with torch.nn.LSTM and with fusedrnn.LSTM.

The text is the source of this machine's own Python standard library. Both models start from the
same weights, see the same batches and take turns step by step, so that a busy machine slows both.
Then a third model, torch.nn.LSTM on another number of threads, tells how far two correct trainings
drift apart; the command fails if fusedrnn drifts further from torch.nn than that allows.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedrnn

TIME, BATCH, EMBEDDING, HIDDEN, LAYERS = 100, 32, 128, 256, 2
CHARACTERS = 4_000_000
RATE = 5e-3
WARM_UP = 3
# Two correct trainings are two draws of the same rounding noise, of which the largest so far
# differed by up to 4 at one step (3 draws, 120 steps). A forget gate's weights off by 0.1 % at the
# start, in one layer, departs by more than 10 draws from step 24 on.
DRIFT = 10.0
# The witness may stop early on a slow machine: after that many seconds in all, not before its
# first WITNESS steps.
SECONDS, WITNESS = 160, 40
# Third parties', test data, and tables of code points: not the prose of a programmer.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}


def corpus(size: int) -> str:
    """The first `size` ASCII characters of the standard library's source, files in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    text: list[str] = []
    found = 0
    for path in sorted(root.rglob("*.py")):
        if found < size and not SKIPPED & set(path.relative_to(root).parts):
            text.append(path.read_bytes().decode("ascii", "ignore"))
            found += len(text[-1])
    if found < size:
        raise FileNotFoundError(f"{root} holds {found} characters of source, expected {size}")
    return "".join(text)[:size]


class Text:
    """The corpus as BATCH streams of character numbers [length, BATCH], read TIME steps at once."""

    def __init__(self, text: str) -> None:
        codes = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)
        present, numbers = codes.unique(return_inverse=True)
        self.characters = [chr(code) for code in present.tolist()]
        self.number = {character: i for i, character in enumerate(self.characters)}
        length = len(numbers) // BATCH
        self.streams = numbers[: length * BATCH].view(BATCH, length).t().contiguous()
        share = torch.bincount(numbers).double() / len(numbers)
        self.entropy = -(share * share.log()).sum().item()

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` pairs of input and target [TIME, BATCH], in order."""
        for start in range(0, steps * TIME, TIME):
            window = self.streams[start : start + TIME + 1]
            yield window[:-1], window[1:]


class Model(nn.Module):
    """Embedding, two-layer LSTM of the given class, linear."""

    def __init__(self, lstm: type[nn.Module], characters: int, **arguments: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.lstm = lstm(EMBEDDING, HIDDEN, LAYERS, **arguments)
        self.linear = nn.Linear(HIDDEN, characters)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, object]:
        y, state = self.lstm(self.embedding(x), state)
        return self.linear(y), state


class Training:
    """One model with its optimizer, carried state and record."""

    def __init__(self, lstm: type[nn.Module], characters: int, **arguments: object) -> None:
        torch.manual_seed(0)
        self.model = Model(lstm, characters, **arguments)
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE)
        self.state: tuple[Tensor, Tensor] | None = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: Tensor, target: Tensor) -> None:
        """One step of truncated backpropagation through time."""
        start = time.perf_counter()
        logits, state = self.model(x, self.state)
        self.state = tuple(tensor.detach() for tensor in state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def warm(self) -> list[float]:
        """Seconds of each step but the first few."""
        return self.seconds[min(WARM_UP, len(self.seconds) - 2) :]


class Progress:
    """A bar on a terminal; a line every quarter elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = time.perf_counter()
        self.terminal = sys.stdout.isatty()

    def say(self, text: str) -> None:
        """A line above the bar."""
        print(f"\r\x1b[K{text}" if self.terminal else text, flush=True)

    def advance(self) -> None:
        self.done += 1
        filled = 30 * self.done // self.total
        left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
        state = f"{self.done}/{self.total}, {left:.0f} s left"
        if self.terminal:
            bar = "#" * filled + "-" * (30 - filled)
            print(f"\r\x1b[K{self.title} [{bar}] {state}", end="", flush=True)
            if self.done == self.total:
                print("\r\x1b[K", end="", flush=True)
        elif self.done < self.total and self.done % math.ceil(self.total / 4) == 0:
            print(f"{self.title}: {state}", flush=True)


def side_by_side(theirs: Training, ours: Training, text: Text, steps: int) -> None:
    """Trains both in turns, the first one changing at every step, and prints both curves."""
    progress = Progress("training both", steps)
    progress.say(
        f"{'step':>5}  {'torch.nn loss':>13}  {'fusedrnn loss':>13}  {'difference':>10}"
        f"  {'torch.nn ms':>11}  {'fusedrnn ms':>11}"
    )
    for i, (x, target) in enumerate(text.batches(steps)):
        for training in (theirs, ours) if i % 2 else (ours, theirs):
            training.step(x, target)
        if i % 10 == 0 or i == steps - 1:
            a, b = theirs.losses[-1], ours.losses[-1]
            times = (1e3 * statistics.median(run.seconds[-10:]) for run in (theirs, ours))
            ms = "  ".join(f"{value:>11.0f}" for value in times)
            progress.say(f"{i:>5}  {a:>13.4f}  {b:>13.4f}  {b - a:>+10.1e}  {ms}")
        progress.advance()


def rounded_again(model: nn.Module, generator: torch.Generator) -> None:
    """Moves every LSTM weight to a neighbouring float32, up or down by chance."""
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            weight.copy_(torch.nextafter(weight, torch.where(up, math.inf, -math.inf)))


def witness(text: Text, steps: int, threads: int, deadline: float) -> Training:
    """torch.nn.LSTM once more, rounding differently: the measure of how far it departs from itself.

    It runs on another number of threads. Where that changes no bit (the order of sums may not
    depend on it), it would measure nothing; so its weights also move by one rounding before each
    step, the least any arithmetic in another order does to them.
    """
    training = Training(nn.LSTM, len(text.characters))
    generator = torch.Generator().manual_seed(1)
    progress = Progress(f"torch.nn on {threads} thread{'s' if threads > 1 else ''}", steps)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x, target in text.batches(steps):
            rounded_again(training.model.lstm, generator)
            training.step(x, target)
            progress.advance()
            if time.perf_counter() > deadline and len(training.losses) >= WITNESS:
                progress.say(f"enough after {len(training.losses)} steps, this machine is slow")
                break
    finally:
        torch.set_num_threads(before)
    return training


def departures(a: list[float], b: list[float]) -> list[float]:
    """For every step the largest difference of two curves so far: drift grows, it is not undone."""
    largest, out = 0.0, []
    for left, right in zip(a, b, strict=True):
        # NaN compares false; a curve that went there has departed for good.
        largest = max(largest, abs(left - right) if abs(left - right) < math.inf else math.inf)
        out.append(largest)
    return out


def agreement(theirs: Training, ours: Training, other: Training) -> tuple[bool, str]:
    """Whether ours stays as near to torch.nn as torch.nn does to itself, and a sentence on it.

    Allowed after s steps: DRIFT times what torch.nn departed from itself until s, plus the rounding
    of the loss itself, a float32 mean of TIME * BATCH terms added in pairs: the first steps depart
    by less than the loss can show.
    """
    steps = len(other.losses)
    itself = departures(theirs.losses[:steps], other.losses)
    mine = departures(theirs.losses[:steps], ours.losses[:steps])
    unit = torch.finfo(torch.float32).eps * math.ceil(math.log2(TIME * BATCH)) * max(theirs.losses)
    share = [value / (DRIFT * own + unit) for value, own in zip(mine, itself, strict=True)]
    worst = max(range(steps), key=share.__getitem__)
    holds = share[worst] <= 1
    text = (
        f"over {steps} steps the curves depart by {mine[-1]:.1e}, torch.nn from itself by "
        f"{itself[-1]:.1e}; at step {worst}, the worst, fusedrnn departs by "
        f"{mine[worst]:.1e} of {mine[worst] / share[worst] if share[worst] else 0:.1e} allowed "
        f"({DRIFT:.0f} times {itself[worst]:.1e}, plus {unit:.1e} for the rounding of the loss)"
    )
    return holds, text


def speed(theirs: Training, ours: Training) -> str:
    """Time per step, characters per second and the paired ratio, warm-up left out."""
    sides = {"torch.nn": theirs.warm, "fusedrnn": ours.warm}
    lines = []
    for name, seconds in sides.items():
        cuts = statistics.quantiles(seconds, n=5, method="inclusive")
        middle = statistics.median(seconds)
        lines.append(
            f"{name}: {1e3 * middle:.0f} ms per step "
            f"[p20-p80 {1e3 * cuts[0]:.0f}-{1e3 * cuts[3]:.0f}], "
            f"{TIME * BATCH / middle:,.0f} characters/s"
        )
    ratios = [a / b for a, b in zip(*sides.values(), strict=True)]
    cuts = statistics.quantiles(ratios, n=10, method="inclusive")
    lines.append(
        f"speed ratio, whole training step: {statistics.median(ratios):.2f} "
        f"[p10-p90 {cuts[0]:.2f}-{cuts[8]:.2f}], the median of {len(ratios)} pairs of steps"
    )
    return "\n".join(lines)


@torch.no_grad()
def write(model: Model, text: Text, prompt: str, length: int, temperature: float = 0.6) -> str:
    """What the model writes after `prompt`, one character a call with the state carried."""
    generator = torch.Generator().manual_seed(0)
    written, state = prompt, None
    x = torch.tensor([[text.number[character]] for character in prompt])
    for _ in range(length):
        logits, state = model(x, state)
        x = torch.multinomial((logits[-1] / temperature).softmax(-1), 1, generator=generator)
        written += text.characters[int(x)]
    return written


def plot(theirs: Training, ours: Training, text: Text, path: Path) -> None:
    """Both loss curves and the time of every step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(theirs.losses, color="#c0392b", linewidth=3, alpha=0.45, label="torch.nn.LSTM")
    left.plot(ours.losses, color="#1f4e79", linewidth=1.2, label="fusedrnn.LSTM")
    left.axhline(
        text.entropy, color="#777777", linestyle="--", linewidth=1, label="unigram entropy"
    )
    left.set(xlabel="training step", ylabel="loss (nats per character)", title="Same curve")
    for training, colour, name in ((theirs, "#c0392b", "torch.nn"), (ours, "#1f4e79", "fusedrnn")):
        ms = [1e3 * seconds for seconds in training.warm]
        middle = statistics.median(ms)
        steps = range(len(training.seconds) - len(ms), len(training.seconds))
        right.plot(steps, ms, ".", color=colour, markersize=4, alpha=0.6)
        right.axhline(middle, color=colour, label=f"{name}.LSTM, median {middle:.0f} ms")
    # A preempted step can take seconds; the axis keeps to what is typical of the slower side.
    every = sorted(theirs.warm + ours.warm)
    right.set_ylim(0, 1.6e3 * every[int(0.9 * len(every))])
    right.set(xlabel="training step", ylabel="time per step (ms)", title="Time")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="training steps (%(default)s)")
    parser.add_argument("--backend", help="a backend by name (default: fusedrnn's own choice)")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"got --steps {options.steps}, expected at least 2")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.perf_counter()
    text = Text(corpus(CHARACTERS))
    characters, threads = len(text.characters), torch.get_num_threads()
    theirs = Training(nn.LSTM, characters)
    ours = Training(fusedrnn.LSTM, characters, backend=options.backend)
    pairs = zip(theirs.model.state_dict().items(), ours.model.state_dict().items(), strict=True)
    if not all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs):
        print("demo: the same seed gave fusedrnn.LSTM other weights than torch.nn.LSTM")
        return 1
    print(
        f"character model on Python's standard library: {CHARACTERS / 1e6:.0f} M characters, "
        f"{characters} different ones, unigram entropy {text.entropy:.3f} nats\n"
        f"B={BATCH} T={TIME} embedding {EMBEDDING}, LSTM {LAYERS} x {HIDDEN}, Adam {RATE}, "
        f"threads: {threads}, torch {torch.__version__}, fusedrnn {fusedrnn.__version__}\n"
    )
    side_by_side(theirs, ours, text, options.steps)
    other = witness(text, options.steps, 1 if threads > 1 else 2, begin + SECONDS)
    last = ours.losses[-10:]
    print(f"\n{speed(theirs, ours)}")
    print(
        f"loss of fusedrnn: {ours.losses[0]:.3f} at the start, {statistics.mean(last):.3f} over "
        f"the last {len(last)} steps; guessing by frequency alone: {text.entropy:.3f}"
    )
    print(f"\nfusedrnn writes:\n{write(ours.model, text, 'def ', 400)}\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib (pip install matplotlib)")
    else:
        plot(theirs, ours, text, options.plot)
        print(f"plot: {options.plot}")
    holds, sentence = agreement(theirs, ours, other)
    print(f"{'agree' if holds else 'FAILED: fusedrnn departs from torch.nn'}: {sentence}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
