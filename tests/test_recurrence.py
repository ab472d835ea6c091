"""The suite: every backend x cell x shape x dtype against the reference, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fusedrnn.backends import Backend, Reference, Request, by_name, native
from fusedrnn.cells import CELLS, LSTM
from fusedrnn.testing import Case, check_case, make_inputs, run_case

pytestmark = pytest.mark.usefixtures("one_thread")

RUNNERS = [f"cpu-{isa}" for isa in ("base", "avx2", "avx512", "amx")] + ["reference"]


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Iterator[Backend | Reference]:
    name, _, isa = request.param.partition("-")
    before = native.isa()
    if isa:
        if isa not in native.isas():
            why = f"this machine cannot run {isa}" if native.isas() else "no native library"
            pytest.skip(why)
        native.set_isa(isa)
    yield by_name(name)
    if isa and before is not None:
        native.set_isa(before)


def check(case: Case, backend: Backend | Reference, seed: int = 0) -> None:
    reason = backend.supports(Request(case.cell, case.dtype, torch.device("cpu"), case.H, case.P))
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    on_vectors = [isa for isa in native.isas() if isa != "amx"]
    if case.dtype.itemsize == 2 and backend.name == "cpu" and native.isa() in on_vectors[:-1]:
        pytest.skip(f"16 bits are float32 inside, as on {on_vectors[-1]}")
    check_case(case, backend, seed)


# (T, B, I, H): one step, one row, odd sizes, off the tile, longer, wider.
SHAPES = [
    (1, 1, 1, 1),
    (7, 1, 5, 3),
    (1, 5, 3, 17),
    (5, 33, 4, 33),
    (37, 5, 9, 65),
    (12, 8, 16, 96),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_shapes(cell, shape, dtype, runner):
    check(Case(cell, *shape, dtype=dtype), runner)


FEATURES = {
    "reverse": {"reverse": True},
    "nobias": {"bias": False},
    "lengths": {"lengths": True},
    "lengths-reverse": {"lengths": True, "reverse": True},
    "resets": {"resets": True},
    "resets-reverse": {"resets": True, "reverse": True},
    "lengths-resets": {"lengths": True, "resets": True},
    "lengths-resets-reverse": {"lengths": True, "resets": True, "reverse": True},
    "reset_states": {"resets": True, "reset_states": True},
    "lengths-reset_states-reverse": {
        "lengths": True, "resets": True, "reset_states": True, "reverse": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_features(cell, feature, dtype, runner):
    check(Case(cell, T=9, B=5, I=4, H=19, dtype=dtype, **feature), runner)


NOISE = {
    "dropout": {"dropout": True},
    "zoneout": {"zoneout": "training"},
    "zoneout-eval": {"zoneout": "eval"},
    "dropout-zoneout": {"dropout": True, "zoneout": "training"},
}


@pytest.mark.parametrize("noise", list(NOISE.values())[2:], ids=list(NOISE)[2:])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_noise(cell, feature, noise, runner):
    """Dropout of h within the recurrence, and zoneout."""
    check(Case(cell, T=9, B=5, I=4, H=19, **feature, **noise), runner)


@pytest.mark.parametrize("noise", NOISE.values(), ids=list(NOISE))
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_noise_of_other_shapes(cell, noise, runner):
    """Many rows and units, few rows, 16 bits, a projection, cell states."""
    if isinstance(runner, Reference):
        pytest.skip("other shapes are nothing new to it")
    check(Case(cell, 70, 9, 33, 40, lengths=True, reverse=True, **noise), runner)
    check(Case(cell, 2, 3, 5, 290, dtype=torch.bfloat16, **noise), runner)
    check(Case(cell, 1, 3, 5, 33, dtype=torch.float64, **noise), runner)
    if len(cell.states) > 1:
        case = Case(cell, 7, 33, 5, 40, cell_states=True, lengths=True, resets=True, **noise)
        check(replace(case, P=19, reset_states=True), runner)
        check(replace(case, reverse=True), runner)


NORMED = [cell for cell in CELLS.values() if cell.name == "gru" or "c" in cell.states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("cell", NORMED, ids=lambda c: c.name)
def test_layer_norm(cell, feature, dtype, runner):
    check(Case(cell, T=9, B=5, I=4, H=19, dtype=dtype, layer_norm=True, **feature), runner)


@pytest.mark.parametrize("cell", NORMED, ids=lambda c: c.name)
def test_layer_norm_of_other_shapes(cell, runner):
    """Many rows and units, few rows, 16 bits, a projection, cell states, noise."""
    if isinstance(runner, Reference):
        pytest.skip("other shapes are nothing new to it")
    case = Case(cell, 7, 33, 5, 40, lengths=True, resets=True, layer_norm=True)
    noise = {"dropout": True, "zoneout": "training"}
    check(case, runner)
    check(replace(case, T=70, B=9, reverse=True, **noise), runner)
    check(replace(case, T=2, B=3, H=290, dtype=torch.bfloat16), runner)
    check(replace(case, T=1, B=3, dtype=torch.float64, lengths=False), runner)
    if len(cell.states) > 1:
        check(replace(case, cell_states=True, P=19), runner)
        check(replace(case, cell_states=True, P=19, reverse=True, **noise), runner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("proj", [0, 1, 7], ids=lambda p: f"P{p}")
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
def test_lstm_cell_states_and_projection(feature, proj, dtype, runner):
    check(Case(LSTM, T=9, B=5, I=4, H=19, P=proj, dtype=dtype, cell_states=True, **feature), runner)


@pytest.mark.parametrize("hidden, proj", [(32, 16), (33, 17), (40, 20), (16, 192)])
def test_projection_in_bfloat16(hidden, proj, runner):
    """Sizes that fill tiles, and that do not."""
    check(Case(CELLS["lstm"], 5, 9, 7, hidden, P=proj, dtype=torch.bfloat16, lengths=True), runner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(20, 1, 8, 130), (20, 40, 8, 72), (20, 3, 8, 260)], ids=str)
def test_threads(cell, shape, threads, dtype, runner):
    """Any number of threads, and the same numbers whatever it is."""
    if isinstance(runner, Reference):
        pytest.skip("the reference has no threads of its own")
    case = Case(cell, *shape, dtype=dtype, lengths=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        inputs = make_inputs(case)
        alone = run_case(case, inputs, runner)
        torch.set_num_threads(threads)
        check(case, runner)
        together = run_case(case, inputs, runner)
    finally:
        torch.set_num_threads(before)
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name]), name


@pytest.mark.parametrize("cell", NORMED, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(9, 1, 8, 130), (9, 13, 8, 72), (9, 3, 8, 260)], ids=str)
def test_threads_with_norms_and_noise(cell, shape, runner):
    """The same numbers for any number of threads, whether they share rows or units."""
    if isinstance(runner, Reference):
        pytest.skip("the reference has no threads of its own")
    case = Case(cell, *shape, lengths=True, layer_norm=True, dropout=True, zoneout="training")
    before, inputs, runs = torch.get_num_threads(), make_inputs(case), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            runs.append(run_case(case, inputs, runner))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            assert torch.equal(tensor, other[name]), name


# Around the pieces in which the products after backward are packed: 256 rows of time and batch,
# 96 gates of a unit, 256 columns of x and h.
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(70, 9, 33, 33), (3, 300, 260, 40), (2, 3, 5, 290)], ids=str)
def test_gradients_of_weights(cell, shape, runner):
    check(Case(cell, *shape, reverse=True), runner)
    if cell.name == "lstm":
        check(Case(cell, *shape, P=min(shape[3] - 1, 270), resets=True), runner)


# Around those on tiles: 512 rows of time and batch, 512 columns of x and h, 256 of the depth, 32
# rows, and gates that do not fill blocks.
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize(
    "shape",
    [(70, 9, 33, 40), (2, 1000, 5, 17), (3, 33, 530, 19), (3, 7, 20, 530), (5, 70, 33, 40)],
    ids=str,
)
def test_gradients_in_bfloat16(cell, shape, runner):
    case = Case(cell, *shape, dtype=torch.bfloat16, lengths=True, resets=True)
    check(case, runner)
    if cell.name == "lstm":
        check(replace(case, B=70, lengths=False), runner)
        check(replace(case, reverse=True, dropout=True, P=min(shape[3] - 1, 270)), runner)


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(1, 3, 5, 33), (3, 1, 70, 19), (1, 4, 70, 19)], ids=str)
def test_few_rows(cell, shape, runner):
    """Below four rows in all, the engine takes weights as they are."""
    check(Case(cell, *shape, lengths=True), runner)
    if cell.name == "lstm":
        check(Case(cell, *shape, P=9, cell_states=True, dtype=torch.float64), runner)


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_empty_batch(cell, runner):
    check(Case(cell, T=3, B=0, I=4, H=5), runner)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_nan_stays_in_its_row(cell, reverse, runner):
    """A row of NaN leaves the others' outputs and input gradients as they were."""
    case = Case(cell, T=6, B=7, I=4, H=19, reverse=reverse, lengths=True, resets=True)
    inputs = make_inputs(case)
    clean = run_case(case, inputs, runner) if runner.name == "reference" else None
    if clean is None:
        check(case, runner)
        clean = run_case(case, inputs, runner)
    x = inputs.x.clone()
    x[:, 3] = float("nan")
    dirty = run_case(case, replace(inputs, x=x), runner)
    for name in ("y", "h_n", "dx", "dh0"):
        dim = 1 if clean[name].dim() == 3 else 0
        rest = torch.tensor([0, 1, 2, 4, 5, 6])
        assert torch.equal(
            clean[name].index_select(dim, rest), dirty[name].index_select(dim, rest)
        ), name
    assert dirty["y"][: int(inputs.seq.lengths[3]), 3].isnan().all()


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_same_twice(cell, runner):
    """Bitwise equal from run to run."""
    case = Case(cell, T=15, B=9, I=8, H=70)
    inputs = make_inputs(case)
    first, second = run_case(case, inputs, runner), run_case(case, inputs, runner)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_long_sequence(runner):
    """More steps than 16 bits count; the forget gate keeps c alive through all of them."""
    if isinstance(runner, Reference):
        pytest.skip("65,600 steps of the Python loop")
    case = Case(CELLS["gru"], T=65_600, B=1, I=1, H=4)
    inputs = make_inputs(case)
    out = run_case(case, inputs, runner)
    tail = replace(case, T=600)
    h_before = out["y"][-601]
    rest = replace(
        inputs,
        x=inputs.x[-600:],
        h0=h_before,
        grads={"y": inputs.grads["y"][-600:], "h_n": inputs.grads["h_n"]},
    )
    expected = run_case(tail, rest, Reference())
    torch.testing.assert_close(out["y"][-600:], expected["y"])
    torch.testing.assert_close(out["dx"][-600:], expected["dx"])
