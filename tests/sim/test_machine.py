"""The simulator of CUDA kernels catches planted mistakes, and nothing else."""

import os
import subprocess

import pytest

TOYS = ["grid_flag", "grid_sentinel", "cluster_barrier", "cluster_async", "dependent"]
BUGS = [
    "none",
    "no barrier",
    "no sync after copy",
    "late copy wait",
    "no sync before release",
    "relaxed flag",
    "out of bounds",
    "single buffer",
    "no last barrier",
    "no mbarrier wait",
    "wrong bytes",
    "wrong parity",
    "single reduction",
    "early recycle",
    "late recycle",
    "no fence",
    "no pair barrier",
    "divergence",
    "no dependency wait",
]
# What to plant where, and a part of the sentence.
PLANTED = [
    ("grid_flag", "no barrier", "wrong values"),
    ("grid_flag", "no sync after copy", "wrong values"),
    ("grid_flag", "late copy wait", "wrong values"),
    ("grid_flag", "no sync before release", "wrong values"),
    ("grid_flag", "out of bounds", "out of bounds of shared memory"),
    ("grid_flag", "single buffer", "wrong values"),
    ("grid_flag", "divergence", "divergence"),
    ("grid_sentinel", "late copy wait", "wrong values"),
    ("grid_sentinel", "single reduction", "wrong values"),
    ("grid_sentinel", "early recycle", "livelock"),
    ("grid_sentinel", "late recycle", "wrong values"),
    ("grid_sentinel", "no fence", "wrong values"),
    ("cluster_barrier", "no barrier", "has exited"),
    ("cluster_barrier", "no last barrier", "has exited"),
    ("cluster_barrier", "single buffer", "wrong values"),
    ("cluster_async", "no mbarrier wait", "mbarrier"),
    ("cluster_async", "wrong bytes", "in flight"),
    ("cluster_async", "wrong parity", "mbarrier"),
    ("cluster_async", "single buffer", "wrong values"),
    ("cluster_async", "no fence", "fence_mbarrier_init is missing"),
    ("cluster_async", "no pair barrier", "wrong values"),
    ("dependent", "no dependency wait", "wrong values"),
]
# What to plant, and a script that shows it.
SCRIPTED = [
    ("late recycle", {"pause": "fence_gpu", "block": 1, "late": 0xFFFFFFFF}),
    ("no fence", {"pause": "__syncthreads", "block": 1, "late": 0xFFFFFFFF}),
]
RACES = [
    ("grid_flag", "no barrier"),
    ("grid_flag", "no sync after copy"),
    ("grid_flag", "late copy wait"),
    ("grid_flag", "no sync before release"),
    ("grid_flag", "relaxed flag"),
    ("grid_flag", "single buffer"),
    ("grid_sentinel", "single reduction"),
    ("cluster_barrier", "single buffer"),
    ("cluster_async", "no pair barrier"),
    ("cluster_async", "single buffer"),
    ("dependent", "no dependency wait"),
]


def failures(sim, toy, bug, seeds, **script):
    sentences = []
    sim.set_script(**script)
    for seed in range(seeds):
        sim.set_seed(seed)
        try:
            sim.run_toy(TOYS.index(toy), BUGS.index(bug))
        except RuntimeError as error:
            sentences.append(str(error))
    sim.set_script()
    return sentences


def sanitized(build, flavour, toy, bug, seeds):
    command = [build / f"toys_{flavour}", TOYS.index(toy), BUGS.index(bug), 0, seeds]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("toy", TOYS)
def test_no_false_alarm(sim, toy):
    assert failures(sim, toy, "none", 200) == []


@pytest.mark.parametrize("toy, bug, sentence", PLANTED)
def test_planted(sim, toy, bug, sentence):
    assert any(sentence in text for text in failures(sim, toy, bug, 100))


@pytest.mark.parametrize("bug, script", SCRIPTED)
def test_a_script_shows_what_seeds_may_miss(sim, bug, script):
    assert failures(sim, "grid_sentinel", "none", 50, **script) == []
    assert len(failures(sim, "grid_sentinel", bug, 50, **script)) >= 48


@pytest.mark.parametrize(
    "check",
    "mma_bf16 mma_f16 mma_tf32 mma_f64 sums_bf16 sums_f16 sums_tf32 matrices conversions tanh exp2 "
    "reciprocal shuffles copies named_barriers words messages clocks dependency bulk cluster "
    "store_async".split(),
)
def test_primitive(sim, check):
    for seed in range(20):
        sim.set_seed(seed)
        sim.run_check(sim.CHECKS.index(check))


def test_same_seed_same_run(sim):
    runs = [failures(sim, "grid_flag", "single buffer", 30) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("flavour", ["tsan", "asan"])
@pytest.mark.parametrize("toy", TOYS)
def test_sanitizers_no_false_alarm(build, flavour, toy):
    result = sanitized(build, flavour, toy, "none", 5)
    assert result.returncode == 0 and result.stdout == "0 failed\n", result.stderr


@pytest.mark.parametrize("toy, bug", RACES)
def test_races(build, toy, bug):
    result = sanitized(build, "tsan", toy, bug, 5)
    assert result.returncode == 66 and "data race" in result.stderr, result.stderr


def test_out_of_bounds_under_asan(build):
    result = sanitized(build, "asan", "grid_flag", "out of bounds", 1)
    assert result.returncode != 0 and "toys.cu" in result.stderr


def test_answers_differ_if_a_word_does(build, tmp_path):
    """The program that compares a device with the simulator, here the simulator with itself."""
    answers = tmp_path / "answers"
    right = subprocess.run([build / "answers"], capture_output=True, text=True).stdout
    for name, old, new, verdict in [
        ("matrices", " 00010000 ", " 00010000 ", "as in the simulator"),
        ("matrices", " 00010000 ", " 00010001 ", "word 0 is 0x00010000, in the simulator"),
        ("exp2", " 00cfefa9 ", " 00cfefac ", "as in the simulator"),
        ("exp2", " 00cfefa9 ", " 00cfefad ", "word 3 is 0x00cfefa9, in the simulator"),
    ]:
        lines = [line for line in right.splitlines(True) if line.split()[0] == name]
        assert len(lines) == 1 and old in lines[0]
        answers.write_text(right.replace(lines[0], lines[0].replace(old, new, 1)))
        done = subprocess.run([build / "answers", answers, name], capture_output=True, text=True)
        assert done.stdout.startswith(f"{name}: {verdict}"), done.stdout
        assert done.returncode == (verdict != "as in the simulator")
    done = subprocess.run([build / "answers", answers, "no such check"], capture_output=True)
    assert done.returncode == 1


MICRO = "max_clusters cluster_barrier st_async_hop st_async_step flag_hop data_hop mma".split()


@pytest.mark.parametrize("group", MICRO)
def test_microbenchmark_moves_the_right_data(build, tmp_path, group):
    path = tmp_path / "rows.csv"
    done = subprocess.run([build / "micro", group, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(line.endswith(",simulated") for line in path.read_text().splitlines())
