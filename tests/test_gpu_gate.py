"""The gate for machines with a GPU resumes, keeps its time limits, and never passes unearned."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GATE = "bench/gpu_gate.sh"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(root: Path, *command: object, **environment: str) -> tuple[int, list[str]]:
    """A command in `root`, where the programs of root/bin come first: exit code and output."""
    search = f"{root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*map(str, command)],
        cwd=root,
        env=os.environ | {"PATH": search, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The gate's scripts, with stand-ins for a device, for Python and for what is built."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results"))
    write_program(tmp_path / "tests" / "test_none.py", "")
    write_program(tmp_path / "bin" / "nvidia-smi", "echo NVIDIA Stand-in 80GB")
    make = "mkdir -p build/gate/venv/{bin,site}; cp bin/no-python build/gate/venv/bin/python"
    write_program(tmp_path / "bin" / "python3", f'if [ "$2" = venv ]; then {make}; fi')
    write_program(
        tmp_path / "bin" / "no-python", '[[ "$*" == *purelib* ]] && echo build/gate/venv/site'
    )
    write_program(tmp_path / "build" / "gate" / "answers", 'echo "as told"; [ "$2" = right ]')
    write_program(tmp_path / "build" / "gate" / "micro", 'echo "$1,,1,1,1,ns" >>"$2"')
    (tmp_path / "build" / "gate" / "built").write_text("commit: abc\nnvcc: 13\n")
    (tmp_path / "build" / "gate" / "simulated.txt").write_text("right 0 00\nwrong 0 00\n")
    return tmp_path


def test_no_device_is_no_pass(tree: Path) -> None:
    write_program(tree / "bin" / "nvidia-smi", "echo it has failed; exit 9")
    for stage in ("correctness", "micro", "table", "triton"):
        assert run(tree, GATE, stage) == (1, ["no NVIDIA device here"])


def test_unknown_stage(tree: Path) -> None:
    code, lines = run(tree, GATE, "speed")
    assert code == 2 and lines[0].startswith("usage:")


def test_nothing_built(tree: Path) -> None:
    shutil.rmtree(tree / "build")
    code, lines = run(tree, GATE, "micro")
    assert code == 1 and "run make gate" in lines[-1]


def test_a_failing_step_does_not_stop_the_others(tree: Path) -> None:
    write_program(tree / "bin" / "compute-sanitizer", "echo Device not supported; exit 1")
    out = tree / "out"
    out.mkdir()
    code, lines = run(tree, GATE, "correctness", OUT=str(out))
    verdicts = dict(line.split(": ", 1) for line in lines if ": " in line and line[0] != " ")
    assert code == 1
    assert verdicts["import"].startswith("FAILED")
    assert verdicts["right"].startswith("passed (")
    assert verdicts["wrong"] == "FAILED, exit code 1"
    assert verdicts["pytest"].startswith("FAILED")
    assert verdicts["racecheck-checks"] == "not available here"
    assert verdicts["correctness"] == "FAILED"
    results = tree / "bench" / "results" / "stand-in-80gb"
    for folder in (out, results):
        assert {path.name for path in folder.iterdir()} == {
            "facts.txt",
            "correctness.log",
            "correctness.steps",
        }
    assert "commit: abc" in (out / "facts.txt").read_text()
    assert "as told" in (out / "correctness.log").read_text()
    assert "passed right" in (results / "correctness.steps").read_text().splitlines()

    code, lines = run(tree, GATE, "correctness")
    assert code == 1
    assert "right: passed earlier" in lines and "wrong: FAILED, exit code 1" in lines


def test_a_stage_passes_once_and_again_for_another_build(tree: Path) -> None:
    rows = tree / "bench" / "results" / "stand-in-80gb" / "micro.csv"
    for _ in range(2):
        code, lines = run(tree, GATE, "micro")
        assert code == 0 and lines[-1] == "micro: passed"
        assert len(rows.read_text().splitlines()) == 8
    assert "mma: passed earlier" in lines
    write_program(tree / "build" / "gate" / "micro", "exit 1")
    code, lines = run(tree, GATE, "micro")
    assert code == 1 and "mma: FAILED, exit code 1" in lines
    assert rows.read_text().splitlines() == ["name,parameter,median,p10,p90,unit"]


def test_sanitizer_must_have_looked(tree: Path) -> None:
    for text, code, expected in [
        ("ERROR SUMMARY: 0 errors", 0, 0),
        ("ERROR SUMMARY: 2 errors", 1, 1),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0),
        ("it ended early", 0, 1),
        ("ERROR SUMMARY: 0 errors", 3, 3),
    ]:
        write_program(tree / "bin" / "compute-sanitizer", f"echo '{text}'; exit {code}")
        assert run(tree, "bench/gpu/sanitize.sh", "memcheck", "x") == (expected, [text])


def test_time_limits(tree: Path) -> None:
    script = """
        . bench/gpu/steps.sh
        begin stage results some-build 4
        touch results/facts.txt
        step slow 1 sleep 30
        step until-the-end 60 sleep 30
        step too-late 60 true
        finish"""
    code, lines = run(tree, "bash", "-c", script)
    assert code == 1
    assert "slow: FAILED, stopped after 1 s" in lines
    assert any(line.startswith("until-the-end: FAILED, stopped after") for line in lines)
    assert "too-late: FAILED, no time left; run the stage again" in lines


TABLE = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench" / "gpu")!r})
import table
from pathlib import Path
table.DTYPES = {{"fp32": table.DTYPES["fp32"]}}
table.SECONDS_A_ROW = 0.05
shapes = tuple(table.Shape(cell, 3, 2, 5, 8) for cell in ("lstm", "gru"))
def times(shape, dtype, mode, backend=None):
    return table.times(shape, dtype, mode, backend, "cpu", table.measure.sample)
for seconds in (-1, 60, 60):
    arguments = table.COLUMNS["times"], times, {{"device": "none"}}, seconds, shapes
    print("exit code", table.fill(Path("rows.csv"), *arguments))
row = times(shapes[0], "fp32", "train", "cpu")
assert {{"ours_p50_ms", "ratio_p50"}} < set(row) and row["error_ours"] > 0
"""


def test_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    code, lines = run(tmp_path, sys.executable, "-c", TABLE)
    assert code == 0, lines
    assert lines[:2] == ["4 of 4 rows are left: run this again", "exit code 1"]
    assert lines[2].startswith("lstm 3 2 5 8 1 fp32 fwd ")
    assert lines[6:] == ["4 rows, 0 with an error", "exit code 0"] * 2
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = [(cell, mode) for cell in ("lstm", "gru") for mode in ("fwd", "train")]
    assert [(row["cell"], row["mode"]) for row in rows] == cases
    for row in rows:
        low, mid, high = (float(row[f"torch_p{p}_ms"]) for p in (20, 50, 80))
        assert 0 < low <= mid <= high and row["device"] == "none" and not row["ours_p50_ms"]
