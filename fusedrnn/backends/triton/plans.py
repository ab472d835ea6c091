"""How the kernels of kernels.py run a call: a function of the call and of facts about the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedrnn.backends.native import Device
from fusedrnn.cells import Cell


class Plan(NamedTuple):
    """How the kernels run a call, forward or backward."""

    algorithm: str  # "sequence", "grid" or "step"
    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int

    def programs(self, rows: int, hidden: int) -> tuple[int, int]:
        """Along the rows, along the units."""
        return -(-rows // self.block_b), -(-hidden // self.block_h)

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler. Left alone, ptxas spills registers to make room for further programs,
        of which there are few or none; with all 255 it spills in other kernels."""
        registers = min(224, 65536 // (32 * self.warps))
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}


# Rows, units and warps of a program, where several share the rows. Small ones share a step's work
# among many multiprocessors; large ones read less for it.
TILES = ((16, 16, 4), (16, 32, 4), (32, 32, 8), (64, 32, 8))


def plan(
    cell: Cell,
    dtype: torch.dtype,
    hidden: int,
    rows: int,
    backward: bool,
    on: Device,
    layer_norm: bool = False,
) -> Plan:
    """The plan for forward or backward, a function of these facts alone.

    "sequence": a program has all units of 16 rows, where their weights fit into the shared memory
    of a multiprocessor; it is the same for any number of rows. "grid": several share the rows, with
    the smallest tiles that let all of them be on the device at once. "step": as these, a launch for
    each step. So T never asks for another kernel, and B only where other tiles are taken.

    Where programs that share rows meet within a step, with layer norm or late gates, "grid" takes
    the place of "step": as many rows in a launch as the device has room for, see :func:`at_once`.
    """
    width, power = dtype.itemsize, max(16, 1 << (hidden - 1).bit_length())
    # Layer norm leaves no registers for a step ahead, float64 soon none at all.
    for stages in ((1,) if layer_norm else (2, 1)) if width < 8 or power <= 32 else ():
        # Backward reads a step ahead; the rest is for h or gradients on their way to a product.
        planes = cell.saved + 4 if backward and stages == 2 else 2
        beside = 16 * power * (planes * width + max(4, width) * len(cell.states))
        if width == 8:  # what operands of that width take to change their layout
            beside += beside // 2
        if len(cell.gates) * power**2 * width + beside <= on.shared_memory:
            warps = min(16, max(8 if layer_norm else 4, power * width // 32))
            return Plan("sequence", 16, power, power, warps, stages)
    for block_b, block_h, warps in TILES if width < 8 else TILES[:-1]:
        found = Plan("grid", block_b, block_h, 128 // width, warps, 3)
        along_rows, along_units = found.programs(rows, hidden)
        if along_rows * along_units <= on.multiprocessors:
            return found
    return found if layer_norm or cell.late else found._replace(algorithm="step")


def at_once(found: Plan, hidden: int, on: Device) -> int:
    """Programs along the rows that a launch of "grid" may have, 0: not even one has room."""
    return on.multiprocessors // found.programs(1, hidden)[1]


def describe(found: Plan, rows: int, hidden: int, on: Device) -> str:
    along_rows, along_units = found.programs(rows, hidden)
    blocks = (
        f"{along_units} x {along_rows} programs of {found.block_h} units x {found.block_b} rows"
    )
    launches = "a launch a step" if found.algorithm == "step" else "one launch"
    if found.algorithm == "grid" and along_rows > (most := at_once(found, hidden, on)):
        launches = f"{-(-along_rows // most)} launches"
    return f"{found.algorithm} ({launches}, {blocks})"
