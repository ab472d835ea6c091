"""The Triton backend on CPU tensors, its kernels run by Triton's interpreter."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from against_torch import assert_equals_torch, make_hx, twins
from small_gradients import assert_as_accurate_as_large_ones

import fusedrnn
from fusedrnn import backends
from fusedrnn.backends import Reference, Request, cuda
from fusedrnn.backends import triton as backend
from fusedrnn.backends.native import DTYPES, Device
from fusedrnn.backends.triton import plans
from fusedrnn.backends.triton.plans import TILES
from fusedrnn.cells import CELLS, GRU, GRU_RESET_BEFORE, LSTM, LSTM_PEEPHOLE, PLAIN
from fusedrnn.recurrence import recurrence
from fusedrnn.testing import Case, check_case, make_inputs, run_case

pytest.importorskip("triton")
pytest.importorskip("numpy")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them itself: test_gpu.py"),
]

FUSED = {name: cell for name, cell in CELLS.items() if cell.triton}
ARITHMETICS = ["float16", "bfloat16", "tf32", "float32", "float64"]
DEVICES = {
    "sequence": Device(132, 90, 232448),
    "grid": Device(132, 90, 0),
    "step": Device(0, 90, 0),
}


class Interpreted(backend.Triton):
    """Takes CPU tensors."""

    def supports(self, request: Request) -> str | None:
        return self._lacks(request)


class Machine:
    """The backend, the interpreter that runs its kernels, and the device it takes it for."""

    def __init__(self, monkeypatch) -> None:
        from triton_interpreter import Interpreter

        self.backend, self.tf32 = Interpreted(), False
        self.interpreter = Interpreter(monkeypatch)
        self.device = DEVICES["sequence"]
        monkeypatch.setitem(backends._ALL, "triton", self.backend)
        monkeypatch.setattr(cuda, "device", lambda index: self.device)
        monkeypatch.setattr(cuda, "precision", lambda: "tf32" if self.tf32 else "ieee")

    def choose(self, arithmetic: str) -> torch.dtype:
        """Computes float32 in tf32 or as it is; returns the dtype of storage."""
        self.tf32 = arithmetic == "tf32"
        return torch.float32 if self.tf32 else getattr(torch, arithmetic)

    def check(self, case: Case, seed: int = 0) -> None:
        self.interpreter.seed = seed
        check_case(case, self.backend, seed, self.tf32)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture(params=DEVICES)
def algorithm(machine, request):
    machine.device = DEVICES[request.param]
    return request.param


@pytest.fixture(params=["sequence", "grid"])
def meeting(machine, request):
    """An algorithm whose programs meet within a step, if several share rows: not by launches."""
    machine.device = DEVICES[request.param]
    return request.param


FEATURES = {
    "plain": {},
    "nobias-reverse": {"bias": False, "reverse": True},
    "lengths-resets": {"lengths": True, "resets": True},
    "lengths-resets-reverse": {"lengths": True, "resets": True, "reverse": True},
    "reset_states": {"resets": True, "reset_states": True},
    "lengths-reset_states-reverse": {
        "lengths": True, "resets": True, "reset_states": True, "reverse": True,
    },
}  # fmt: skip
# (T, B, I, H): one of each, several programs along rows and units, none of it full.
SHAPES = [(1, 1, 1, 1), (3, 19, 4, 20), (2, 17, 3, 16)]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_cells(machine, algorithm, cell, shape, feature, arithmetic):
    dtype = machine.choose(arithmetic)
    machine.check(Case(cell, *shape, dtype=dtype, cell_states=cell is LSTM, **feature))


def test_algorithms(machine, algorithm):
    """That each runs where it is meant to; a launch for each step and one for dh0, or one of all
    programs, cooperative only where they meet."""
    run_case(Case(LSTM, 3, 19, 4, 20), make_inputs(Case(LSTM, 3, 19, 4, 20)), machine.backend)
    launches = machine.interpreter.launches
    assert len(launches) == (7 if algorithm == "step" else 2)
    assert {n["MEETS"] for n in launches} == {algorithm == "grid"}
    assert {n.get("launch_cooperative_grid", False) for n in launches} == {algorithm == "grid"}


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3, 5, 4, 136), (2, 70, 4, 72)], ids=str)
def test_more_than_one_round_of_k(machine, algorithm, shape, arithmetic):
    """Of a product over units, or gates in backward."""
    machine.check(Case(LSTM, *shape, dtype=machine.choose(arithmetic), lengths=True))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("name", [*(name for name in FUSED if name not in PLAIN), "slow"])
def test_other_cells(machine, algorithm, name, feature, arithmetic):
    """With params, with late gates, and a user's with more states than two."""
    from user_cells import SLOW

    cell = CELLS.get(name, SLOW)
    skip_within(cell, False, algorithm)
    c, dtype = len(cell.states) > 1, machine.choose(arithmetic)
    machine.check(Case(cell, 3, 19, 4, 20, dtype=dtype, cell_states=c, **feature))


def skip_within(cell, layer_norm, algorithm):
    if (cell.late or layer_norm) and algorithm == "step":
        pytest.skip("programs meet within a step")


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2, 17, 3, 16), (3, 5, 4, 136)], ids=str)
def test_late_gates_of_shapes(machine, algorithm, shape, arithmetic):
    skip_within(GRU_RESET_BEFORE, False, algorithm)
    dtype = machine.choose(arithmetic)
    machine.check(Case(GRU_RESET_BEFORE, *shape, dtype=dtype, bias=False, lengths=True))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_late_gates_of_a_user(machine, meeting, arithmetic):
    """With params, and a bias that stays with the product."""
    from late_cell import BOUNDED

    dtype, seldom = machine.choose(arithmetic), {"dropout": True, "zoneout": "training"}
    machine.check(Case(BOUNDED, 3, 19, 4, 20, dtype=dtype, resets=True))
    machine.check(Case(BOUNDED, 3, 19, 4, 20, dtype=dtype, lengths=True, reverse=True, **seldom))


NOISES = {
    "dropout": {"dropout": True},
    "both": {"dropout": True, "zoneout": "training"},
    "zoneout-eval": {"zoneout": "eval"},
}
WAYS = (
    {},
    {"reverse": True},
    {"lengths": True},
    {"resets": True},
    FEATURES["lengths-resets-reverse"],
)


@pytest.mark.parametrize("noise", NOISES.values(), ids=list(NOISES))
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "lstm_peephole", "gru_reset_before"])
@pytest.mark.parametrize("arithmetic, way", [*zip(ARITHMETICS, WAYS, strict=True)], ids=ARITHMETICS)
def test_noise(machine, algorithm, arithmetic, way, name, noise):
    cell, dtype = CELLS[name], machine.choose(arithmetic)
    skip_within(cell, False, algorithm)
    c = len(cell.states) > 1
    machine.check(Case(cell, 3, 17, 4, 20, dtype=dtype, cell_states=c, **noise, **way))


NORMED = ["lstm", "gru", "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole"]
cells_with_and_without_norm = pytest.mark.parametrize(
    "cell, layer_norm",
    [*((cell, False) for cell in FUSED.values()), *((CELLS[name], True) for name in NORMED)],
    ids=lambda c: getattr(c, "name", str(c)),
)


@pytest.mark.parametrize("noise", [{}, NOISES["both"]], ids=["", "noise"])
@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("arithmetic, way", [*zip(ARITHMETICS, WAYS, strict=True)], ids=ARITHMETICS)
def test_layer_norm(machine, meeting, arithmetic, way, name, noise):
    cell, dtype = CELLS[name], machine.choose(arithmetic)
    c, options = len(cell.states) > 1, way | noise
    case = Case(cell, 3, 19, 4, 20, dtype=dtype, cell_states=c, layer_norm=True, **options)
    machine.check(case)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (2, 17, 3, 16), (3, 5, 4, 136)], ids=str)
@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda c: c.name)
def test_layer_norm_of_shapes(machine, meeting, cell, shape, arithmetic):
    dtype = machine.choose(arithmetic)
    machine.check(Case(cell, *shape, dtype=dtype, layer_norm=True, bias=False, lengths=True))


def test_layer_norm_of_more_rows_than_have_room(machine):
    """So many at a time as can meet."""
    machine.device = Device(5, 90, 0)
    case = Case(LSTM, 2, 200, 4, 40, layer_norm=True)
    machine.check(case)
    forward, backward = machine.interpreter.launches[:2], machine.interpreter.launches[2:]
    for launches in (forward, backward):
        assert [n["rows_before"] for n in launches] == [0, 2]
        assert all(n["launch_cooperative_grid"] and n["NORM"] == 2 for n in launches)
    request = Request(LSTM, torch.float32, torch.device("cuda"), 40, 0, layer_norm=True)
    assert "grid (2 launches, 2 x 4 programs" in machine.backend.algorithm(request, 200)
    for wish in (request, request._replace(cell=GRU_RESET_BEFORE, layer_norm=False)):
        assert machine.backend.supports(wish._replace(hidden_size=200)) == (
            "needs 7 multiprocessors for 200 units that meet within a step, CUDA device 0 has 5"
        )


WRONG_NORMS = {
    "another epsilon": ("normalised", "+ EPSILON", "+ 1e-4"),
    "the mean of some": ("normalised", "tl.sum(counts * means, 0) / (N * H)", "mean"),
    "squares about one's own mean": ("normalised", " + counts * means * means", ""),
    "no mean of the gradient": ("of_normalised", "d[n] - alone", "d[n]"),
    "no slope": ("of_normalised", " - hats[n] * times_hats", ""),
    "one's own sums": ("of_normalised", "tl.sum(alone, 0), tl.sum(times_hats, 0)",
                       "sum_of_row(d, N), tl.sum(times_hats, 0)"),
    "the same numbers for both": ("meeting", "(k - 1) * 2", "0 * 2"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, right, wrong", WRONG_NORMS.values(), ids=list(WRONG_NORMS))
def test_planted_norms_are_found(machine, monkeypatch, name, right, wrong, dtype):
    machine.device = DEVICES["grid"]
    case = Case(LSTM, 3, 5, 2, 40, dtype=dtype, layer_norm=True)
    machine.check(case)
    source = source_of(name)
    assert source.count(right) == 1
    planted(monkeypatch, name, source.replace(right, wrong))
    with pytest.raises(AssertionError):
        for seed in range(30):
            machine.check(case, seed)


def test_readme_s_cell(machine, tmp_path, monkeypatch):
    """Runs as it stands there, in fewer than 40 lines, and is right."""
    readme = Path(__file__).parents[1] / "README.md"
    code = readme.read_text().split("<!-- cell:begin -->\n```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    (tmp_path / "readme_cell.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import readme_cell

    assert readme_cell.y.shape == (100, 32, 256)
    for dtype in (torch.float64, torch.float32):
        machine.check(Case(readme_cell.cell, 4, 19, 5, 20, dtype=dtype, lengths=True, resets=True))
    layer, x = readme_cell.layer, torch.randn(3, 2, 64)
    y, _ = layer(x)
    with fusedrnn.backend("triton"):
        torch.testing.assert_close(layer(x)[0], y)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(machine, monkeypatch, tile):
    monkeypatch.setattr(plans, "TILES", (tile,))
    machine.device = DEVICES["grid"]
    machine.check(Case(GRU, 2, 67, 3, 40, dtype=torch.bfloat16, lengths=True, reverse=True))


@pytest.mark.parametrize(
    "cell, layer_norm",
    [(LSTM, False), (GRU, False), (LSTM, True), (GRU, True), (GRU_RESET_BEFORE, False)],
    ids=lambda c: getattr(c, "name", str(c)),
)
def test_programs_in_any_order(machine, cell, layer_norm):
    """Which meet after each step, and for layer norm and late gates within."""
    machine.device = DEVICES["grid"]
    case = Case(cell, 4, 3, 2, 40, lengths=True, layer_norm=layer_norm)
    for seed in range(16 if layer_norm or cell.late else 40):
        machine.check(replace(case, reverse=seed % 2 == 1), seed)


def source_of(name: str) -> str:
    from fusedrnn.backends.triton import kernels

    return inspect.getsource(getattr(kernels, name).fn).removeprefix("@triton.jit\n")


def planted(monkeypatch, name: str, source: str) -> None:
    """A function of the kernels in other words."""
    from triton import jit

    from fusedrnn.backends.triton import kernels, meetings, tiles

    home = inspect.getmodule(getattr(kernels, name).fn)
    path = home.__file__ + f".{name}"
    monkeypatch.setitem(__import__("linecache").cache, path, (0, None, source.splitlines(True), ""))
    scope = dict(vars(home))
    exec(compile(source, path, "exec"), scope)
    for module in (kernels, meetings, tiles):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, jit(scope[name]))


RACES = {
    "no wait": ("wait", "def wait(p_counter, arrivals):\n    tl.debug_barrier()\n"),
    "one step early": (
        "wait",
        "def wait(p_counter, arrivals):\n"
        "    while tl.atomic_add(p_counter, 0, sem='acquire') < arrivals - 1:\n"
        "        pass\n",
    ),
    "no release": (
        "arrive",
        "def arrive(p_counter):\n    tl.atomic_add(p_counter, 1, sem='relaxed')\n",
    ),
}


@pytest.mark.parametrize("name, source", RACES.values(), ids=list(RACES))
def test_planted_races_are_found(machine, monkeypatch, name, source):
    machine.device = DEVICES["grid"]
    case = Case(LSTM, 4, 3, 2, 40)
    machine.check(case)
    planted(monkeypatch, name, source)
    with pytest.raises(AssertionError):
        for seed in range(30):
            machine.check(case, seed)


def test_waiting_in_vain_is_found(machine, monkeypatch):
    machine.device = DEVICES["grid"]
    planted(monkeypatch, "arrive", "def arrive(p_counter):\n    tl.debug_barrier()\n")
    with pytest.raises(AssertionError, match="programs wait in vain"):
        machine.check(Case(LSTM, 4, 3, 2, 40))


ARRAYS = {
    "forward": "gx w_t b_hh gain parameters h0 lengths resets reset_states dropout renew_h renew_c "
    "y c h_prev c_prev saved hats hats_of_state scales late states counters numbers",
    "backward": "dy dc w_hh gain parameters lengths resets dropout renew_h renew_c h_prev c_prev "
    "saved hats hats_of_state scales dgx dgh dproduct dstates dparameters dreset counters numbers",
}
OF_NORMS = {"gain", "hats", "hats_of_state", "scales", "dproduct", "numbers"}


@pytest.mark.parametrize("call, name", [(c, name) for c in ARRAYS for name in ARRAYS[c].split()])
def test_bounds_of_arrays(machine, algorithm, call, name):
    """Each array ends one element before the kernels take it to."""
    not_of = {"sequence": {"counters", "numbers", "h0"}, "grid": set(),
              "step": OF_NORMS | {"counters", "late"}}  # fmt: skip
    if name in not_of[algorithm]:
        pytest.skip("not of this algorithm")
    machine.interpreter.short = call, name
    cell = GRU if name in ("b_hh", "dgh", "dgx", "h_prev") else LSTM
    cell = LSTM_PEEPHOLE if "parameters" in name else cell
    cell = GRU_RESET_BEFORE if name == "late" else cell
    case = Case(cell, 3, 19, 4, 40, lengths=True, cell_states=len(cell.states) > 1)
    if name == "resets":  # which hides h0
        case = replace(case, resets=True, reverse=True)
    if name in ("reset_states", "dreset"):
        case = replace(case, resets=True, reset_states=True)
    if name in ("dropout", "renew_h", "renew_c"):
        case = replace(case, dropout=True, zoneout="training")
    if name in OF_NORMS:
        case = replace(case, layer_norm=True)
    with pytest.raises(AssertionError, match="beyond all arrays"):
        run_case(case, make_inputs(case), machine.backend)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@cells_with_and_without_norm
def test_inference_gives_the_same(machine, algorithm, cell, layer_norm, arithmetic):
    skip_within(cell, layer_norm, algorithm)
    case = Case(cell, 3, 9, 4, 17, dtype=machine.choose(arithmetic), lengths=True)
    case = replace(case, layer_norm=layer_norm)
    inputs = make_inputs(case)
    training = run_case(case, inputs, machine.backend)
    outputs = recurrence(machine.backend, inputs.call(case))
    for name, t in zip(inputs.grads, outputs, strict=True):
        assert torch.equal(t, training[name]), name


def test_small_gradients_of_float16(machine, algorithm):
    machine.choose("float16")
    assert_as_accurate_as_large_ones(machine.backend)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_is_the_same(machine, algorithm, dtype, layer_norm):
    skip_within(LSTM, layer_norm, algorithm)
    case = Case(LSTM, 3, 5, 4, 16, dtype=dtype, layer_norm=layer_norm)
    inputs = make_inputs(case)
    x = inputs.x.clone().requires_grad_()
    weights = inputs.weights._replace(w_hh=inputs.weights.w_hh.clone().requires_grad_())
    y, *_ = recurrence(machine.backend, inputs.call(case)._replace(x=x, weights=weights))
    first, second = (
        torch.autograd.grad(y, (x, weights.w_hh), inputs.grads["y"], retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@cells_with_and_without_norm
def test_a_nan_stays_in_its_sequence(machine, algorithm, cell, layer_norm):
    """A reset keeps it from later steps in forward and from earlier ones in backward."""
    skip_within(cell, layer_norm, algorithm)
    case = Case(cell, 4, 3, 4, 20, dtype=torch.bfloat16, resets=True, layer_norm=layer_norm)
    resets = torch.zeros(4, 3, dtype=torch.bool)
    resets[2] = True
    inputs = replace(make_inputs(case), seq=make_inputs(case).seq._replace(resets=resets))
    inputs.x[0, 0] = torch.nan
    y = run_case(case, inputs, machine.backend)["y"]
    assert y[:2, 0].isnan().all() and not y[2:].isnan().any() and not y[:, 1:].isnan().any()

    inputs = replace(make_inputs(case), seq=inputs.seq)
    inputs.grads["y"][3, 0] = torch.nan
    dx = run_case(case, inputs, machine.backend)["dx"]
    assert not dx[:2].isnan().any() and not dx[:, 1:].isnan().any()


@pytest.mark.parametrize("cell", FUSED.values(), ids=lambda c: c.name)
def test_empty_batch(machine, cell):
    machine.check(Case(cell, T=3, B=0, I=4, H=5))


@pytest.mark.parametrize("numbers", [torch.nan, torch.inf, -torch.inf, 3.4e38], ids=str)
def test_numbers_beside_all_others_in_tf32(machine, numbers):
    """NaN stays NaN, whatever its bits, inf inf, and what is finite finite."""
    machine.choose("tf32")
    case = Case(CELLS["rnn_relu"], 2, 3, 4, 5)
    inputs = make_inputs(case)
    h0 = inputs.h0.clone()
    h0[1] = (
        torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        if numbers != numbers
        else numbers
    )
    out = recurrence(machine.backend, inputs.call(case)._replace(h0=h0))[0]
    expected = recurrence(Reference(), inputs.call(case)._replace(h0=h0))[0]
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-tanh", "RNN-relu"])
def test_beside_torch_nn(machine, kind):
    ours, theirs = twins(kind, 5, 24, 2, bidirectional=True)
    with fusedrnn.backend("triton"):
        assert_equals_torch(ours, theirs, torch.randn(4, 3, 5), make_hx(theirs, 3))


@cells_with_and_without_norm
def test_ops(machine, cell, layer_norm):
    """Their schemas and their shapes while traced."""
    case = Case(
        cell, 3, 4, 5, 6, lengths=True, resets=True, reset_states=True, cell_states=cell is LSTM,
        dropout=True, zoneout="training", layer_norm=layer_norm,
    )  # fmt: skip
    inputs = make_inputs(case)
    masks = *inputs.seq.masks, *inputs.noise.masks
    w_ih, w_hh, b_ih, b_hh, _, *of_units = inputs.weights
    args = (
        inputs.x, w_ih, w_hh, b_ih, b_hh, *of_units, inputs.h0, inputs.c0, *inputs.seq,
        *inputs.noise.masks, cell.key, True, True, cell is LSTM, *inputs.noise.rates,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.fusedrnn.triton_forward
    torch.library.opcheck(forward, args, test_utils=tests)
    y, h_n, c_n, c, *reserve = forward(*args)
    others = (c_n, c) if cell is LSTM else (None, None)
    args = (
        y, others[1], h_n, others[0], inputs.x, w_ih, w_hh, *of_units, *reserve, *masks, cell.key,
        True, True, *inputs.noise.rates, True, True, True, True, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedrnn.triton_backward, args, test_utils=tests)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_compiles_in_one_graph(machine, layer_norm):
    module = fusedrnn.LSTM(4, 20, layer_norm=layer_norm, backend="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (3, 5):
        x = torch.randn(steps, 2, 4, requires_grad=True)
        for run in (module, compiled):
            y, _ = run(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x)
            if run is module:
                expected = y, dx
        torch.testing.assert_close((y, dx), expected)


# ---- The cell alone.


def update_inputs(shape, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows, units, *positions = shape

    def normal(planes):
        t = torch.randn(rows, planes * units, *positions, generator=random, dtype=torch.float64)
        return t.to(dtype)

    return normal(4), normal(1), (normal(1), normal(1))


@pytest.mark.parametrize("which", ["both", "h", "c"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 70), (2, 3, 5, 4), (0, 3)], ids=str)
def test_cell_update(machine, shape, dtype, which):
    """As accurate as the reference in the same dtype, and rounded where it is."""
    gates, c, grads = update_inputs(shape, dtype)
    picked = {"both": slice(2), "h": slice(1), "c": slice(1, 2)}[which]

    def run(backend, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (gates, c)]
        out = fusedrnn.functional.lstm_cell_update(*inputs, backend=backend)
        torch.autograd.backward(out[picked], [d.to(dtype) for d in grads[picked]])
        return [*out, *(t.grad for t in inputs)]

    exact = run("reference", torch.float64)
    given = run("reference", dtype)
    for got, ref, ref64 in zip(run("triton", dtype), given, exact, strict=True):
        assert (got.shape, got.dtype) == (ref.shape, dtype)
        if got.numel():
            error, allowed = ((t.double() - ref64).abs().max() for t in (got, ref))
            wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
            assert error <= 2 * allowed + 16 * wide.eps * ref64.abs().max()


def test_cell_update_can_be_differentiated_twice(machine):
    gates, c, _ = update_inputs((2, 3), torch.float64)
    inputs = gates.requires_grad_(), c.requires_grad_()
    with fusedrnn.backend("triton"):
        update = fusedrnn.functional.lstm_cell_update
        assert torch.autograd.gradcheck(update, inputs)
        assert torch.autograd.gradgradcheck(update, inputs)
        tangents = torch.func.jvp(update, (gates.detach(), c.detach()), (gates, c))
    assert len(tangents) == 2


def test_cell_update_ops(machine):
    gates, c, (dh, _) = update_inputs((3, 5), torch.float32)
    gates, tests = gates.view(3, 4, 5), ("test_schema", "test_faketensor")
    ops = torch.ops.fusedrnn
    torch.library.opcheck(ops.triton_update, (gates, c, "lstm"), test_utils=tests)
    args = (gates, c, dh, None, "lstm")
    torch.library.opcheck(ops.triton_update_backward, args, test_utils=tests)


UPDATES = {
    "update": "gates c h_new c_new",
    "update_backward": "gates c dh_new dc_new dgates dc",
}


@pytest.mark.parametrize("call, name", [(c, name) for c in UPDATES for name in UPDATES[c].split()])
def test_bounds_of_cell_update(machine, call, name):
    machine.interpreter.short = call, name
    gates, c, _ = update_inputs((3, 5), torch.float32)
    inputs = gates.requires_grad_(), c.requires_grad_()
    with pytest.raises(AssertionError, match="beyond all arrays"):
        new = fusedrnn.functional.lstm_cell_update(*inputs, backend="triton")
        torch.autograd.backward(new, (torch.ones_like(c), torch.ones_like(c)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cell_update_with_c_in_float32(machine, dtype):
    """Which is never rounded."""
    gates, c, (dh, dc) = update_inputs((3, 5), dtype)
    found = []
    for name in ("reference", "triton"):
        inputs = gates.clone().requires_grad_(), c.float().requires_grad_()
        h, c_new = fusedrnn.functional.lstm_cell_update(*inputs, backend=name)
        torch.autograd.backward((h, c_new), (dh, dc.float()))
        found.append((h, c_new, *(t.grad for t in inputs)))
    assert [t.dtype for t in found[1]] == [dtype, torch.float32] * 2
    torch.testing.assert_close(found[1], found[0])
