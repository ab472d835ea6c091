"""How gradients fare on their way back through time, and a regulariser that keeps them alive.

Both run a layer on the backend "reference", whatever its own is, and cost accordingly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedrnn.backends import Call, Sequence, reference
from fusedrnn.backends.reference import States
from fusedrnn.convert import patch
from fusedrnn.recurrent import Recurrent


@dataclass(frozen=True)
class GradientFlow:
    """Norms over batch and units, per layer, direction and step."""

    h: Tensor  # [L,D,T] of dL/dh_t
    c: Tensor | None  # [L,D,T] of dL/dc_t, the last state; None: h is the only one

    def plot(self, path: str | Path) -> None:
        """Writes a figure, a line for each state, layer and direction; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axes = figure.subplots()
        for letter, norms in (("h", self.h), ("c", self.c)):
            for k, layer in enumerate(norms if norms is not None else ()):
                for direction, line in zip(("", " reverse"), layer, strict=False):
                    style = "-" if letter == "h" else "--"
                    axes.plot(line.cpu().numpy(), style, label=f"{letter}, layer {k}{direction}")
        axes.set(xlabel="t", ylabel="norm of the gradient", yscale="log")
        axes.legend()
        figure.savefig(path)


def gradient_flow(
    module: nn.Module, x: Tensor, loss: Callable[[Any], Tensor], hx: Any = None
) -> GradientFlow:
    """The norm of the gradient of a loss with respect to the states of every layer at every step,
    by all ways, through time included: where it vanishes or explodes, it shows.

    Args:
        module: a layer of fusedrnn or torch.nn, or a :class:`fusedrnn.Recurrent`.
        x: ``[T,B,I]``; ``[B,T,I]`` with batch_first; a PackedSequence.
        loss: makes a scalar of what ``module(x, hx)`` returns.
        hx: as for the module.

    Returns:
        A :class:`GradientFlow` of tensors ``[L,D,T]``.

    Raises:
        TypeError: ``module`` is no recurrent layer.
        ValueError: the loss is no scalar, or does not depend on the layer.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.LSTM(3, 4, num_layers=2)
        >>> flow = fusedrnn.diagnostics.gradient_flow(
        ...     layer, torch.randn(10, 2, 3), lambda out: out[0][-1].sum())
        >>> flow.h.shape, flow.c.shape
        (torch.Size([2, 1, 10]), torch.Size([2, 1, 10]))
    """
    grads = [g for _, _, g in _gradients(module, x, loss, hx)]
    directions = 2 if getattr(module, "bidirectional", False) else 1

    def norms(state: int) -> Tensor:
        rows = [torch.stack([g[state].norm() for g in of_run]) for of_run in grads]
        out: Tensor = torch.stack(rows).unflatten(0, (-1, directions))
        return out

    return GradientFlow(norms(0), norms(-1) if len(grads[0][0]) > 1 else None)


def omega(module: nn.Module, x: Tensor, loss: Callable[[Any], Tensor], hx: Any = None) -> Tensor:
    """The regulariser of Pascanu, Mikolov & Bengio (2013) against vanishing gradients: add a
    multiple of it to the loss.

    With s_k the states of a layer together and E the loss, it is the sum over layers, directions
    and steps of ``(|dE/ds_{k+1} ds_{k+1}/ds_k| / |dE/ds_{k+1}| - 1)^2``, and the mean over the
    batch; steps that no gradient reaches do not count. As in the paper it is differentiable by way
    of ``ds_{k+1}/ds_k`` alone: states and their gradients are constants.

    Args and errors: as :func:`gradient_flow`, but x is a tensor.

    Returns:
        A scalar with a graph to the module's parameters.

    Example:
        >>> import fusedrnn, torch
        >>> layer, x = fusedrnn.RNN(3, 4), torch.randn(10, 2, 3)
        >>> last = lambda out: out[0][-1].square().sum()
        >>> (last(layer(x)) + 0.1 * fusedrnn.diagnostics.omega(layer, x, last)).backward()
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"omega takes a padded tensor, got {type(x).__name__}")
    total = x.new_zeros(())
    for call, states, grads in _gradients(module, x, loss, hx):
        steps, rows = len(states), call.h0.shape[0]
        if steps < 2:
            continue
        # All steps but the one from the initial state, as rows of a single one.
        before, after = slice(None, -1), slice(1, None)
        if call.reverse:
            before, after = after, before

        def flat(parts: States, index: slice) -> list[Tensor]:
            return [torch.cat(of_steps) for of_steps in zip(*parts[index], strict=True)]

        h0, *others = (s.detach().to(x.dtype).requires_grad_() for s in flat(states, before))
        c0 = torch.stack(others) if others else None
        step = call._replace(
            x=call.x.detach()[after].flatten(0, 1).unsqueeze(0), h0=h0, c0=c0, seq=Sequence(),
            reverse=False, cell_states=False, noise=call.noise.of_rows(after, steps - 1),
        )  # fmt: skip
        upstream = [g.to(x.dtype) for g in flat(grads, after)]
        with torch.enable_grad():
            _, h_n, *c_n = reference.recurrence(step)
            new = [h_n, *(s for c in c_n for s in c.unbind(0))]
            found = torch.autograd.grad(new, [h0, *others], upstream, create_graph=True)
        passed, given = (
            sum((g.square().flatten(1).sum(1) for g in parts), x.new_zeros(()))
            for parts in (found, upstream)
        )
        reached = given != 0
        counts = reached & (passed != 0)  # where not, the ratio is 0, and its gradient not there
        ratio = (passed[counts] / given[counts]).sqrt()
        missed = reached.sum() - counts.sum()
        total = total + ((ratio - 1).square().sum() + missed) / max(rows, 1)
    return total


def _gradients(
    module: nn.Module, x: Any, loss: Callable[[Any], Tensor], hx: Any
) -> list[tuple[Call, States, States]]:
    """Each layer and direction: its call, its states, and the gradients of the loss to them."""
    if not isinstance(module, nn.RNNBase | Recurrent):
        raise TypeError(f"expected a recurrent layer, got {type(module).__name__}")
    theirs = isinstance(module, nn.LSTM | nn.GRU | nn.RNN)
    with torch.enable_grad():
        if isinstance(x, Tensor):  # a graph for all states, even if no parameter has one
            x = x.detach().requires_grad_()
        with reference.watched() as runs, patch() if theirs else nullcontext():
            out = module(x, hx)
        value = loss(out)
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss should be a scalar with a graph, got {what}")
    every = [s for _, states in runs for state in states for s in state]
    found = torch.autograd.grad(value, every, allow_unused=True)
    pairs = zip(every, found, strict=True)
    given = iter([torch.zeros_like(s) if g is None else g for s, g in pairs])
    return [
        (call, states, [tuple(next(given) for _ in state) for state in states])
        for call, states in runs
    ]
