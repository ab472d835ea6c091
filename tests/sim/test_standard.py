"""The standard CUDA kernels against the reference, run by the simulator."""

from __future__ import annotations

import pytest

from fusedrnn.backends.native import ARITHMETICS
from fusedrnn.cells import PLAIN
from fusedrnn.testing import Case, check_case

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

FEATURES = {
    "plain": {},
    "reverse": {"reverse": True},
    "nobias": {"bias": False},
    "lengths": {"lengths": True},
    "lengths-resets": {"lengths": True, "resets": True},
    "lengths-resets-reverse": {"lengths": True, "resets": True, "reverse": True},
}
# For kernels of products in 16 bits and tf32. Those of float16 differ from bfloat16's by a type
# alone: of their features the ends.
WAYS = [
    (cell, feature, arithmetic)
    for cell in PLAIN
    for feature in FEATURES
    for arithmetic in ("float16", "bfloat16", "tf32")
    if feature in ("plain", "lengths-resets-reverse") or arithmetic != "float16"
]
# (T, B, I, H): one of each, few rows, off the tiles, in pieces of 16 bytes, several blocks. On the
# simulator's three multiprocessors blocks are small, middle (2, 9, 4, 17) and large (3, 33, ..) in
# forward, small and middle (3, 33, 4, 32) in backward.
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 3), (2, 9, 4, 17), (3, 5, 8, 32), (3, 33, 4, 40), (3, 33, 4, 32)]


@pytest.fixture
def simulated(machine):
    machine.choose("standard")
    return machine.backend


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_cells(simulated, cell, shape, feature, arithmetic):
    dtype = simulated.choose(arithmetic)
    check_case(Case(cell, *shape, dtype=dtype, **feature), simulated, tf32=simulated.tf32)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("proj", [1, 7, 16])
def test_projection(simulated, proj, feature, arithmetic):
    dtype = simulated.choose(arithmetic)
    case = Case(PLAIN["lstm"], 3, 5, 4, 32, P=proj, dtype=dtype, cell_states=True, **feature)
    check_case(case, simulated, tf32=simulated.tf32)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", [(2, 2, 4, 272), (2, 33, 4, 208)], ids=["small", "large"])
def test_more_rounds_than_stages(simulated, shape, arithmetic):
    """The rings of shared memory wrap around. A round is 128 of k in 16 bits, 64 in tf32, and there
    are H of them in forward, 4 H in backward; a ring has 16 stages in backward's small blocks, 6 in
    its middle ones, 3 in forward's large ones."""
    case = Case(PLAIN["lstm"], *shape, dtype=simulated.choose(arithmetic))
    check_case(case, simulated, tf32=simulated.tf32)
