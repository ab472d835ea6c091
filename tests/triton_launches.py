"""Launches the Triton kernels as a device would be given them, by a driver that has none.

Triton's own launcher specialises and compiles; the interpreter and triton_gate.py pass it by.
`make triton` runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
import user_cells
from triton.backends.compiler import GPUTarget

import fusedrnn
from fusedrnn import backends
from fusedrnn.backends import cuda
from fusedrnn.backends import triton as backend
from fusedrnn.backends.native import Device
from fusedrnn.backends.triton import kernels, update
from fusedrnn.cells import CELLS
from fusedrnn.testing import Case, make_inputs, run_case

GPU = Device(132, 90, 232448)
DEVICES = {"sequence": GPU, "grid": GPU._replace(shared_memory=0), "step": Device(0, 90, 0)}


class Launched(NamedTuple):
    kernel: str
    programs: int
    metadata: Any


class Driver:
    """Of an H200, as far as Triton asks; kernels are compiled and go no further."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        launched = self.launched

        class Utils:
            def load_binary(self, *_: object) -> tuple[int, ...]:
                return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

            def get_device_properties(self, _: int) -> dict[str, int]:
                return {"max_shared_mem": GPU.shared_memory}

        class Launcher:
            def __init__(self, source: object, metadata: Any) -> None:
                self.metadata = metadata

            def __call__(self, x: int, y: int, z: int, *_: object) -> None:
                launched.append(Launched(self.metadata.name, x * y * z, self.metadata))

        self.utils, self.launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", GPU.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class OnNothing(backend.Triton):
    """Takes CPU tensors."""

    def supports(self, request: backends.Request) -> str | None:
        return self._lacks(request)


def compiled() -> int:
    """Kernels, all together."""
    every = (kernels.forward, kernels.backward, update.update, update.update_backward)
    return sum(len(kernel.device_caches[0][0]) for kernel in every)


def check_noise(cell: fusedrnn.Cell, hidden: int, dtype: torch.dtype, zoneout: str) -> None:
    """One kernel of each for all rates."""
    case = Case(cell, 3, 19, 4, hidden, dtype=dtype, dropout=True, zoneout=zoneout)
    inputs = make_inputs(case)
    run_case(case, inputs, backends.by_name("triton"))
    before = compiled()
    noise = inputs.noise
    if zoneout == "eval":
        noise = noise._replace(rate_h=0.9, rate_c=0.3)
    run_case(case, replace(inputs, noise=noise), backends.by_name("triton"))
    assert compiled() == before, f"{cell.name} is compiled anew for other rates"


def check_layers(
    driver: Driver, make: Callable[..., Any], algorithm: str, dtype: torch.dtype
) -> None:
    """All arguments there are, and none that need not be; then other T and B."""
    x = torch.randn(3, 19, 4, dtype=dtype, requires_grad=True)
    hidden = 24 if dtype == torch.float64 else 40
    full = make(4, hidden, dtype=dtype, bidirectional=True, backend="triton")
    bare = make(4, hidden, dtype=dtype, bias=False, backend="triton")
    y, *_, c = full(x, lengths=[3] * 19, resets=torch.ones(3, 19).bool(), return_cell_states=True)
    (y.sum() + c.sum()).backward()
    bare(x)[0].sum().backward()
    with torch.no_grad():
        bare(x)
    before = compiled()
    for steps, rows in ((1, 1), (2, 1), (16, 16), (5, 32)):
        x = torch.randn(steps, rows, 4, dtype=dtype, requires_grad=True)
        bare(x)[0].sum().backward()
    what = f"{full} in {dtype} by {algorithm}"
    assert compiled() == before, f"{what} is compiled anew for other numbers of steps and rows"
    for kernel, programs, metadata in driver.launched:
        meets = algorithm == "grid"
        assert metadata.launch_cooperative_grid == meets, f"{kernel} of {what}"
        assert not meets or programs <= GPU.multiprocessors, f"{kernel} of {what}"
        assert metadata.maxnreg * 32 * metadata.num_warps <= 65536, f"{kernel} of {what}"
    assert {launch.kernel for launch in driver.launched} == {"forward", "backward"}
    driver.launched.clear()


def check_update(driver: Driver, dtype: torch.dtype) -> None:
    for rows in (1, 7, 40):
        gates, c = torch.randn(rows, 4 * 24, 2).to(dtype), torch.randn(rows, 24, 2).to(dtype)
        inputs = gates.requires_grad_(), c.requires_grad_()
        h, c_new = fusedrnn.functional.lstm_cell_update(*inputs, backend="triton")
        (h.sum() + c_new.sum()).backward()
    assert [launch.kernel for launch in driver.launched] == ["update", "update_backward"] * 3
    driver.launched.clear()


def main() -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    backends._ALL["triton"] = OnNothing()
    cells = (*(cell for cell in CELLS.values() if cell.triton), user_cells.SLOW)
    for algorithm, device in DEVICES.items():
        cuda.device = lambda index, device=device: device
        for cell in (cell for cell in cells if algorithm != "step" or not cell.late):
            check_layers(driver, partial(fusedrnn.Recurrent, cell), algorithm, torch.bfloat16)
        check_layers(driver, fusedrnn.LSTM, algorithm, torch.float32)
        check_layers(driver, partial(fusedrnn.Recurrent, CELLS["gru"]), algorithm, torch.float64)
        if algorithm != "step":
            normed = partial(fusedrnn.LSTM, layer_norm=True)
            check_layers(driver, normed, algorithm, torch.bfloat16)
        learned = partial(fusedrnn.LSTM, initial_state="learned")
        check_layers(driver, learned, algorithm, torch.bfloat16)
        for zoneout in ("training", "eval"):
            check_noise(CELLS["lstm"], 40, torch.bfloat16, zoneout)
            check_noise(CELLS["gru"], 24, torch.float64, zoneout)
        driver.launched.clear()
    for dtype in (torch.bfloat16, torch.float64):
        check_update(driver, dtype)
    print(f"{compiled()} kernels launched, none for a number of steps or rows")


if __name__ == "__main__":
    main()
