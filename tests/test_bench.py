"""The benchmark tools work, refuse wrong results, and the README shows the results; no times."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SHAPES = ["gru-t100-b8-h64", "lstm-t1-b1-h128-stepping"]
PLAIN = "lstm-t100-b1-h128"
WITH_LOOP = [  # of bench/variants.py
    *("peephole", "coupled gates", "coupled gates, peephole"),
    *("layer norm", "recurrent dropout", "zoneout", "GRU, reset before"),
]
ARGUMENTS = ["lengths 1..T", "lengths T/2", "resets", "resets, learned states"]


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A tool in its own process, on one thread so that a busy machine does not make it crawl."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def planted(tool: Path, layer: str, *arguments: object) -> list[object]:
    """The command line of a tool in whose process fusedrnn's layer returns 0.1 % too much, but not
    in float64."""
    code = (
        f"import runpy, sys, torch, fusedrnn\n"
        f"forward = fusedrnn.{layer}.forward\n"
        f"def wrong(self, *a, **k):\n"
        f"    y, state = forward(self, *a, **k)\n"
        f"    return (y if y.dtype == torch.float64 else 1.001 * y), state\n"
        f"fusedrnn.{layer}.forward = wrong\n"
        f"sys.path.insert(0, {str(tool.parent)!r})\n"
        f"runpy.run_path({str(tool)!r}, run_name='__main__')\n"
    )
    return ["-c", code, *arguments]


def test_readme_shows_the_results() -> None:
    done = run("bench/report.py", "--check")
    assert done.returncode == 0, done.stderr


def test_report_finds_and_repairs_drift(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text().replace("<!-- bench:end -->", "| x |\n<!-- bench:end -->"))
    assert run("bench/report.py", "--check", "--readme", copy).returncode == 1
    assert run("bench/report.py", "--write", "--readme", copy).returncode == 0
    assert copy.read_text() == README.read_text()


def test_run_times_named_shapes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    done = run("bench/run.py", "--seconds", 0.2, "--csv", path, "--shape", *SHAPES)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["shape"], row["mode"]) for row in rows] == [
        (SHAPES[0], "fwd"),
        (SHAPES[0], "train"),
        (SHAPES[1], "fwd"),
    ]
    for row in rows:
        some = {key: value for key, value in row.items() if not key.startswith("onnx")}
        assert all(value for key, value in some.items() if key != "variant"), row
        for side in ("ours_p{}_ms", "torch_p{}_ms"):
            low, mid, high = (float(row[side.format(p)]) for p in (20, 50, 80))
            assert 0 < low <= mid <= high
        low, mid, high = (float(row[f"ratio_p{p}"]) for p in (10, 50, 90))
        assert 0 < low <= mid <= high


def test_report_draws_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, rows = tmp_path / "plot.png", ROOT / "bench" / "results" / "cpu_avx512.csv"
    done = run("bench/report.py", "--plot", plot, rows)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_run_against_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "rows.csv"
    shapes = [SHAPES[0], "lstm-t100-b16-h256-proj128"]
    done = run("bench/run.py", "--seconds", 0.2, "--csv", path, "--shape", *shapes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward: geometric mean" in done.stdout and "ONNX Runtime over 1 shapes" in done.stdout
    with path.open(newline="") as file:
        found = [bool(row["onnx_ratio_p50"]) for row in csv.DictReader(file)]
    assert found == [True, False, False, False]


def test_run_does_not_time_a_wrong_result(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--seconds", 0.2, "--csv", path, "--shape", SHAPES[0]]
    done = run(*planted(ROOT / "bench" / "run.py", "GRU", *arguments))
    assert done.returncode == 1
    assert "GATE RED, not timed" in done.stdout
    assert not path.exists()


def test_run_names_an_unknown_shape() -> None:
    done = run("bench/run.py", "--shape", "lstm-t7")
    assert done.returncode == 2
    assert done.stderr == "bench: no shape 'lstm-t7'; --list names all of them\n"


def test_variants_times_every_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--seconds", 0.2, "--csv", path, "--shape", PLAIN]
    done = run("bench/variants.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == [*WITH_LOOP, *ARGUMENTS]
    for row in rows:
        assert done.stdout.count(f"\n| {row['variant']} | {PLAIN} | ") == 1
        looped = row["variant"] in WITH_LOOP
        assert all(bool(value) == looped for key, value in row.items() if "loop" in key), row
        for side in ("ours", "plain", "loop")[: 2 + looped]:
            low, mid, high = (float(row[f"{side}_p{p}_ms"]) for p in (20, 50, 80))
            assert 0 < low <= mid <= high
        for ratio in ("ours_over_plain", "loop_over_ours")[: 1 + looped]:
            low, mid, high = (float(row[f"{ratio}_p{p}"]) for p in (10, 50, 90))
            assert 0 < low <= mid <= high


def test_variants_does_not_time_a_wrong_result(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--seconds", 0.2, "--csv", path, "--shape", PLAIN]
    done = run(*planted(ROOT / "bench" / "variants.py", "LSTM", *arguments))
    assert done.returncode == 1, done.stdout + done.stderr
    for name in (*WITH_LOOP, *ARGUMENTS):
        red = f"\n{name}, {PLAIN}: GATE RED, not timed: " in done.stdout
        assert red != name.startswith("GRU")
    with path.open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["GRU, reset before"]


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "planted"])
def test_demo_passes_and_fails(tmp_path: Path, wrong: bool) -> None:
    tool = ROOT / "bench" / "tasks" / "charlm.py"
    arguments = ["--steps", 2, "--plot", tmp_path / "demo.png"]
    done = run(*(planted(tool, "LSTM", *arguments) if wrong else [tool, *arguments]), cwd=tmp_path)
    assert done.returncode == wrong, done.stdout + done.stderr
    assert ("FAILED: fusedrnn departs from torch.nn" in done.stdout) == wrong
    assert "fusedrnn writes:" in done.stdout


def test_conv_times_a_shape_unless_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--seconds", 0.2, "--csv", path, "--shape", 3, 2, 2, 3, 5, 6]
    done = run("bench/conv.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loop_over_ours_p50"]) > 0 and "| 3, 2, 2, 3, 5, 6 |" in done.stdout
    path.unlink()
    done = run(*planted(ROOT / "bench" / "conv.py", "ConvLSTM", *arguments))
    assert done.returncode == 1 and "GATE RED" in done.stdout and not path.exists()
