"""Existing models: torch.nn's layers become ours and back, or run on fusedrnn as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from fusedrnn.base import run_module
from fusedrnn.cell_modules import GRUCell, LSTMCell, RNNCell, step_module
from fusedrnn.modules import GRU, LSTM, RNN
from fusedrnn.regularisers import NO_RATES

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
M = TypeVar("M", bound=nn.Module)
# Attributes of ours; a layer that has other values of the first ones is none of torch.nn's.
VARIANTS = {
    "initial_state": "zeros",
    "peephole": False,
    "coupled_gates": False,
    "reset_after": True,
    "layer_norm": False,
    **NO_RATES._asdict(),
}
OWN = (*VARIANTS, "backend", "forget_bias", "recompute")


def _where(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def convert(model: M) -> M:
    """Turns every torch.nn.LSTM, GRU, RNN and cell in ``model`` into ours, in place.

    Parameters, hooks, optimizers and attributes stay as they are; only the class changes.
    Subclasses of torch.nn's layers are left alone.

    Returns:
        The same model.

    Raises:
        ValueError: a layer with an attribute that means something to ours; nothing is changed.

    Example:
        >>> import fusedrnn, torch
        >>> model = fusedrnn.convert(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
        >>> type(model[0])
        <class 'fusedrnn.modules.LSTM'>
    """
    for path, module in model.named_modules():
        for name in OWN if type(module) in PAIRS else ():
            if hasattr(module, name):
                raise ValueError(f"{_where(path, module)} has an attribute {name}, as ours have")
    for module in model.modules():
        ours = PAIRS.get(type(module))
        if ours is not None:
            module.__dict__.pop("_flat_weights", None)  # read by name, never cached
            module.__class__ = ours
    return model


def to_torch(model: M) -> M:
    """The way back of :func:`convert`, in place: for ONNX export, TorchScript, quantisation.

    ``Recurrent`` and ``ConvLSTM``, to which nothing of torch.nn corresponds, are left alone.

    Returns:
        The same model.

    Raises:
        ValueError: a layer of a kind that torch.nn has not; nothing is changed.

    Example:
        >>> import fusedrnn, torch
        >>> model = fusedrnn.to_torch(torch.nn.Sequential(fusedrnn.GRU(3, 4)))
        >>> type(model[0])
        <class 'torch.nn.modules.rnn.GRU'>
    """
    theirs = {ours: torch_class for torch_class, ours in PAIRS.items()}
    for path, module in model.named_modules():
        for name, plain in VARIANTS.items() if type(module) in theirs else ():
            value = getattr(module, name, plain)
            if value != plain:
                where = _where(path, module)
                raise ValueError(f"{where} has {name}={value!r}, which torch.nn has not")
    for module in model.modules():
        torch_class = theirs.get(type(module))
        if torch_class is not None:
            for name in ("backend", "_forget_bias", "recompute"):
                module.__dict__.pop(name, None)
            module.__class__ = torch_class
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return model


class Patched:
    """Yielded by :func:`patch`; ``calls`` counts the calls by kind, e.g. ``{"LSTM": 3}``."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def layer(self, kind: str) -> Callable[..., Any]:
        def forward(self_: nn.RNNBase, input: Any, hx: Any = None) -> Any:
            self.calls[kind] += 1
            return run_module(self_, input, hx)

        return forward

    def cell(self, kind: str) -> Callable[..., Any]:
        def forward(self_: RNNCellBase, input: torch.Tensor, hx: Any = None) -> Any:
            self.calls[kind] += 1
            new = step_module(self_, input, hx)
            return new if len(new) > 1 else new[0]

        return forward


@contextmanager
def patch() -> Iterator[Patched]:
    """While open, torch.nn's own LSTM, GRU, RNN and cells run on fusedrnn, process-wide.

    It replaces their ``forward`` methods, so existing modules, subclasses that call
    ``super().forward``, and ``isinstance`` checks keep working, and lets torch.compile trace
    them. Everything it set is restored when it closes.

    Yields:
        A :class:`Patched` whose ``calls`` counts the calls by kind.

    Example:
        >>> import fusedrnn, torch
        >>> with fusedrnn.patch() as patched:
        ...     y, state = torch.nn.LSTM(3, 4)(torch.randn(5, 2, 3))
        >>> patched.calls["LSTM"]
        1
    """
    import torch._dynamo

    patched = Patched()
    classes = list(PAIRS)
    before = [cls.__dict__["forward"] for cls in classes]
    try:
        for cls in classes:
            layer = issubclass(cls, nn.RNNBase)
            name = cls.__name__
            cls.forward = patched.layer(name) if layer else patched.cell(name)
        with torch._dynamo.config.patch(allow_rnn=True):
            yield patched
    finally:
        for cls, forward in zip(classes, before, strict=True):
            cls.forward = forward
