"""What nvcc made of each CUDA kernel, against tests/cuda_baseline.txt; `make cuda` runs it.

    cuda_gate.py LIBRARY LOG [--write]

LOG is what `nvcc --version` printed, and the build of LIBRARY with -Xptxas=-v. The baseline has a
row for each kernel and a column for each GPU: registers / bytes spilled / bytes of static shared
memory. It belongs to the version of nvcc in its first line; --write makes it anew. Whatever it
says, only float64 may spill, products must be on the tensor cores that their arithmetic is for, and
blocks of a cluster must send by st.async. Kernels of clusters are empty for GPUs that have none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

BASELINE = Path(__file__).with_name("cuda_baseline.txt")
Kernels = dict[tuple[str, str], str]  # by mangled name and GPU

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<gpu>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
# The tensor core instruction of each arithmetic's products, by the names it has on some GPU.
TENSOR = {
    "Half<__half>": {"HMMA.16816.F32"},
    "Half<__nv_bfloat16>": {"HMMA.16816.F32.BF16"},
    "Tf32": {"HMMA.1688.F32.TF32"},
    "Fp32": set(),
    "Fp64": {"DMMA.884", "DMMA.8x8x4"},
}


def short_names(mangled: set[str]) -> dict[str, str]:
    """kernel<Cell, Arithmetic, tiles>"""
    names = sorted(mangled)
    filtered = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = (n.split("(")[0].removeprefix("void ").replace("frnn::", "") for n in filtered)
    return {name: s.replace("cuda::", "") for name, s in zip(names, short, strict=True)}


def resources(log: str) -> Kernels:
    return {
        (m["name"], m["gpu"]): f"{m['registers']}/{int(m['stores']) + int(m['loads'])}"
        f"/{m['shared'] or 0}"
        for m in ENTRY.finditer(log)
    }


def tool(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else ""
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], str(bundled)]))


def instructions_of(library: Path) -> dict[tuple[str, str], set[str]]:
    """The kinds of tensor core instructions in each kernel, and "STAS", which is st.async."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None or tool("nvdisasm") is None:
        sys.exit("needs cuobjdump and nvdisasm, of CUDA or of pip install triton")
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ["PATH"]])
    listing = subprocess.Popen(
        [cuobjdump, "-sass", library], stdout=subprocess.PIPE, text=True, env={"PATH": path}
    )
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    gpu = name = ""
    for line in listing.stdout:
        if line.startswith("arch = "):
            gpu = line.split()[2]
        elif "Function : " in line:
            name = line.split()[2]
            found[name, gpu] = set()
        elif "MMA." in line:
            found[name, gpu].add(re.search(r"\w+MMA\.[\w.]*", line)[0])
        elif "STAS" in line:
            found[name, gpu].add("STAS")
    if listing.wait() != 0:
        sys.exit(f"{cuobjdump} failed")
    return found


def table(kernels: Kernels, names: dict[str, str], version: str) -> str:
    gpus = sorted({gpu for _, gpu in kernels}, key=lambda gpu: int(re.search(r"\d+", gpu)[0]))
    rows = [[f"# {version}", *gpus]]
    for mangled in sorted(names, key=names.get):
        rows.append([names[mangled], *(kernels[mangled, gpu] for gpu in gpus)])
    return "".join(f"{row[0]:<52}" + "".join(f"{c:>14}" for c in row[1:]) + "\n" for row in rows)


def violations(kernels: Kernels, names: dict[str, str], library: Path) -> list[str]:
    instructions = instructions_of(library)
    errors = []
    for (mangled, gpu), numbers in kernels.items():
        name = names[mangled]
        arithmetic = next(a for a in TENSOR if f", {a}" in name)
        if numbers.split("/")[1] != "0" and arithmetic != "Fp64":
            errors.append(f"{name} spills on {gpu}: {numbers}")
        cluster = "_cluster<" in name or name.startswith("backward_grid<")
        empty = "_start<" in name or (cluster and gpu == "sm_80")
        wanted = set() if empty else TENSOR[arithmetic]
        found = instructions[mangled, gpu]
        if cluster and not empty and ", 1, 1>" not in name:
            if "STAS" not in found:
                errors.append(f"{name} on {gpu} does not send by st.async")
            found = found - {"STAS"}
        if not found <= wanted or (wanted and not found):
            errors.append(f"{name} on {gpu} has {found or 'none'}, expected {wanted or 'none'}")
    return errors


def differences(baseline: Path, found: str, version: str, write: bool) -> list[str]:
    """The lines in which a table is another than the baseline, which it may become first."""
    if write:
        baseline.write_text(found)
    expected = baseline.read_text()
    if not expected.startswith(f"# {version} "):
        print(f"not compared with the baseline, which is not of {version}")
        return []
    was, is_ = expected.splitlines(), found.splitlines()
    gone = [f"baseline: {line}" for line in was if line not in is_]
    return gone + [f"found:    {line}" for line in is_ if line not in was]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--write", action="store_true", help="make this build the baseline")
    args = parser.parse_args()
    log = args.log.read_text()
    kernels = resources(log)
    if not kernels or len(kernels) != log.count("Compiling entry function"):
        sys.exit(f"{args.log}: cannot be read as the output of ptxas")
    names = short_names({name for name, _ in kernels})
    errors = violations(kernels, names, args.library)
    version = "nvcc " + re.search(r"V([\d.]+)", log)[1]
    errors += differences(BASELINE, table(kernels, names, version), version, args.write)
    print("\n".join(errors) or f"{len(kernels)} kernels as they were")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
