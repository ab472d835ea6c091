"""What Triton made of its kernels, against tests/triton_baseline.txt; `make triton` runs it.

    triton_gate.py [--write]

It needs no GPU. The baseline has a row for each kernel<cell, arithmetic, hidden size x rows> and a
column for each GPU: registers / bytes spilled, as ptxas tells them / bytes of shared memory. It
belongs to the version of Triton in its first line; --write makes it anew. Whatever it says,
"sequence" may spill only in float32 and float64, but for what SPILLS names, shared memory must
suffice, products must be on the tensor cores that their arithmetic is for, and the numbers of steps
and rows must not be compiled in.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from cuda_gate import ENTRY, differences
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.backends.native import Device
from fusedrnn.backends.triton import kernels, update
from fusedrnn.backends.triton.ops import constants, update_constants
from fusedrnn.backends.triton.plans import Plan, plan
from fusedrnn.cells import CELLS, PLAIN

BASELINE = Path(__file__).with_name("triton_baseline.txt")
DEVICES = (Device(108, 80, 166912), Device(132, 90, 232448), Device(148, 100, 232448))
KERNELS = {
    "forward": kernels.forward,
    "backward": kernels.backward,
    "update": update.update,
    "update_backward": update.update_backward,
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# The tensor core instruction of each arithmetic's products. UTC*MMA does not name its type.
TENSOR = {
    "bf16": r"HG?MMA\.\w+\.F32\.BF16|UTC\w*MMA.*",
    "fp16": r"HG?MMA\.\w+\.F32|UTC\w*MMA.*",
    "tf32": r"HG?MMA\.\w+\.F32\.TF32|UTC\w*MMA.*",
    "fp64": r"DMMA\.\w+",
}
# Bytes that kernels of "sequence" spill in 16 bits or tf32, and no more.
SPILLS = {
    ("backward<gru, tf32, 64 x 8, noise>", "sm_100"): 16,
    ("backward<lstm, bf16, 128 x 8, norm>", "sm_100"): 8,
    ("forward<lstm, bf16, 100 x 8, norm>", "sm_80"): 24,
}
UNSPECIALISED = {"T", "B", "first", "last", "rows_before", "N"}
# Arrays by the type of their elements: that of x, that of states.
NOISE = ("dropout", "renew_h", "renew_c")
NORMS = ("gain", "hats", "hats_of_state", "scales", "dproduct", "numbers")
RESETS = ("reset_states", "dreset")
STORED = (
    "gx w_t w_hh b_hh parameters h0 resets renew_h renew_c y c dy dc h_prev saved dgx dgh "
    "gates dgates h_new c_new dh_new dc_new gain hats hats_of_state dproduct late reset_states"
).split()
COMPUTED = "dropout states dstates c_prev dparameters dreset scales numbers".split()


class Case(NamedTuple):
    kernel: str
    cell: str
    arithmetic: str
    hidden: int
    rows: int
    device: Device
    beside: str = ""  # "noise": dropout and zoneout, "norm": layer norm, "reset": states there

    def __str__(self) -> str:
        shape = "" if self.alone else f", {self.hidden} x {self.rows}"
        beside = f", {self.beside}" if self.beside else ""
        return f"{self.kernel}<{self.cell}, {self.arithmetic}{shape}{beside}>"

    @property
    def alone(self) -> bool:
        """The cell, without a recurrence."""
        return self.kernel.startswith("update")

    @property
    def gpu(self) -> str:
        return f"sm_{self.device.capability}"

    @property
    def plan(self) -> Plan:
        cell, dtype = CELLS[self.cell], DTYPES[self.arithmetic]
        backward = self.kernel.endswith("backward")
        norm = self.beside == "norm"
        return plan(cell, dtype, self.hidden, self.rows, backward, self.device, norm)

    @property
    def compiled(self) -> tuple[object, ...]:
        """What tells one compilation from another."""
        return (*self._replace(rows=0), self.plan)


class Compiled(NamedTuple):
    registers: int
    spilled: int
    shared: int
    mma: frozenset[str]  # the kinds of tensor core instructions
    ptx: str

    def __str__(self) -> str:
        return f"{self.registers}/{self.spilled}/{self.shared}"


def cases() -> list[Case]:
    """For each algorithm: all units in one program, programs that meet, a launch for each step."""
    found = []
    for arithmetic in DTYPES:
        for cell in (name for name, cell in CELLS.items() if cell.triton):
            if cell not in PLAIN and arithmetic not in ("bf16", "fp32"):
                continue
            shapes = [(64, 8), *([(512, 8)] if CELLS[cell].late else [])]
            if cell in ("lstm", "gru"):
                shapes += [(512, 8), (512, 64)]
                if arithmetic in ("bf16", "fp16"):
                    shapes.append((128, 8))
            if cell == "lstm":
                shapes.append((2048, 4096))
                if arithmetic == "bf16":
                    shapes.append((100, 8))
            both = ("forward", "backward")
            for shape in shapes:
                found += [Case(k, cell, arithmetic, *shape, d) for k in both for d in DEVICES]
            beside = ["noise", "norm"] if cell in ("lstm", "gru") else []
            beside += ["reset"] if beside and arithmetic == "bf16" else []
            if cell == "lstm_coupled_peephole":
                beside = ["norm"]
            for what in beside if arithmetic in ("bf16", "tf32", "fp64") else []:
                at = shapes if (what, arithmetic) == ("norm", "bf16") else shapes[:2]
                found += [
                    Case(k, cell, arithmetic, *shape, d, what)
                    for shape in at for k in both for d in DEVICES
                ]  # fmt: skip
        if arithmetic != "tf32":  # which is of products
            both = ("update", "update_backward")
            found += [Case(k, "lstm", arithmetic, 1, 1, d) for k in both for d in DEVICES]
    return found


def source(case: Case) -> ASTSource:
    """All that is optional is given, but cell states only to the LSTM that has a launch a step."""
    kernel, cell, dtype = KERNELS[case.kernel], CELLS[case.cell], DTYPES[case.arithmetic]
    fixed: dict[str, Any]
    if case.alone:
        fixed = update_constants(cell, dtype, case.kernel.endswith("backward"))
    else:
        fixed = constants(
            cell, dtype, case.arithmetic == "tf32", case.hidden, False, case.kernel == "backward",
            case.plan, case.beside == "noise", case.beside == "norm",
        )  # fmt: skip
        if case.beside != "noise":
            fixed |= dict.fromkeys(NOISE)
        if case.beside != "norm":
            fixed |= dict.fromkeys(NORMS)
        elif len(cell.states) == 1:
            fixed["hats_of_state"] = None
        if case.beside != "reset":
            fixed |= dict.fromkeys(RESETS)
        if cell.additive:
            fixed["b_hh"] = None
        if not cell.params and fixed["NORM"] < 2:
            fixed["parameters"] = None
        if case.plan.algorithm != "grid":
            fixed |= {"counters": None, "numbers": None}
        if case.plan.algorithm != "step" or case.cell != "lstm":
            fixed |= {"c": None, "dc": None}
        if len(cell.states) == 1:
            fixed["renew_c"] = None
        if not cell.late:
            fixed["late"] = None
    types = {"lengths": "*i64", "counters": "*i32", "H": "i32"}
    types |= {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    types |= dict.fromkeys(UNSPECIALISED, "i32")
    storage = {2: case.arithmetic, 4: "fp32", 8: "fp64"}[dtype.itemsize]
    types |= dict.fromkeys(STORED, f"*{storage}")
    types |= dict.fromkeys(COMPUTED, f"*{fixed['COMPUTE'].name}")
    signature, constexprs, attributes = {}, {}, {}
    for parameter in kernel.params:
        name = parameter.name
        signature[name] = "constexpr" if name in fixed else types[name]
        if name in fixed:
            constexprs[name] = fixed[name]
        elif signature[name].startswith("*") and not parameter.do_not_specialize_on_alignment:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def compile_case(case: Case) -> Compiled | str:
    """What came of it, or why nothing did."""
    target = GPUTarget("cuda", case.device.capability, 32)
    given = source(case)
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as triton.knobs.cache.dir:
        try:
            with contextlib.redirect_stdout(log):
                made = triton.compile(
                    given, target=target, options={} if case.alone else case.plan.options
                )
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        cubin = next(Path(triton.knobs.cache.dir).rglob("*.cubin"))
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin]
        listing = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    entry = ENTRY.search(log.getvalue())
    assert entry is not None, f"cannot be read as the output of ptxas: {log.getvalue()}"
    return Compiled(
        int(entry["registers"]),
        int(entry["stores"]) + int(entry["loads"]),
        made.metadata.shared,
        frozenset(re.findall(r"\b\w+MMA[\w.]*", listing)),
        made.asm["ptx"],
    )


def meeting(ptx: str, releases: int, acquires: int) -> str | None:
    """What is wrong with how programs meet, which no schedule of the interpreter shows: they store,
    all threads come together, and one releases; one acquires, all come together, and they load."""
    kinds = {
        "release": r"(atom|red)\.global\.gpu\.release",
        "acquire": r"(atom|ld)\.global\.gpu\.acquire",
        "together": r"bar\.sync|barrier\.sync",
        "store": r"st\.global|st\.bulk",
        "load": r"ld\.global(?!\.gpu\.acquire)|cp\.async\.c[ag]",
    }
    found = [kind for line in ptx.splitlines() for kind, p in kinds.items() if re.search(p, line)]
    order = " ".join(found)
    if order.count("release") != releases or order.count("together release") != releases:
        return f"does not come together between its stores and each of {releases} releases"
    if len(re.findall("acquire together", order)) != acquires:
        return f"does not come together after each of {acquires} acquires"
    return None


def violations(case: Case, made: Compiled | str) -> list[str]:
    what = f"{case} on {case.gpu}, {'alone' if case.alone else case.plan.algorithm},"
    if isinstance(made, str):
        return [f"{what} does not compile: {made}"]
    errors = []
    on_chip = case.alone or case.plan.algorithm == "sequence"
    on_chip = on_chip and case.arithmetic in ("bf16", "fp16", "tf32")
    if on_chip and made.spilled > SPILLS.get((str(case), case.gpu), 0):
        errors.append(f"{what} spills: {made}")
    if made.shared > case.device.shared_memory:
        errors.append(f"{what} has more shared memory than {case.device.shared_memory}: {made}")
    if case.plan.algorithm == "grid" and not case.alone:
        cell = CELLS[case.cell]
        within = len(cell.states) if case.beside == "norm" else int(cell.late > 0)
        wrong = meeting(made.ptx, 1 + within, (1 if case.kernel == "forward" else 2) + within)
        errors += [f"{what} {wrong}"] if wrong else []
    wanted = None if case.alone else TENSOR.get(case.arithmetic)
    optional = case.arithmetic == "fp64" and case.device.capability > 90
    wrong = [i for i in made.mma if wanted is None or not re.fullmatch(wanted, i)]
    if wrong or (wanted and not made.mma and not optional):
        found = ", ".join(sorted(made.mma)) or "no tensor core instruction"
        errors.append(f"{what} has {found}, expected {wanted or 'none'}")
    return errors


def table(numbers: dict[tuple[str, str], str], version: str) -> str:
    gpus = [f"sm_{device.capability}" for device in DEVICES]
    rows = [[f"# {version}", *gpus]]
    for name in sorted({name for name, _ in numbers}):
        rows.append([name, *(numbers[name, gpu] for gpu in gpus)])
    return "".join(f"{row[0]:<40}" + "".join(f"{c:>18}" for c in row[1:]) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make this the baseline")
    args = parser.parse_args()
    errors = []
    for name, kernel in KERNELS.items():
        free = {p.name for p in kernel.params if p.do_not_specialize}
        given = {p.name for p in kernel.params}
        errors += [f"{name} is compiled for each {p}" for p in sorted(UNSPECIALISED & given - free)]
    wanted = cases()
    once = {case.compiled: case for case in wanted}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        made = dict(zip(once, pool.map(compile_case, once.values()), strict=True))
    for key, case in once.items():
        errors += violations(case, made[key])
    numbers = {}
    for case in wanted:
        found = made[case.compiled]
        numbers[str(case), case.gpu] = str(found) if isinstance(found, Compiled) else "-"
    version = f"triton {triton.__version__}"
    errors += differences(BASELINE, table(numbers, version), version, args.write)
    print("\n".join(errors) or f"{len(once)} kernels as they were")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
