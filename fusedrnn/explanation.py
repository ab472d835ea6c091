"""What would run, and why: nothing is run to find out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import base, cell_modules
from fusedrnn.backends import Request, by_name, check_names, weigh
from fusedrnn.recurrent import Recurrent
from fusedrnn.regularisers import NO_RATES


@dataclass(frozen=True)
class Explanation:
    """The backend that would run, its algorithm, and why each one tried before it would not."""

    backend: str | None  # None: no backend of those asked for supports the call
    algorithm: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.algorithm}" if self.backend else "nothing would run"]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.reasons.items()])


def explain(module: nn.Module, x: Tensor | PackedSequence) -> Explanation:
    """Which backend would run ``module(x)`` here and now, and why the others would not.

    Another may run where more is asked for than that: lengths, resets, cell states, a trace.

    Args:
        module: a layer or cell of fusedrnn or torch.nn (which runs on fusedrnn under ``patch``).
        x: the input the module would get; only its shape, dtype and device are read, and
            whether it is packed.

    Returns:
        An :class:`Explanation`; its ``str`` is made for people.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.

    Example:
        >>> import fusedrnn, torch
        >>> layer = fusedrnn.LSTM(3, 4, backend="reference")
        >>> print(fusedrnn.explain(layer, torch.randn(5, 2, 3)))
        reference: a loop of PyTorch operations
    """
    proj_size, rates, recompute = 0, NO_RATES, "none"
    if isinstance(module, Recurrent):
        cell, wish = module.cell, check_names(module.backend)
    elif isinstance(module, nn.RNNBase):
        cell, wish = base.cell_of(module), base.wish_of(module)
        proj_size, rates = module.proj_size, base.rates_of(module)
        recompute = base.recompute_of(module)
    elif isinstance(module, RNNCellBase):
        cell, wish = cell_modules.cell_of(module), cell_modules.wish_of(module)
        rates = cell_modules.rates_of(module)
    else:
        raise TypeError(f"expected a recurrent layer or cell, got {type(module).__name__}")
    data = x.data if isinstance(x, PackedSequence) else x
    device, dtype = data.device.type, data.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and next(module.parameters()).dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    request = Request(
        cell, dtype, data.device, module.hidden_size, proj_size,
        lengths=isinstance(x, PackedSequence), empty=data.numel() == 0,
        recurrent_dropout=rates.recurrent_dropout > 0 and module.training,
        zoneout=any(rates.zones), layer_norm=getattr(module, "layer_norm", False),
        recompute=recompute if torch.is_grad_enabled() else "none",
        bidirectional=getattr(module, "bidirectional", False),
    )  # fmt: skip
    reasons: dict[str, str] = {}
    for name, reason in weigh(request, wish).items():
        if reason is None:
            algorithm = by_name(name).algorithm(request, _rows(module, x))
            return Explanation(name, algorithm, reasons)
        reasons[name] = reason
    return Explanation(None, None, reasons)


def _rows(module: nn.Module, x: Tensor | PackedSequence) -> int:
    """The batch size, 1 where x has no dimension for it."""
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    if not isinstance(module, nn.RNNBase | Recurrent):
        return x.shape[0] if x.dim() == 2 else 1
    return x.shape[0 if module.batch_first else 1] if x.dim() == 3 else 1
