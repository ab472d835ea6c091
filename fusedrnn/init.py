"""Initialisations that treat each gate's block of a weight as a matrix of its own.

torch.nn.init on a whole ``weight_ih [G*H,I]`` takes G*H for the number of outputs, and makes the
rows of different gates orthogonal to each other, for which there is no reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from fusedrnn.recurrent import Recurrent


def xavier_uniform_(module: nn.Module, gain: float = 1.0) -> None:
    """Fills the weights of every recurrent layer and cell in ``module``, but for ``ConvLSTM``
    (Glorot & Bengio 2010).

    Each gate's block of ``weight_ih`` and ``weight_hh``, and ``weight_hr``, is from
    U(-a, a), ``a = gain * sqrt(6 / (inputs + outputs))``; all else stays as it is.

    Args:
        module: a layer or cell of fusedrnn or torch.nn, or a model that holds some.

    Raises:
        ValueError: there is none, or a weight is made of others (weight norm, parametrizations).

    Example:
        >>> import fusedrnn
        >>> layer = fusedrnn.LSTM(3, 4)
        >>> fusedrnn.init.xavier_uniform_(layer)
    """
    _fill(module, lambda block: nn.init.xavier_uniform_(block, gain))


def orthogonal_(module: nn.Module, gain: float = 1.0) -> None:
    """As :func:`xavier_uniform_`, each block a (semi-)orthogonal matrix times gain (Saxe et al.
    2014).

    Example:
        >>> import fusedrnn
        >>> layer = fusedrnn.GRU(3, 4)
        >>> fusedrnn.init.orthogonal_(layer)
    """
    _fill(module, lambda block: nn.init.orthogonal_(block, gain))


@torch.no_grad()
def _fill(module: nn.Module, fill: Callable[[Tensor], object]) -> None:
    blocks = list(_blocks(module))
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no recurrent layer or cell")
    for block in blocks:
        fill(block)


def _blocks(module: nn.Module) -> Iterator[Tensor]:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.RNNBase):
            names = layer._flat_weights_names
        elif isinstance(layer, Recurrent):
            names = [f"weight_{kind}{end}" for _, end in layer.places() for kind in ("ih", "hh")]
        elif isinstance(layer, RNNCellBase):
            names = ["weight_ih", "weight_hh"]
        else:
            continue
        for name in names:
            if name.startswith("weight_"):
                weight = layer._parameters.get(name)
                if weight is None:
                    where = f"{path}.{name}" if path else name
                    raise ValueError(f"{where} should be a parameter, it is made of others")
                size = len(weight) if name.startswith("weight_hr") else int(layer.hidden_size)
                yield from weight.split(size)
