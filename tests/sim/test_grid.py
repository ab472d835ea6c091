"""The grid kernels against the reference, run by the simulator."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from both_directions import assert_as_alone
from test_standard import FEATURES, WAYS

from fusedrnn.cells import PLAIN
from fusedrnn.testing import Case, check_case, make_inputs, run_case

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

KERNELS = {"forward_grid", "backward_grid"}
# (T, B, I, H): one of each; units that leave a block half empty; several blocks of forward; two
# clusters of backward, rows of another size than 16 bytes; three teams, the last of one row.
SHAPES = [(1, 1, 1, 1), (4, 3, 5, 11), (3, 5, 4, 40), (3, 3, 4, 131), (3, 17, 4, 24)]


@pytest.fixture
def simulated(machine):
    machine.choose("grid")
    return machine.backend


@pytest.mark.parametrize("cell, feature, arithmetic", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
def test_cells(machine, simulated, cell, shape, feature, arithmetic):
    case = Case(PLAIN[cell], *shape, dtype=simulated.choose(arithmetic), **FEATURES[feature])
    check_case(case, simulated, tf32=simulated.tf32)
    assert machine.ran() == KERNELS


def test_every_step_s_cell_state_and_its_gradient(machine, simulated):
    dtype = simulated.choose("bfloat16")
    case = Case(PLAIN["lstm"], 3, 5, 4, 40, dtype=dtype, cell_states=True, lengths=True)
    check_case(case, simulated, tf32=False)
    assert machine.ran() == KERNELS


@pytest.mark.parametrize(
    "cell, hidden, arithmetic",
    [("lstm", 768, "bfloat16"), ("lstm", 1024, "float16"), ("gru", 1024, "bfloat16"),
     ("lstm", 640, "tf32")],
)  # fmt: skip
def test_target_sizes(machine, simulated, cell, hidden, arithmetic):
    """As an H200 would run them: weights in shared memory too in some."""
    machine.module.set_device(132, 90, True, True)
    dtype = simulated.choose(arithmetic)
    check_case(Case(PLAIN[cell], 2, 8, 4, hidden, dtype=dtype), simulated, tf32=simulated.tf32)
    assert machine.ran() == KERNELS


# Rows, of which the device has room for one team. Tiles: eight, the last of three rows; two and one
# of each half of a block; one of each.
ROWS = [59, 17, 12]
# On a device with room for two blocks, or for one cluster.
ONE_TEAM = {"forward": (2, 80), "backward": (16, 90)}


@pytest.mark.parametrize("cell, arithmetic", [("lstm", "bfloat16"), ("gru", "tf32")])
@pytest.mark.parametrize("feature", ["plain", "lengths-resets-reverse"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("of", ONE_TEAM)
def test_several_tiles(machine, simulated, of, rows, cell, feature, arithmetic):
    machine.module.set_device(*ONE_TEAM[of], True, True)
    case = Case(
        PLAIN[cell], 5, rows, 2, 24, dtype=simulated.choose(arithmetic), **FEATURES[feature]
    )
    check_case(case, simulated, tf32=simulated.tf32)
    assert f"{of}_grid" in machine.ran()


@pytest.mark.parametrize("of", ONE_TEAM)
def test_as_many_tiles_as_a_team_can_have(machine, simulated, of):
    machine.module.set_device(*ONE_TEAM[of], True, True)
    features = FEATURES["lengths-resets-reverse"]
    case = Case(PLAIN["lstm"], 3, 123, 2, 24, dtype=simulated.choose("bfloat16"), **features)
    check_case(case, simulated, tf32=False)
    assert f"{of}_grid" in machine.ran()


@pytest.mark.parametrize("cell, arithmetic", [("lstm", "bfloat16"), ("gru", "tf32")])
def test_several_tiles_of_two_clusters(machine, simulated, cell, arithmetic):
    """In forward of a team of 13 blocks."""
    machine.module.set_device(24, 90, True, True)
    case = Case(PLAIN[cell], 3, 20, 4, 200, dtype=simulated.choose(arithmetic), lengths=True)
    check_case(case, simulated, tf32=simulated.tf32)
    assert machine.ran() == KERNELS


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_many_schedules(machine, simulated, cell):
    """Warps and blocks that starve, words that come late: a slot emptied too early shows."""
    case = Case(PLAIN[cell], 7, 3, 1, 24, dtype=simulated.choose("bfloat16"), resets=True)
    for seed in range(100):
        machine.module.set_seed(seed)
        check_case(case, simulated, tf32=False)


def test_many_schedules_of_three_tiles(machine, simulated):
    """Of forward, whose two blocks have one half of their warps a tile ahead of the other."""
    machine.module.set_device(*ONE_TEAM["forward"], True, True)
    case = Case(PLAIN["lstm"], 7, 17, 1, 24, dtype=simulated.choose("bfloat16"), resets=True)
    for seed in range(50):
        machine.module.set_seed(seed)
        check_case(case, simulated, tf32=False)
    assert "forward_grid" in machine.ran()


EMPTY = 0xFFFFFFFF
# What a schedule must do for a mistake to show, see the head of grid.cuh.
SCRIPTS = {
    # A warp has yet to multiply, or to add up sums, while others of its block are a step ahead.
    "slow product": {"pause": "__syncthreads", "warp": 5},
    "slow sums": {"pause": "__syncthreads", "warp": 0},
    # Words are empty as late as fences let them be.
    "late": {"late": EMPTY},
    # And a block waits where it empties them for all to see, what it sent before being under way.
    "late and slow": {"pause": "fence_gpu", "late": EMPTY},
}


def same_bits(machine, simulated, shape, script, seeds):
    case = Case(PLAIN["lstm"], *shape, dtype=simulated.choose("bfloat16"))
    inputs = make_inputs(case)
    expected = run_case(case, inputs, simulated)
    machine.module.set_script(**script)
    for seed in range(seeds):
        machine.module.set_seed(seed)
        for name, t in run_case(case, inputs, simulated).items():
            assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
@pytest.mark.parametrize("hidden, seeds", [(40, 4), (136, 2)])
def test_scripted_schedules(machine, simulated, script, hidden, seeds):
    """One cluster of backward, two of them."""
    same_bits(machine, simulated, (6, 3, 1, hidden), script, seeds)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
@pytest.mark.parametrize("rows", ROWS[1:])
def test_scripted_schedules_of_several_tiles(machine, simulated, rows, script):
    """Two blocks of forward. Slots are used again twice."""
    machine.module.set_device(*ONE_TEAM["forward"], True, True)
    same_bits(machine, simulated, (9, rows, 1, 24), script, seeds=2)
    assert "forward_grid" in machine.ran()


@pytest.mark.parametrize(
    "rows, script",
    [(17, "slow product"), (17, "slow sums"), (9, "late"), (9, "late and slow"), (25, "late")],
)
def test_scripted_schedules_of_several_tiles_of_two_clusters(machine, simulated, rows, script):
    """What is multiplied is one tile behind what is finished, or two. Of three tiles a block may
    have sent sums of the next step before another has read those of this one; of two or four not.
    """
    machine.module.set_device(24, 90, True, True)
    same_bits(machine, simulated, (5, rows, 1, 136), SCRIPTS[script], seeds=1)
    assert machine.ran() == KERNELS


def test_both_directions_one_after_the_other(machine):
    """Of the choice itself, on a device with room for one team."""
    machine.module.set_device(64, 90, True, False)
    case = Case(PLAIN["lstm"], 3, 3, 4, 520, dtype=torch.bfloat16)
    assert_as_alone(machine.backend, case, between=machine.ran)
    assert Counter(machine.module.launched()) == {"forward_grid": 2, "backward_grid": 2}


# The last one, since the simulated device has no grids afterwards.
def test_a_wait_in_vain_is_an_error_and_gives_nan(machine, simulated):
    """The last block never comes: the others give up."""
    machine.module.set_device(16, 80, True, False)
    case = Case(PLAIN["lstm"], 3, 3, 4, 40, dtype=simulated.choose("bfloat16"))
    call = make_inputs(case).call(case)
    machine.module.lose_a_block(True)
    try:
        run = simulated.forward(call, False)
    finally:
        machine.module.lose_a_block(False)
    assert all(t.isnan().all() for t in (run.y[..., :32], run.h_n[..., :32], run.c_n[..., :32]))
    with pytest.raises(RuntimeError, match=r"forward_grid, called before with B = 3, H = 40"):
        simulated.forward(call, False)
    machine.ran()
    assert torch.isfinite(simulated.forward(call, False).y).all()
    assert "forward_grid" not in machine.ran()
