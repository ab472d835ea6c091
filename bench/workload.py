"""One shape made runnable: both modules on the same data, and the gate before any timing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import GATES, Shape
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Gate:
    """The largest error of any tensor against float64, relative to that tensor's largest value.

    `share` is our error in units of the bound where it comes nearest to it, or passes it; `where`
    names that tensor.
    """

    ours: float
    theirs: float
    share: float
    where: str

    @property
    def holds(self) -> bool:
        return self.share <= 1.0  # false for NaN too

    def __str__(self) -> str:
        verdict = "within" if self.holds else "OUTSIDE"
        return (
            f"error against float64, relative to the largest value: fusedrnn {self.ours:.1e}, "
            f"torch.nn {self.theirs:.1e}; {verdict} the bound ({self.share:.2g} x, {self.where})"
        )


class Workload:
    """The tensors of one shape (fixed seed) and both modules with one state dict.

    `eps` is the relative rounding of the arithmetic's operands, 0 where sums round as much.
    """

    def __init__(
        self,
        shape: Shape,
        backend: str | None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        eps: float = 0.0,
    ) -> None:
        self.shape, self.dtype, self.eps = shape, dtype, eps
        generator = torch.Generator(device).manual_seed(0)
        arguments = {"num_layers": shape.layers, "bidirectional": shape.dirs == 2}
        arguments |= {"proj_size": shape.proj} if shape.proj else {}
        torch.manual_seed(0)
        self.theirs = getattr(torch.nn, CLASSES[shape.cell])(shape.I, shape.H, **arguments)
        self.ours = getattr(fusedrnn, CLASSES[shape.cell])(
            shape.I, shape.H, **arguments, backend=backend
        )
        self.ours.load_state_dict(self.theirs.state_dict())
        for module in (self.theirs, self.ours):
            module.to(device, dtype)
        self.theirs.flatten_parameters()  # for cuDNN
        self.precise = getattr(torch.nn, CLASSES[shape.cell])(shape.I, shape.H, **arguments).to(
            device, torch.float64
        )
        self.precise.load_state_dict(self.theirs.state_dict())

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, device=device).to(dtype)

        out, stack = shape.proj or shape.H, shape.layers * shape.dirs
        self.lengths = None
        self.rows = shape.T * shape.B
        if shape.packed:
            self.lengths = torch.randint(
                shape.T // 4, shape.T + 1, (shape.B,), generator=generator, device=device
            ).cpu()
            self.lengths[0] = shape.T
            self.rows = int(self.lengths.sum())
        self.x = normal(shape.T, shape.B, shape.I)
        states = [normal(stack, shape.B, out)]
        if shape.cell == "lstm":
            states.append(normal(stack, shape.B, shape.H))
        self.states = states
        y = (
            normal(self.rows, shape.dirs * out)
            if shape.packed
            else normal(shape.T, shape.B, shape.dirs * out)
        )
        self.upstream = [y, *(normal(*state.shape) for state in states)]

    def _pack(self, x: torch.Tensor) -> torch.Tensor | PackedSequence:
        return (
            x
            if self.lengths is None
            else pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        )

    def call(self, module: torch.nn.Module, mode: str) -> Callable[[], object]:
        """What is timed: a forward without grad, or one with the gradients of x and parameters."""
        hx = tuple(self.states) if len(self.states) > 1 else self.states[0]
        if mode == "fwd":
            x = self._pack(self.x)

            def forward() -> None:
                state = hx
                with torch.no_grad():
                    for _ in range(self.shape.calls):
                        _, state = module(x, state)

            return forward
        leaf = self.x.clone().requires_grad_()
        wanted = [leaf, *module.parameters()]

        def train() -> None:
            y, state = module(self._pack(leaf), hx)
            torch.autograd.grad(flat(y, state), wanted, self.upstream)

        return train

    def values(self, module: torch.nn.Module, dtype: torch.dtype) -> Values:
        """Outputs without grad, outputs with it, and the gradient of every input and parameter."""
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (self.x, *self.states)]
        x, hx = inputs[0], tuple(inputs[1:]) if len(inputs) > 2 else inputs[1]
        names, leaves = ["y", "h_n", "c_n"][: len(inputs)], ["x", "h0", "c0"][: len(inputs)]
        with torch.no_grad():
            plain = flat(*module(self._pack(x), hx))
        outputs = flat(*module(self._pack(x), hx))
        found = {f"{n} (no grad)": value for n, value in zip(names, plain, strict=True)}
        found |= {n: value.detach() for n, value in zip(names, outputs, strict=True)}
        parameters = dict(module.named_parameters())
        wanted = dict(zip(leaves, inputs, strict=True)) | parameters
        upstream = [tensor.to(dtype) for tensor in self.upstream]
        gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        return found | {f"d{name}": value for name, value in zip(wanted, gradients, strict=True)}

    def gate(self) -> Gate:
        """Compares outputs and every gradient of both with torch.nn in float64 on the same numbers.

        Bound of a tensor: twice torch.nn's own error plus 4 e max|exact|, where e is float32's eps
        times ceil(log2(G H T)), the rounding of a sum of G*H*T terms added in pairs, plus that of
        operands (torch.nn's error may be small by luck; the 4 leaves room for the few such sums in
        a row). It holds for the largest and the root-mean-square error.
        """
        exact = self.values(self.precise, torch.float64)
        ours, theirs = (
            self.values(self.ours, self.dtype),
            self.values(self.theirs, self.dtype),
        )
        terms = GATES[self.shape.cell] * self.shape.H * self.shape.T
        sums = torch.finfo(torch.float32).eps * math.ceil(math.log2(terms))
        relative = 4 * (sums + self.eps)
        shares: list[tuple[float, str]] = []
        errors: dict[str, list[float]] = {"ours": [], "theirs": []}
        for name, value in exact.items():
            scale = largest(value) + torch.finfo(torch.float64).tiny
            mine, its = ours[name].double() - value, theirs[name].double() - value
            errors["ours"].append(largest(mine) / scale)
            errors["theirs"].append(largest(its) / scale)
            for kind, norm in (("max", largest), ("rms", rms)):
                shares.append((norm(mine) / (2 * norm(its) + relative * scale), f"{name}, {kind}"))
        share, where = max(shares, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        return Gate(max(errors["ours"]), max(errors["theirs"]), share, where)


def flat(
    y: torch.Tensor | PackedSequence, state: torch.Tensor | tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """The output tensors of a call, in order."""
    first = y.data if isinstance(y, PackedSequence) else y
    return [first, *(state if isinstance(state, tuple) else [state])]


def largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()
