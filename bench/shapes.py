"""The named workloads, in the letters T time, B batch, I input, H hidden."""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class Shape:
    """One workload. With `calls` > 1 a sample is that many calls, each fed the last one's state."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    dirs: int = 1
    proj: int = 0
    packed: bool = False
    calls: int = 1
    modes: tuple[str, ...] = ("fwd", "train")
    default: bool = False

    @property
    def name(self) -> str:
        parts = [self.cell, f"t{self.T}", f"b{self.B}"]
        parts += [f"h{self.H}"] if self.I == self.H else [f"i{self.I}", f"h{self.H}"]
        stack = f"{self.layers}x{'bi' if self.dirs == 2 else 'uni'}"
        parts += [stack] if self.layers * self.dirs > 1 else []
        parts += [f"proj{self.proj}"] if self.proj else []
        parts += ["packed"] if self.packed else []
        parts += ["stepping"] if self.calls > 1 else []
        return "-".join(parts)

    def flops(self, rows: int, mode: str) -> float:
        """Twice the multiply-adds of the matrix products over `rows` (T*B, or the sum of lengths).

        Training counts three times the forward: itself, the gradients of inputs and of weights.
        """
        out = self.proj or self.H
        macs = 0
        for layer in range(self.layers):
            width = self.I if layer == 0 else self.dirs * out
            macs += self.dirs * (GATES[self.cell] * self.H * (width + out) + self.proj * self.H)
        return 2.0 * macs * rows * self.calls * (3 if mode == "train" else 1)


ALL = (
    # The project's bar: never slower than torch.nn on the LSTMs, 3x on the GRU's training.
    Shape("lstm", 100, 1, 128, 128, default=True),
    Shape("lstm", 100, 32, 128, 128, default=True),
    Shape("lstm", 100, 32, 512, 512, default=True),
    Shape("gru", 100, 8, 64, 64, default=True),
    # Small batches and long sequences, wide batches, odd widths, weights larger than a cache.
    Shape("lstm", 1000, 1, 64, 64, default=True),
    Shape("lstm", 500, 1, 256, 256, default=True),
    Shape("lstm", 64, 256, 64, 64, default=True),
    Shape("lstm", 35, 20, 650, 650, default=True),
    Shape("lstm", 100, 1, 512, 512),
    Shape("lstm", 100, 128, 256, 256),
    Shape("lstm", 50, 32, 1024, 1024),
    # What real models are built of: stacks, both directions, projections, padding.
    Shape("lstm", 100, 32, 128, 256, layers=2),
    Shape("lstm", 100, 16, 128, 128, layers=2, dirs=2, default=True),
    Shape("lstm", 100, 16, 256, 256, proj=128, default=True),
    Shape("lstm", 100, 32, 128, 128, packed=True, default=True),
    Shape("lstm", 100, 32, 256, 256, layers=2, dirs=2, packed=True),
    # Streaming: one step a call, the state carried by the caller.
    Shape("lstm", 1, 1, 128, 128, calls=50, modes=("fwd",), default=True),
    Shape("gru", 1, 1, 128, 128, calls=50, modes=("fwd",), default=True),
    Shape("lstm", 1, 32, 512, 512, calls=10, modes=("fwd",)),
    Shape("gru", 100, 1, 128, 128),
    Shape("gru", 100, 32, 256, 256, default=True),
    Shape("gru", 100, 32, 512, 512),
    Shape("gru", 100, 16, 128, 128, layers=2, dirs=2),
    Shape("gru", 100, 32, 128, 128, packed=True),
    Shape("rnn", 100, 1, 128, 128),
    Shape("rnn", 100, 32, 128, 128, default=True),
    Shape("rnn", 100, 32, 512, 512),
    Shape("rnn", 1000, 1, 64, 64),
)
# For a GPU, the most telling first: where cuDNN's persistent kernels have published times or should
# end, both directions, then the grid of sizes. Every size as an LSTM and a GRU.
_GPU_SIZES = (
    (1024, 16, 768, 1),
    (512, 32, 256, 1),
    (512, 64, 512, 1),
    (512, 16, 1024, 1),
    (512, 1, 256, 1),
    (512, 128, 1024, 1),
    (1024, 64, 2048, 1),
    *((512, b, h, 2) for b, h in ((32, 256), (32, 512), (8, 768))),
    *((512, b, h, 1) for h in (512, 128, 1024, 2048, 256, 64) for b in (1, 8, 32, 128)),
)
GPU = tuple(
    Shape(cell, t, b, h, h, dirs=dirs)
    for t, b, h, dirs in dict.fromkeys(_GPU_SIZES)
    for cell in ("lstm", "gru")
)
BY_NAME = {shape.name: shape for shape in ALL}
assert len(BY_NAME) == len(ALL), "two workloads share a name"


def choose(names: list[str] | None, cell: str | None, full: bool) -> list[Shape]:
    """The named shapes, else the default set (every shape with `full`), all or one cell's."""
    unknown = [name for name in names or [] if name not in BY_NAME]
    if unknown:
        raise ValueError(f"no shape {unknown[0]!r}; --list names all of them")
    chosen = [BY_NAME[name] for name in names] if names else [s for s in ALL if full or s.default]
    return [shape for shape in chosen if cell in (None, shape.cell)]
