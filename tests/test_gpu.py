"""The backends of GPUs on a device: every call as accurate as the reference on the CPU, and what
only a device has: streams, graphs, 64-bit addresses, other devices."""

from __future__ import annotations

import pytest
import torch
from against_torch import LAYERS, assert_equals_torch, make_hx, twins
from both_directions import assert_as_alone
from small_gradients import assert_as_accurate_as_large_ones

import fusedrnn
from fusedrnn.backends import by_name, cuda
from fusedrnn.backends.native import Device
from fusedrnn.cells import CELLS, GRU, LSTM, PLAIN
from fusedrnn.recurrence import recurrence
from fusedrnn.testing import Case, check_case, make_inputs, run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]

DEVICE = "cuda"
ARITHMETICS = ["float16", "bfloat16", "tf32", "float32", "float64"]
FEATURES = {
    "plain": {},
    "reverse": {"reverse": True},
    "nobias": {"bias": False},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "lengths-resets-reverse": {"lengths": True, "resets": True, "reverse": True},
}
# (T, B, I, H): one of each, few rows, off the tiles, in pieces of 16 bytes, blocks, no rows.
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 3), (2, 9, 4, 17), (5, 33, 8, 40), (4, 70, 16, 96), (3, 0, 4, 5)]


@pytest.fixture(autouse=True)
def exact_products():
    """PyTorch's products and cuDNN round nothing that they are not told to."""
    cudnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    cudnn.fp32_precision = "ieee"
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    yield
    cudnn.fp32_precision = "none"
    matmul.allow_fp16_reduced_precision_reduction = True
    matmul.allow_bf16_reduced_precision_reduction = True


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return request.param


def check(cell, *shape, arithmetic, device=DEVICE, backend="cuda", **options):
    tf32 = arithmetic == "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    dtype = torch.float32 if tf32 else getattr(torch, arithmetic)
    case = Case(cell, *shape, dtype=dtype, **options)
    check_case(case, by_name(backend), tf32=tf32, device=device)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_cells(cell, shape, feature, arithmetic):
    check(cell, *shape, arithmetic=arithmetic, **feature)


# All units in a program, not all of a block filled; programs that meet.
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("reset_states", [False, True])
@pytest.mark.parametrize("shape", [(5, 33, 8, 20), (4, 19, 8, 100), (3, 40, 8, 520)], ids=str)
@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda c: c.name)
def test_triton(cell, shape, reset_states, arithmetic):
    check(cell, *shape, arithmetic=arithmetic, backend="triton", lengths=True, resets=True,
          reset_states=reset_states)  # fmt: skip


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("cell", PLAIN.values(), ids=lambda c: c.name)
def test_triton_with_a_launch_a_step(monkeypatch, cell, arithmetic):
    monkeypatch.setattr(cuda, "device", lambda index: Device(0, 90, 0))
    check(cell, 4, 70, 8, 72, arithmetic=arithmetic, backend="triton", reverse=True, resets=True,
          reset_states=True)  # fmt: skip


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(
    "name", [*(n for n, cell in CELLS.items() if n not in PLAIN and cell.triton), "slow"]
)
def test_triton_with_other_cells(name, arithmetic):
    from user_cells import SLOW

    cell = CELLS.get(name, SLOW)
    check(cell, 4, 19, 8, 40, arithmetic=arithmetic, backend="triton", cell_states=True)


# All units in a program; programs that meet; as many rows at a time as can.
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", [(5, 33, 8, 20), (3, 40, 8, 520), (2, 1100, 8, 520)], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_coupled_peephole"])
def test_triton_with_layer_norm(name, shape, arithmetic):
    check(CELLS[name], *shape, arithmetic=arithmetic, backend="triton", layer_norm=True,
          lengths=True, resets=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_triton_cell_update(dtype):
    gates, c = torch.randn(40, 4 * 70, 3).to(dtype), torch.randn(40, 70, 3).to(dtype)
    found = []
    for name, device in (("reference", "cpu"), ("triton", DEVICE)):
        inputs = [t.to(device).detach().requires_grad_() for t in (gates, c)]
        h, c_new = fusedrnn.functional.lstm_cell_update(*inputs, backend=name)
        torch.autograd.backward((h, c_new), (c.to(device), c.to(device)))
        found.append([t.cpu() for t in (h, c_new, *(t.grad for t in inputs))])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("proj", [1, 7, 16])
def test_projection(proj, feature, arithmetic):
    check(LSTM, 3, 9, 4, 32, arithmetic=arithmetic, P=proj, cell_states=True, **feature)


@pytest.mark.parametrize("hidden", [24, 136, 640])
def test_small_gradients_of_float16(backend, hidden):
    assert_as_accurate_as_large_ones(by_name(backend), DEVICE, hidden)


# A launch a step; one by a block, by clusters, by teams; teams of forward alone at once.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("batch, hidden", [(9, 40), (9, 136), (40, 512), (8, 640), (8, 1024)])
@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda c: c.name)
def test_both_directions_at_once(cell, batch, hidden, arithmetic, masked):
    tf32 = arithmetic == "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    dtype = torch.float32 if tf32 else getattr(torch, arithmetic)
    case = Case(cell, 4, batch, 4, hidden, dtype=dtype, lengths=masked, resets=masked)
    assert_as_alone(by_name("cuda"), case, DEVICE)


@pytest.mark.parametrize("shape", [(65_600, 1, 1, 2), (2, 70_000, 1, 3)], ids=str)
def test_more_than_16_bits_count(backend, shape):
    """Steps, or rows; the last ones as the reference makes them."""
    case = Case(PLAIN["gru"], *shape)
    inputs = make_inputs(case).on(DEVICE)
    out = run_case(case, inputs, by_name(backend))
    rows, steps = slice(-8, None), slice(-600, None)
    x, dy = inputs.x[steps, rows], inputs.grads["y"][steps, rows]
    h0 = out["y"][-601, rows] if case.T > 600 else inputs.h0[rows]
    x, reference = x.clone().requires_grad_(), by_name("reference")
    y, h_n = recurrence(reference, inputs.call(case)._replace(x=x, h0=h0))
    torch.autograd.backward((y, h_n), (dy, inputs.grads["h_n"][rows]))
    torch.testing.assert_close(out["y"][steps, rows], y)
    torch.testing.assert_close(out["dx"][steps, rows], x.grad)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("batch, hidden", [(8, 1160), (32, 1024), (128, 1024), (33, 1028)])
@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda c: c.name)
def test_blocks_of_every_size(cell, batch, hidden, arithmetic):
    """On 132 multiprocessors small, middle and large ones, and rows that divide into 8 bytes; more
    rounds of k than a ring of shared memory has stages."""
    check(cell, 3, batch, 8, hidden, arithmetic=arithmetic)


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize(
    "batch, hidden",
    [(9, 100), (3, 136), (130, 200), (8, 512), (20, 776), (70, 776), (128, 1024)],
)
@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda c: c.name)
def test_one_launch_for_all_steps(cell, batch, hidden, feature, arithmetic):
    """By one block, by clusters of one and of two tiles, with weights in shared memory too; by a
    grid whose teams have two tiles, five, and eight or sixteen. On an H200; in tf32 also 512 units
    are a grid's."""
    check(cell, 6, batch, 8, hidden, arithmetic=arithmetic, **feature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [100, 256, 512, 1023, 1024])
def test_inference_of_many_steps_is_the_same(backend, hidden, dtype):
    """Whose states take turns in two buffers, which kernels that overlap read and write, or in four
    that blocks exchange."""
    module = fusedrnn.LSTM(8, hidden, backend=backend).to(DEVICE, dtype)
    x = torch.randn(600, 16, 8).to(DEVICE, dtype)
    training, _ = module(x)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x)[0], training)


def test_addresses_of_64_bits(backend):
    """The last rows of arrays of more than 2^31 elements, beside a call of these rows alone."""
    steps, batch, hidden = 9, 2**20, 64
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB of memory are free, 40 are needed")
    module = fusedrnn.LSTM(1, hidden, device=DEVICE, dtype=torch.float16, backend=backend)
    x = torch.randn(steps, batch, 1, device=DEVICE, dtype=torch.float16)
    found = []
    for rows in (x, x[:, -64:]):
        rows = rows.clone().requires_grad_()
        y, _ = module(rows)
        y.sum().backward()
        found.append((y[:, -64:].detach(), rows.grad[:, -64:]))
    for all_rows, alone in zip(*found, strict=True):
        torch.testing.assert_close(all_rows, alone)


def layer(backend, dtype=torch.float32):
    """A module of the backend, and inputs."""
    proj_size = 16 if backend == "cuda" else 0
    module = fusedrnn.LSTM(8, 40, 2, bidirectional=True, proj_size=proj_size, backend=backend)
    return module.to(DEVICE, dtype), torch.randn(5, 9, 8).to(DEVICE, dtype)


def outputs_and_gradients(module, x):
    x = x.detach().requires_grad_()
    y, (h_n, c_n) = module(x)
    total = y.square().sum() + h_n.sum() + c_n.sum()
    return y, h_n, c_n, *torch.autograd.grad(total, [x, *module.parameters()])


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_twice(backend, dtype):
    module, x = layer(backend, dtype)
    assert_equal(outputs_and_gradients(module, x), outputs_and_gradients(module, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_second_backward_is_the_same(backend, dtype):
    module, x = layer(backend, dtype)
    y, _ = module(x.requires_grad_())
    inputs = [x, *module.parameters()]
    first, second = (torch.autograd.grad(y.sum(), inputs, retain_graph=True) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inference_gives_the_same(backend, dtype):
    module, x = layer(backend, dtype)
    training = module(x.requires_grad_())
    with torch.no_grad():
        inference = module(x)
    assert_equal((training[0], *training[1]), (inference[0], *inference[1]))


def test_capture_in_a_graph(backend):
    module, x = layer(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs_and_gradients(module, x)  # what is set up once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(module, x)
    for _ in range(2):
        x.copy_(torch.randn(x.shape))
        graph.replay()
        assert_equal(captured, outputs_and_gradients(module, x))


def test_runs_on_the_stream_of_the_caller(backend):
    """Between what is queued there before, its input, and after, its input again."""
    module, x = layer(backend)
    expected = outputs_and_gradients(module, x)
    late, stream = torch.full_like(x, float("nan")), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = outputs_and_gradients(module, late)
        late.fill_(float("nan"))
    stream.synchronize()
    assert_equal(got, expected)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_device_that_is_not_current(backend, arithmetic):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    proj = 7 if backend == "cuda" else 0
    options = {"P": proj, "device": "cuda:1", "backend": backend}
    check(LSTM, 3, 9, 4, 32, arithmetic=arithmetic, lengths=True, **options)
    assert torch.cuda.current_device() == 0


def test_the_host_never_waits(backend):
    case = Case(LSTM, 5, 9, 8, 40, lengths=True, resets=True)
    inputs, (module, x) = make_inputs(case).on(DEVICE), layer(backend)
    run_case(case, inputs, by_name(backend))
    outputs_and_gradients(module, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_case(case, inputs, by_name(backend))
        outputs_and_gradients(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sizes", [(8, 40), (3, 129)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_beside_torch_nn(backend, kind, sizes):
    if kind == "LSTM-proj" and backend == "triton":
        pytest.skip("it has no projection")
    ours, theirs = twins(kind, *sizes, 2, bidirectional=True)
    input, hx = torch.randn(7, 5, sizes[0]), make_hx(theirs, 5)
    hx = tuple(h.to(DEVICE) for h in hx) if isinstance(hx, tuple) else hx.to(DEVICE)
    with fusedrnn.backend(backend):
        assert_equals_torch(ours.to(DEVICE), theirs.to(DEVICE), input.to(DEVICE), hx)


# What is on the CPU, and the sentence.
MISPLACED = {
    "x": "Input and parameter tensors are not at the same device, found input tensor at cpu and "
    "parameter tensor at cuda:0",
    "hx": "Input and hidden tensors are not at the same device, found input tensor at cuda:0 and "
    "hidden tensor at cpu",
    "parameter": "Input and parameter tensors are not at the same device, found input tensor at "
    "cuda:0 and parameter tensor at cpu",
    "resets": "resets should be on cuda:0 as x is, got cpu",
}


@pytest.mark.parametrize("what", MISPLACED)
def test_a_tensor_on_the_cpu(what):
    module = fusedrnn.GRU(3, 4, backend="cuda").to(DEVICE)
    x, hx = torch.randn(5, 2, 3, device=DEVICE), torch.zeros(1, 2, 4, device=DEVICE)
    resets = torch.zeros(5, 2, dtype=torch.bool, device=DEVICE)
    if what == "x":
        x, hx, resets = x.cpu(), None, None
    elif what == "hx":
        hx = hx.cpu()
    elif what == "resets":
        resets = resets.cpu()
    else:
        module.bias_hh_l0 = torch.nn.Parameter(module.bias_hh_l0.cpu())
    with pytest.raises((RuntimeError, ValueError)) as error:
        module(x, hx, resets=resets)
    assert str(error.value) == MISPLACED[what]


def test_a_tensor_on_the_cpu_within_an_op():
    case = Case(PLAIN["gru"], 3, 2, 3, 4)
    call = make_inputs(case).on(DEVICE).call(case)
    weights = call.weights._replace(w_hh=call.weights.w_hh.cpu())
    with pytest.raises(RuntimeError, match="w_hh is on the CPU, expected CUDA device 0"):
        recurrence(by_name("cuda"), call._replace(weights=weights))
