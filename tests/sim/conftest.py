"""What `make sim` built."""

import sys
from pathlib import Path

import pytest

from fusedrnn import backends

BUILD = Path(__file__).parents[2] / "build" / "sim"
sys.path[:0] = [str(BUILD), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def build():
    return BUILD


@pytest.fixture(scope="session")
def sim():
    import cuda_sim

    return cuda_sim


class Machine:
    """The simulated device, and its backend in place of "cuda"."""

    def __init__(self, backend, module) -> None:
        self.backend, self.module = backend, module

    def choose(self, algorithm: str) -> None:
        """A device on which calls that can run by ``algorithm`` do: "standard", "grid", or
        "cluster", where one of eight blocks fits at a time and more rows give it two tiles."""
        devices = {
            "standard": (3, 80, False, False),
            "cluster": (16, 90, False, False),
            "grid": (32, 90, True, True),
        }
        self.module.set_device(*devices[algorithm])

    def ran(self) -> set[str]:
        """What was launched since this was last asked."""
        return set(self.module.launched())


@pytest.fixture
def machine(monkeypatch, request):
    import cuda_kernels_sim
    from backend import Simulated

    machine = Machine(Simulated(cuda_kernels_sim), cuda_kernels_sim)
    monkeypatch.setitem(backends._ALL, "cuda", machine.backend)
    cuda_kernels_sim.set_seed(len(request.node.name))
    machine.ran()
    yield machine
    cuda_kernels_sim.set_script()
