"""The standard CUDA kernels against the reference, run by the simulator."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cuda_standard_sim
import pytest
import torch
from backend import Simulated

from fusedrnn import backends
from fusedrnn.backends import Reference
from fusedrnn.backends.native import ARITHMETICS
from fusedrnn.cells import CELLS
from fusedrnn.recurrence import recurrence
from fusedrnn.testing import Case, check_case, make_inputs, run_case

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

FEATURES = {
    "plain": {},
    "reverse": {"reverse": True},
    "nobias": {"bias": False},
    "lengths": {"lengths": True},
    "lengths-resets": {"lengths": True, "resets": True},
    "lengths-resets-reverse": {"lengths": True, "resets": True, "reverse": True},
}
# (T, B, I, H): one of each, few rows, off the tiles, in pieces of 16 bytes, several blocks. On the
# simulator's three multiprocessors blocks are small, middle (2, 9, 4, 17) and large (3, 33, ..) in
# forward, small and middle (3, 33, 4, 32) in backward.
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 3), (2, 9, 4, 17), (3, 5, 8, 32), (3, 33, 4, 40), (3, 33, 4, 32)]


@pytest.fixture
def simulated(monkeypatch, request):
    backend = Simulated(cuda_standard_sim)
    monkeypatch.setitem(backends._ALL, "cuda", backend)
    cuda_standard_sim.set_seed(len(request.node.name))
    return backend


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_cells(simulated, cell, shape, feature, arithmetic):
    dtype = simulated.choose(arithmetic)
    check_case(Case(cell, *shape, dtype=dtype, **feature), simulated, tf32=simulated.tf32)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("proj", [1, 7, 16])
def test_projection(simulated, proj, feature, arithmetic):
    dtype = simulated.choose(arithmetic)
    case = Case(CELLS["lstm"], 3, 5, 4, 32, P=proj, dtype=dtype, cell_states=True, **feature)
    check_case(case, simulated, tf32=simulated.tf32)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", [(2, 2, 4, 272), (2, 33, 4, 208)], ids=["small", "large"])
def test_more_rounds_than_stages(simulated, shape, arithmetic):
    """The rings of shared memory wrap around. A round is 128 of k in 16 bits, 64 in tf32, and there
    are H of them in forward, 4 H in backward; a ring has 16 stages in backward's small blocks, 6 in
    its middle ones, 3 in forward's large ones."""
    case = Case(CELLS["lstm"], *shape, dtype=simulated.choose(arithmetic))
    check_case(case, simulated, tf32=simulated.tf32)


def integers(case: Case):
    """Inputs so small and whole that every number of the call is exact in 16 bits, but for sums
    over all rows, which are rounded once."""
    random = torch.Generator().manual_seed(0)

    def whole(t):
        return torch.randint(-1, 2, t.shape, generator=random).to(t.dtype)

    inputs = make_inputs(case)
    return replace(
        inputs,
        x=whole(inputs.x),
        weights=inputs.weights._replace(
            **{n: whole(w) for n, w in inputs.weights._asdict().items() if w is not None}
        ),
        h0=whole(inputs.h0),
        grads={name: whole(g) for name, g in inputs.grads.items()},
    )


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 9, 4, 17), (2, 9, 8, 16), (2, 33, 4, 40)])
def test_tensor_cores_are_exact_on_integers(simulated, shape, arithmetic):
    case = Case(CELLS["rnn_relu"], *shape, dtype=simulated.choose(arithmetic))
    inputs = integers(case)
    expected = run_case(case, inputs, Reference())
    for name, t in run_case(case, inputs, simulated).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("proj", [0, 7])
@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: c.name)
def test_inference_gives_the_same(simulated, cell, proj, arithmetic):
    """Which keeps its states between steps, and only those of two steps."""
    if proj and cell.name != "lstm":
        pytest.skip("only the LSTM has a projection")
    case = Case(cell, 4, 9, 4, 17, P=proj, dtype=simulated.choose(arithmetic), lengths=True)
    inputs = make_inputs(case)
    training = run_case(case, inputs, simulated)
    outputs = recurrence(simulated, inputs.call(case))
    for name, t in zip(inputs.grads, outputs, strict=True):
        assert torch.equal(t, training[name]), name


def test_a_second_backward_is_the_same(simulated):
    """Backward leaves what forward saved as it was."""
    case = Case(CELLS["lstm"], 3, 5, 4, 16, P=7)
    inputs = make_inputs(case)
    x = inputs.x.clone().requires_grad_()
    weights = inputs.weights._replace(w_hh=inputs.weights.w_hh.clone().requires_grad_())
    y, *_ = recurrence(simulated, inputs.call(case)._replace(x=x, weights=weights))
    first, second = (
        torch.autograd.grad(y, (x, weights.w_hh), inputs.grads["y"], retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_schedule_changes_no_bit(simulated):
    case = Case(CELLS["lstm"], 3, 5, 4, 16)
    inputs = make_inputs(case)
    runs = []
    for seed in (1, 2):
        cuda_standard_sim.set_seed(seed)
        runs.append(run_case(case, inputs, simulated))
    assert all(torch.equal(t, runs[1][name]) for name, t in runs[0].items())


ARRAYS = {
    "forward": "gx w_hh w_hr b_hh h0 c0 lengths resets y h_n c_n c h_prev c_prev saved m".split(),
    "between": "h_step states_step m_step".split(),
    "backward": "w_hh_t w_hr_t lengths resets dy dc dh_n dc_n h_prev c_prev saved dgx dgh dh0 dc0 "
    "dh".split(),
}


@pytest.mark.parametrize("call, name", [(c, name) for c in ARRAYS for name in ARRAYS[c]])
def test_bounds_of_arrays(simulated, monkeypatch, call, name):
    """Each array is 8 bytes short of what the kernels take it for."""

    def cut(function):
        def run(*args):
            address, size = args[-1][name]
            return function(*args[:-1], {**args[-1], name: (address, size - 8)})

        return run

    kernels = {"forward": cuda_standard_sim.forward, "backward": cuda_standard_sim.backward}
    cut_one = "backward" if call == "backward" else "forward"
    kernels[cut_one] = cut(kernels[cut_one])
    monkeypatch.setattr(simulated, "_module", SimpleNamespace(**kernels))
    gru = name in ("b_hh", "dgh", "h_prev")
    options = {} if gru else {"P": 7, "cell_states": True}
    case = Case(CELLS["gru" if gru else "lstm"], 3, 9, 4, 17, lengths=True, resets=True, **options)
    inputs = make_inputs(case)
    with pytest.raises(RuntimeError, match=f"CUDA kernel .* an access beyond the end of {name}$"):
        if call == "between":  # the steps of an inference
            recurrence(simulated, inputs.call(case))
        else:
            run_case(case, inputs, simulated)
