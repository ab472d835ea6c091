"""Checks of arguments that torch.nn has no words for."""

from __future__ import annotations

import math
from collections.abc import Mapping


def changed(module: object, defaults: Mapping[str, object]) -> str:
    """What follows in the module's repr: attributes that are not as by default, or not there."""
    given = {name: getattr(module, name, default) for name, default in defaults.items()}
    return "".join(f", {n}={value!r}" for n, value in given.items() if value != defaults[n])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def forget_bias(value: float | None, bias: bool) -> float | None:
    """What the forget gate's bias is set to; None: it stays."""
    if value is None:
        return None
    if not bias:
        raise ValueError(f"forget_bias={value} needs bias=True, got bias=False")
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"forget_bias should be a finite number, got {value!r}")
    return float(value)


def reset_after(value: bool, layer_norm: bool) -> bool:
    """Of a GRU, whose norm is over all of W_hh h, which must be one product."""
    if not truth("reset_after", value) and truth("layer_norm", layer_norm):
        raise ValueError("layer_norm=True needs reset_after=True, got reset_after=False")
    return value


def probability(name: str, value: float) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a probability in [0, 1], got {value!r}")
    return value


def size(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return value


def truth(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value
