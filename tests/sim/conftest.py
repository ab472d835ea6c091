"""What `make sim` built."""

import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build" / "sim"
sys.path[:0] = [str(BUILD), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def build():
    return BUILD


@pytest.fixture(scope="session")
def sim():
    import cuda_sim

    return cuda_sim
