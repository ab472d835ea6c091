"""The cluster kernels in bfloat16 under ThreadSanitizer and AddressSanitizer."""

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


@pytest.mark.parametrize("flavour", SEEDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    "shape, cluster, time",
    [(shape, cluster, time) for shape, cluster, times in CASES for time in times],
)
def test_clean_and_the_same_for_every_seed(build, flavour, cell, shape, cluster, time):
    index = list(native_cells()).index(cell)
    command = [build / f"clusters_{flavour}", index, *shape, time, 0, SEEDS[flavour]]
    result = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "{} blocks and {} tiles of a cluster\n".format(*cluster)
