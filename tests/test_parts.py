"""float32 on the CPU with AMX tiles: products in parts of bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fusedrnn
from fusedrnn.backends import by_name, native
from fusedrnn.cells import CELLS, LSTM
from fusedrnn.testing import Case, check_case, make_inputs, run_case

pytestmark = [
    pytest.mark.skipif("amx" not in native.isas(), reason="needs AMX"),
    pytest.mark.usefixtures("one_thread"),
]

TILED = [cell for cell in CELLS.values() if not cell.late]
# Tiles begin with 128 rows of all steps, in steps with 16 or 24 of each; 512 are a chunk of
# backward. With many columns a step does not take up the input projection.
SHAPES = {
    "odd": {"T": 27, "B": 5, "I": 37, "H": 21},
    "chunks": {"T": 45, "B": 13, "I": 3, "H": 35},
    "pieces": {"T": 9, "B": 33, "I": 300, "H": 70},
    "one row": {"T": 130, "B": 1, "I": 33, "H": 16},
    "steps": {"T": 5, "B": 70, "I": 40, "H": 180},
    "columns": {"T": 4, "B": 34, "I": 310, "H": 256},
    "few rows": {"T": 40, "B": 20, "I": 37, "H": 40},
    "chunks of a step": {"T": 2, "B": 200, "I": 310, "H": 260},
    "steps in chunks": {"T": 3, "B": 530, "I": 9, "H": 21},
}
FEATURES = {
    "lengths-reverse": {"lengths": True, "reverse": True},
    "resets": {"resets": True, "reset_states": True},
    "dropout": {"dropout": True, "bias": False},
    "zoneout": {"zoneout": "training", "lengths": True},
    "norm": {"layer_norm": True, "lengths": True},
    "norm-dropout": {"layer_norm": True, "dropout": True, "reverse": True},
    "chunks": {"recompute": "chunks", "resets": True},
}


@contextmanager
def vectors() -> Iterator[None]:
    """The same engine without tiles."""
    native.set_isa("avx512")
    try:
        yield
    finally:
        native.set_isa("amx")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("cell", TILED, ids=lambda c: c.name)
def test_shapes(cell, shape):
    check_case(Case(cell, **shape), by_name("cpu"))


@pytest.mark.parametrize("rows", [6, 37])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("cell", TILED, ids=lambda c: c.name)
def test_features(cell, feature, rows):
    check_case(Case(cell, T=31, B=rows, I=19, H=37, **feature), by_name("cpu"))


def test_more_units_than_are_multiplied_at_once():
    check_case(Case(LSTM, T=3, B=70, I=8, H=1060), by_name("cpu"))


def test_chunks_of_enough_rows():
    check_case(Case(LSTM, T=36, B=33, I=19, H=37, recompute="chunks"), by_name("cpu"))


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("steps", [127, 128])
def test_where_tiles_begin(cell, steps):
    case = Case(cell, T=steps, B=1, I=33, H=16)
    inputs, engine = make_inputs(case), by_name("cpu")
    found = run_case(case, inputs, engine)
    with vectors():
        on_vectors = run_case(case, inputs, engine)
    alike = all(torch.equal(found[name], on_vectors[name]) for name in found)
    assert alike == (steps < 128 or bool(cell.late))


@pytest.mark.parametrize(
    ("rows", "hidden", "tiled"),
    [(15, 40, False), (16, 40, True), (23, 400, False), (24, 400, True)],
)
def test_where_steps_on_tiles_begin(rows, hidden, tiled):
    """Without inputs there are no other products."""
    module, x = fusedrnn.LSTM(8, hidden), torch.zeros(20, rows, 8)
    found = module(x)[0]
    with vectors():
        on_vectors = module(x)[0]
    assert torch.equal(found, on_vectors) != tiled


@pytest.mark.parametrize("rows", [6, 37])
@pytest.mark.parametrize("feature", [{}, *FEATURES.values()], ids=["plain", *FEATURES])
def test_projection(feature, rows):
    check_case(Case(LSTM, T=90, B=rows, I=19, H=37, P=11, **feature), by_name("cpu"))


def run(module, x, threads=1, lengths=None):
    torch.set_num_threads(threads)
    x = x.clone().requires_grad_()
    y = (module(x) if lengths is None else module(x, lengths=lengths))[0]
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


@pytest.mark.parametrize("varied", [False, True], ids=["plain", "lengths"])
@pytest.mark.parametrize("proj", [0, 24])
@pytest.mark.parametrize("rows", [1, 4, 33, 70])
def test_threads(rows, proj, varied):
    module, x = fusedrnn.LSTM(40, 70, proj_size=proj, num_layers=2), torch.randn(130, rows, 40)
    lengths = torch.randint(0, 131, (rows,)) if varied else None
    for layer in (module, fusedrnn.LSTM(40, 70, proj_size=proj, bidirectional=True)):
        one, *others = (run(layer, x, threads, lengths) for threads in (1, 2, 3))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_as_exact_as_torch(name):
    """Values of all sizes, whose lower parts matter: products as such are no less exact."""
    theirs = getattr(torch.nn, name)(200, 64)
    ours = getattr(fusedrnn, name)(200, 64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(60, 32, 200) * torch.logspace(-3, 1, 200)
    double = getattr(torch.nn, name)(200, 64).double()
    double.load_state_dict(theirs.state_dict())
    exact = run(double, x.double())
    for e, a, b in zip(exact, run(theirs, x), run(ours, x), strict=True):
        assert (b - e).square().mean() <= (1.5 * (a - e)).square().mean()


@pytest.mark.parametrize("reset_after", [True, False])
def test_explain(reset_after):
    text = fusedrnn.explain(fusedrnn.GRU(8, 16, reset_after=reset_after), torch.zeros(20, 24, 8))
    assert ("products in bfloat16 parts if T*B >= 128" in str(text)) == reset_after


def test_what_is_not_finite_stays_in_its_row():
    module, x = fusedrnn.GRU(8, 16), torch.randn(20, 32, 8)
    spoilt = x.clone()
    spoilt[3, 7, 2] = float("nan")
    plain, found = module(x)[0], module(spoilt)[0]
    assert found[3:, 7].isnan().all()
    others = [row for row in range(32) if row != 7]
    assert torch.equal(found[:, others], plain[:, others]) and torch.equal(found[:3], plain[:3])


def test_infinite_inputs_saturate_gates():
    module, x = fusedrnn.LSTM(8, 16), torch.randn(20, 32, 8)
    x[3, 7, 2], x[5, 9, 1] = float("inf"), -float("inf")
    found = module(x)[0]
    with vectors():
        expected = module(x)[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("proj", [0, 6])
def test_infinite_gradients_are_seen(proj, rows):
    module, x = fusedrnn.LSTM(8, 16, proj_size=proj), torch.randn(20, rows, 8)
    y = module(x)[0]
    dy = torch.zeros_like(y)
    dy[5, 3, 1] = float("inf")
    y.backward(dy)
    for name, parameter in module.named_parameters():
        assert not parameter.grad.isfinite().all(), name


def test_infinite_gradients_beside_missing_units():
    """All of one sign, so that they stay infinite: no zeros of units beyond the last meet them."""
    module = fusedrnn.RNN(8, 20).bfloat16()
    [torch.nn.init.constant_(p, 0.01) for p in module.parameters()]
    x = torch.zeros(9, 32, 8, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)[0]
    dy = torch.zeros_like(y)
    dy[5, 3, 1] = float("inf")
    y.backward(dy)
    assert (x.grad[:6, 3] == float("inf")).all()


def test_small_numbers():
    """What lies under 2^-126 may be lost, but no more."""
    module, x = fusedrnn.RNN(8, 16, bias=False), torch.randn(20, 32, 8) * 2.0**-120
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        y = module(x)[0]
        expected = x.double() @ module.weight_ih_l0.double().T
    assert (y - expected).abs().max() <= 8 * 3 * 2.0**-126
