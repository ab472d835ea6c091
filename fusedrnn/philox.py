"""Masks of dropout and zoneout by Philox4x32-10 (Salmon et al. 2011): from a seed, the same
everywhere.

Element i of a mask is word i % 4 of the counter (i // 4, its upper half, place, kind).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn.backends import native
from fusedrnn.backends.reference import compute_dtype

WEIGHT, RECURRENT, ZONE_H, ZONE_C = range(4)  # the kinds of masks
_LOW = 0xFFFFFFFF
_has_native = bool(native.native_cells())


def seed() -> Tensor:
    """``[1]`` int64 on the CPU, from the default generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)


def mask(like: Tensor, seed: Tensor, p: float, place: int, kind: int) -> Tensor:
    """0 with the probability p, else 1 / (1 - p), or 1 in uint8, in the shape and dtype of
    ``like``.

    Args:
        seed: as from :func:`seed`.
        place: of the layer and direction, counted over all.
        kind: one of the constants of this module.
    """
    like, dtype = like.new_empty(like.shape, dtype=compute_dtype(like.dtype)), like.dtype
    threshold = min(round(p * 2**32), 2**32 - 1)
    scale = 0.0 if p == 1 else 1.0 if dtype == torch.uint8 else 1 / (1 - p)
    if like.is_cpu and _has_native and not like.is_complex():
        out: Tensor = torch.ops.fusedrnn.mask(like, seed, threshold, scale, place, kind)
        return out.to(dtype)
    index = torch.arange(-(-like.numel() // 4), device=like.device)
    counters = (
        index & _LOW,
        index >> 32,
        torch.full_like(index, place),
        torch.full_like(index, kind),
    )
    numbers = words(torch.stack(counters, 1), seed.to(like.device)).flatten()[: like.numel()]
    kept = numbers.view(like.shape) >= threshold
    return (kept.to(dtype) * scale).to(dtype)


def words(counters: Tensor, seed: Tensor) -> Tensor:
    """Four words for each of ``counters [N,4]``, all of 32 bits in int64; the key is the seed."""
    c0, c1, c2, c3 = counters.unbind(1)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products have 64 bits, which int64 holds as they are, whatever it takes for a sign.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((b >> 32) & _LOW) ^ c1 ^ low,
            b & _LOW,
            ((a >> 32) & _LOW) ^ c3 ^ high,
            a & _LOW,
        )
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), 1)
