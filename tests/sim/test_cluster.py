"""The cluster kernels against the reference, run by the simulator.

Up to 128 units of 16 bits, or 64 in tf32, are a single block's; more are a cluster's of eight.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_standard import FEATURES, WAYS

from fusedrnn.cells import PLAIN
from fusedrnn.testing import Case, check_case, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

KERNELS = {"forward_cluster", "backward_cluster"}
# (T, B, I, H): one of each; few rows; units that leave a warp and a chunk of k half empty; a full
# block in 16 bits; units that leave the last block empty; rows of another size than 16 bytes; two
# tiles; clusters of which the last has an empty tile; weights in shared memory too.
SHAPES = [
    (1, 1, 1, 1),
    (3, 2, 5, 3),
    (4, 9, 4, 40),
    (2, 9, 4, 128),
    (4, 3, 4, 136),
    (3, 6, 4, 131),
    (3, 12, 4, 200),
    (2, 17, 4, 136),
    (3, 10, 4, 264),
]


@pytest.fixture
def simulated(machine):
    machine.choose("cluster")
    return machine.backend


@pytest.mark.parametrize("cell, feature, arithmetic", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
def test_cells(machine, simulated, cell, shape, feature, arithmetic):
    case = Case(PLAIN[cell], *shape, dtype=simulated.choose(arithmetic), **FEATURES[feature])
    check_case(case, simulated, tf32=simulated.tf32)
    assert machine.ran() == KERNELS


def test_every_step_s_cell_state_and_its_gradient(machine, simulated):
    case = Case(
        PLAIN["lstm"], 3, 5, 4, 136, dtype=simulated.choose("bfloat16"), cell_states=True,
        lengths=True,
    )  # fmt: skip
    check_case(case, simulated, tf32=False)
    assert machine.ran() == KERNELS


@pytest.mark.parametrize(
    "cell, hidden, arithmetic",
    [("lstm", 512, "bfloat16"), ("lstm", 256, "float16"), ("gru", 512, "bfloat16"),
     ("lstm", 376, "tf32"), ("gru", 384, "tf32"), ("rnn_tanh", 512, "float16")],
)  # fmt: skip
@pytest.mark.parametrize("batch", [8, 16])
def test_target_sizes(machine, simulated, cell, hidden, arithmetic, batch):
    dtype = simulated.choose(arithmetic)
    check_case(Case(PLAIN[cell], 2, batch, 4, hidden, dtype=dtype), simulated, tf32=simulated.tf32)
    assert machine.ran() == KERNELS


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("shape", [(6, 3, 1, 20), (6, 9, 1, 136)], ids=["block", "cluster"])
def test_many_schedules(machine, simulated, cell, shape):
    """Warps and blocks that starve, stores that land late: a buffer used again too early shows."""
    case = Case(PLAIN[cell], *shape, dtype=simulated.choose("bfloat16"), lengths=True, resets=True)
    for seed in range(100):
        machine.module.set_seed(seed)
        check_case(case, simulated, tf32=False)


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_are_dealt_by_length(machine, simulated, reverse):
    """Of two clusters that do not run at once, one has all the long rows, the other ends early."""
    case = Case(
        PLAIN["lstm"], 12, 32, 1, 136, dtype=simulated.choose("bfloat16"), lengths=True,
        reverse=reverse,
    )  # fmt: skip
    inputs = make_inputs(case)

    def products(*lengths):
        seq = inputs.seq._replace(lengths=torch.tensor(lengths * (32 // len(lengths))))
        call = replace(inputs, seq=seq).call(case)
        machine.module.products()
        simulated.forward(call, False)
        return machine.module.products()

    long = products(12)
    assert products(12, 1) == products(*[12] * 16, *[1] * 16) == long * 13 // 24


@pytest.mark.parametrize("beyond", [{"P": 7}, {"H": 520}, {"dtype": "float64"}], ids=str)
def test_the_rest_runs_by_the_standard_algorithm(machine, simulated, beyond):
    case = {"H": 24, "P": 0, "dtype": "bfloat16", **beyond}
    dtype = simulated.choose(case["dtype"])
    check_case(
        Case(PLAIN["lstm"], 2, 3, 4, case["H"], P=case["P"], dtype=dtype), simulated, tf32=False
    )
    assert not machine.ran() & KERNELS
