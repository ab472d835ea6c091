"""The shape of the project: who imports whom, and that Python and C++ agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn.backends import Request, by_name, cuda, cudnn, native, triton
from fusedrnn.cells import CELLS, PLAIN

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

PACKAGE = Path(fusedrnn.__file__).parent
ROOT = PACKAGE.parent

# Each may import the ones after it, and none before it.
ORDER = ["explanation", "diagnostics", "convert", "modules", "conv", "base", "init", "recurrent",
         "cell_modules", "reference", "functional", "running", "testing", "layer", "recurrence",
         "recompute", "philox", "backends", "cells", "arguments"]  # fmt: skip


def imports(path: Path) -> set[str]:
    """The rooms of fusedrnn that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fusedrnn"):
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found & set(ORDER)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_import_directions():
    for path in sources():
        if room(path) in ORDER:
            allowed = set(ORDER[ORDER.index(room(path)) :])
            assert imports(path) <= allowed, f"{path} imports {imports(path) - allowed}"


def test_cell_names_stay_in_their_rooms():
    """No driver and no backend knows a cell by name."""
    names = re.compile(r"\b(lstm|gru|rnn_tanh|rnn_relu)\b", re.IGNORECASE)
    for path in sources():
        if room(path) in {"layer", "recurrence", "backends"}:
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", "")))
                assert not names.search(str(name)), f"{path} names the cell {name}"


def test_native_library_agrees_about_the_cells():
    if not native.native_cells():
        pytest.skip("no native library")
    facts = {
        c.name: (len(c.gates), len(c.states), c.saved, len(c.params), c.additive, c.name in PLAIN)
        for c in CELLS.values()
    }
    assert native.native_cells() == facts
    assert list(native.native_cells()) == list(facts)


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_cells_keep_what_they_save(cell):
    kept = []

    def keep(*saved):
        kept.extend(saved)
        return saved

    gx = torch.zeros(2, len(cell.gates), 3)
    params = (tuple(torch.zeros(3) for _ in cell.params),) if cell.params else ()
    late = {"product": lambda factor: factor.unsqueeze(-2)} if cell.late else {}
    gh = gx[:, : len(cell.gates) - cell.late]
    cell.step(gx, gh, (torch.zeros(2, 3),) * len(cell.states), *params, keep=keep, **late)
    assert [t.shape for t in kept] == [(2, 3)] * cell.saved


def test_torch_stays_in_the_bindings():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and not path.name.startswith("bindings"):
            text = path.read_text()
            assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', text), path
        elif path.is_file():
            for header in re.findall(r"#include\s*[<\"]torch/([^>\"]+)", path.read_text()):
                assert header.startswith(("csrc/stable/", "csrc/inductor/aoti", "headeronly/")), (
                    header
                )


def test_import_is_light():
    """Neither triton nor CUDA nor Dynamo is touched by ``import fusedrnn``."""
    code = (
        "import sys, fusedrnn, torch\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "import threading; assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_documented():
    for name in fusedrnn.__all__:
        assert name == "__version__" or getattr(fusedrnn, name).__doc__, name


def test_readme_table_of_cells(monkeypatch):
    """The README's table is what the backends say they support, each on its own device."""

    def dtypes(backend, cell):
        if backend.supports(Request(cell, torch.complex64, torch.device("mps"), 8, 0)) is None:
            return "every dtype and device"
        device = torch.device("cpu" if backend.name == "cpu" else "cuda")
        request = [Request(cell, d, device, 8, 0) for d in DTYPES]
        return ", ".join(str(r.dtype)[6:] for r in request if backend.supports(r) is None)

    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "device", lambda index: native.Device(132, 90, 232448))
    monkeypatch.setattr(triton, "_missing", None)
    monkeypatch.setattr(cudnn, "_missing", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn.BFLOAT16_SINCE)
    if not native.isas():
        pytest.skip("no native library")
    names = fusedrnn.list_backends()[::-1]
    rows = [
        "| | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for cell in CELLS.values():
        cells = " | ".join(dtypes(by_name(name), cell) for name in names)
        rows.append(f"| `{cell.name}` | {cells} |")
    table = (ROOT / "README.md").read_text().split("<!-- cells:begin -->\n")[1]
    assert table.split("<!-- cells:end -->")[0].splitlines() == rows
