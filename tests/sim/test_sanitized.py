"""The cluster kernels in bfloat16 under ThreadSanitizer and AddressSanitizer, those of grids under
the first."""

import os
import subprocess

import pytest

from fusedrnn.backends.native import native_cells

# (B, H), blocks and tiles of a cluster, and which times: a block; a cluster that sends half a tile,
# of rows of another size than 16 bytes; two tiles.
CASES = [
    ((3, 20), (1, 1), ["plain", "masked", "reversed"]),
    ((3, 131), (8, 1), ["masked"]),
    ((9, 136), (8, 2), ["plain", "reversed"]),
]
SEEDS = {"tsan": 2, "asan": 1}  # a process of TSan has room for three


def run(program, cell, shape, time, seeds):
    index = list(native_cells()).index(cell)
    result = subprocess.run(
        [str(word) for word in (program, index, *shape, time, 0, seeds)],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("flavour", SEEDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    "shape, cluster, time",
    [(shape, cluster, time) for shape, cluster, times in CASES for time in times],
)
def test_clean_and_the_same_for_every_seed(build, flavour, cell, shape, cluster, time):
    output = run(build / f"clusters_{flavour}", cell, shape, time, SEEDS[flavour])
    assert output == "{} blocks and {} tiles of a cluster\n".format(*cluster)


@pytest.mark.parametrize(
    "cell, rows, time, tiles",
    [("lstm", 3, "reversed", 1), ("gru", 3, "plain", 1), ("lstm", 57, "masked", 8)],
)
def test_grids_are_clean(build, cell, rows, time, tiles):
    """Teams of nine blocks in forward, of which up to three share the rows, and in backward one of
    two clusters: a process has room for one seed."""
    output = run(build / "grids_tsan", cell, (rows, 131), time, 1)
    assert output == f"16 blocks and {tiles} tiles of a team\n"
