"""What every algorithm of the CUDA kernels must hold, run by the simulator."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from both_directions import assert_as_alone
from small_gradients import assert_as_accurate_as_large_ones

from fusedrnn import recompute
from fusedrnn.backends import Reference
from fusedrnn.backends.native import ARITHMETICS
from fusedrnn.cells import PLAIN
from fusedrnn.recurrence import recurrence, recurrences
from fusedrnn.testing import Case, assert_as_accurate, differentiate, make_inputs, run_case

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


@pytest.fixture(params=["standard", "cluster", "grid"])
def algorithm(machine, request):
    machine.choose(request.param)
    return request.param


@pytest.fixture
def simulated(machine, algorithm):
    return machine.backend


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
    case = Case(PLAIN["rnn_relu"], *shape, dtype=simulated.choose(arithmetic))
    inputs = integers(case)
    expected = run_case(case, inputs, Reference())
    for name, t in run_case(case, inputs, simulated).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_recompute(simulated, cell, arithmetic):
    """The gates that were not kept; and chunks, which run in float32 for 16 bits."""
    case = Case(cell, 7, 9, 4, 17, dtype=simulated.choose(arithmetic), lengths=True, resets=True)
    inputs = make_inputs(case)
    call = inputs.call(case)
    kept = recompute.forward(simulated, "gates", [call])[0].reserve
    made = recompute._with_gates(simulated, call, *kept)
    torch.testing.assert_close(made, simulated.forward(call, True).reserve)
    if arithmetic != "tf32":
        out = run_case(replace(case, recompute="chunks"), inputs, simulated)
        ref64 = run_case(case, inputs.to(torch.float64), Reference())
        assert_as_accurate(case, out, run_case(case, inputs, Reference()), ref64)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("proj", [0, 7])
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_inference_gives_the_same(simulated, algorithm, cell, proj, arithmetic):
    """Which keeps its states between steps, and only those of two steps, or none at all."""
    if proj and (cell.name != "lstm" or algorithm != "standard"):
        pytest.skip("only the LSTM has a projection, by the standard algorithm")
    case = Case(cell, 4, 9, 4, 17, P=proj, dtype=simulated.choose(arithmetic), lengths=True)
    inputs = make_inputs(case)
    training = run_case(case, inputs, simulated)
    outputs = recurrence(simulated, inputs.call(case))
    for name, t in zip(inputs.grads, outputs, strict=True):
        assert torch.equal(t, training[name]), name


@pytest.mark.parametrize("options", [{"P": 7}, {"dtype": torch.bfloat16}], ids=str)
def test_a_second_backward_is_the_same(simulated, options):
    """Backward leaves what forward saved as it was."""
    case = Case(PLAIN["lstm"], 3, 5, 4, 16, **options)
    inputs = make_inputs(case)
    x = inputs.x.clone().requires_grad_()
    weights = inputs.weights._replace(w_hh=inputs.weights.w_hh.clone().requires_grad_())
    y, *_ = recurrence(simulated, inputs.call(case)._replace(x=x, weights=weights))
    first, second = (
        torch.autograd.grad(y, (x, weights.w_hh), inputs.grads["y"], retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_small_gradients_of_float16(simulated):
    assert_as_accurate_as_large_ones(simulated)


@pytest.mark.parametrize("hidden", [16, 136])
def test_the_schedule_changes_no_bit(machine, simulated, hidden):
    case = Case(PLAIN["lstm"], 3, 5, 4, hidden, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    runs = []
    for seed in (1, 2):
        machine.module.set_seed(seed)
        runs.append(run_case(case, inputs, simulated))
    assert all(torch.equal(t, runs[1][name]) for name, t in runs[0].items())


@pytest.mark.parametrize("hidden", [20, 24, 136])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_a_nan_stays_in_its_sequence(simulated, cell, hidden):
    """A reset keeps it from later steps in forward and from earlier ones in backward; units that
    fill a block up must not bring it back."""
    case = Case(PLAIN[cell], 4, 3, 4, hidden, dtype=torch.bfloat16, resets=True)
    inputs = make_inputs(case)
    resets = torch.zeros(4, 3, dtype=torch.bool)
    resets[2] = True
    inputs = replace(inputs, seq=inputs.seq._replace(resets=resets))
    inputs.x[0, 0] = torch.nan
    y = run_case(case, inputs, simulated)["y"]
    assert y[:2, 0].isnan().all() and not y[2:].isnan().any() and not y[:, 1:].isnan().any()

    inputs = replace(make_inputs(case), seq=inputs.seq)
    inputs.grads["y"][3, 0] = torch.nan
    dx = run_case(case, inputs, simulated)["dx"]
    assert not dx[:2].isnan().any() and not dx[:, 1:].isnan().any()


# Algorithm, B, H, and how often forward and backward are launched: twice where there is no room for
# both directions.
BOTH = [
    ("standard", 9, 17, None),
    ("cluster", 9, 24, 1),
    ("cluster", 9, 136, 1),
    ("cluster", 17, 136, 2),
    ("grid", 9, 24, 1),
]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("name, batch, hidden, launches", BOTH)
def test_both_directions_at_once(machine, name, batch, hidden, launches, cell, masked):
    machine.choose(name)
    case = Case(
        PLAIN[cell], 4, batch, 4, hidden, dtype=torch.bfloat16, lengths=masked, resets=masked
    )
    assert_as_alone(machine.backend, case, between=machine.ran)
    if launches:
        expected = {f"forward_{name}": launches, f"backward_{name}": launches}
        assert Counter(machine.module.launched()) == expected


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_both_directions_in_any_arithmetic(simulated, arithmetic):
    """In float16 the gradients of each have a scale of their own."""
    case = Case(PLAIN["lstm"], 3, 9, 4, 24, dtype=simulated.choose(arithmetic), cell_states=True)
    assert_as_alone(simulated, case, factors=(1, 2**-12))


def test_one_of_both_directions_may_be_left_out(simulated):
    """Only its outputs have gradients, or only its inputs ask for them."""
    case = Case(PLAIN["lstm"], 3, 3, 4, 24, dtype=torch.bfloat16)
    one, other = (make_inputs(case, seed) for seed in (0, 1))
    calls = [one.call(case), other.call(case)._replace(reverse=True)]
    expected = run_case(case, one, simulated)
    found = differentiate(case, one, lambda call: recurrences(simulated, [call, calls[1]])[0])
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


ARRAYS = {
    "forward": "gx w_hh w_hr b_hh h0 c0 lengths resets y h_n c_n c h_prev c_prev saved m".split(),
    "between": "h_step states_step m_step".split(),
    "backward": "w_hh_t w_hr_t lengths resets dy dc dh_n dc_n h_prev c_prev saved dgx dgh dh0 dc0 "
    "dh".split(),
}


@pytest.mark.parametrize("call, name", [(c, name) for c in ARRAYS for name in ARRAYS[c]])
def test_bounds_of_arrays(machine, simulated, algorithm, monkeypatch, call, name):
    """Each array is 8 bytes short of what the kernels take it for."""
    cluster = algorithm == "cluster"
    if cluster and (call == "between" or name in ("w_hr", "w_hr_t", "m", "dh")):
        pytest.skip("not of this algorithm")

    def cut(function):
        def run(*args):
            *others, (arrays,) = args
            address, size = arrays[name]
            return function(*others, [{**arrays, name: (address, size - 8)}])

        return run

    kernels = {"forward": machine.module.forward, "backward": machine.module.backward}
    cut_one = "backward" if call == "backward" else "forward"
    kernels[cut_one] = cut(kernels[cut_one])
    monkeypatch.setattr(simulated, "_module", SimpleNamespace(**kernels))
    gru = name in ("b_hh", "dgh", "h_prev")
    options = {} if gru else {"P": 0 if cluster else 7, "cell_states": True}
    if cluster:
        options["dtype"] = torch.bfloat16
    if name not in ("h0", "c0"):  # which a reset at the first step hides
        options["resets"] = True
    case = Case(PLAIN["gru" if gru else "lstm"], 3, 9, 4, 17, lengths=True, **options)
    inputs = make_inputs(case)
    with pytest.raises(RuntimeError, match=f"CUDA kernel .* an access beyond the end of {name}$"):
        if call == "between":  # the steps of an inference
            recurrence(simulated, inputs.call(case))
        else:
            run_case(case, inputs, simulated)
