"""lengths, resets and per-step cell states against torch.nn on the rows and pieces alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from against_torch import LAYERS, assert_close, count_terms, flatten, leaf, make_hx, twins
from torch import nn
from torch.utils._pytree import tree_map

import fusedrnn
from fusedrnn.backends import Request, by_name
from fusedrnn.cells import LSTM

pytestmark = pytest.mark.usefixtures("one_thread")

T, I, H = 7, 3, 4  # noqa: E741
OPTIONS = {
    "L1": {},
    "L2-D2": {"num_layers": 2, "bidirectional": True},
    "L2-D2-batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "L3-nobias": {"num_layers": 3, "bias": False},
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request):
    missing = by_name(request.param).supports(
        Request(LSTM, torch.float32, torch.device("cpu"), H, 0)
    )
    if missing is not None:
        pytest.skip(f"backend {request.param} {missing}")
    with fusedrnn.backend(request.param):
        yield


def make(kind, options, batch):
    ours, theirs = twins(kind, I, H, dtype=torch.float64, **options)
    shape = (batch, T, I) if ours.batch_first else (T, batch, I)
    return ours, theirs, torch.randn(shape, dtype=torch.float64), make_hx(ours, batch)


def with_gradients(module, x, hx, call):
    """The outputs of ``call(x, hx)`` and the gradient of x, hx and every parameter, by name."""
    x, hx = leaf(x), leaf(hx)
    outputs = flatten(call(x, hx))
    inputs = flatten(x, "x") | flatten(hx, "hx") | dict(module.named_parameters())
    random = torch.Generator().manual_seed(1)
    down = [torch.randn(t.shape, generator=random, dtype=t.dtype) for t in outputs.values()]
    flows = [(t, d) for t, d in zip(outputs.values(), down, strict=True) if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in flows], list(inputs.values()), [d for _, d in flows], allow_unused=True
    )
    zeros = (torch.zeros_like(t) for t in inputs.values())
    return outputs | {
        f"d {name}": z if g is None else g for name, g, z in zip(inputs, grads, zeros, strict=True)
    }


def assert_same(ours, theirs, x, hx, call, expected_call):
    got = with_gradients(ours, x, hx, call)
    expected = with_gradients(theirs, x, hx, expected_call)
    assert_close(got, expected, {}, count_terms(theirs, x))


def rows_alone(module, lengths):
    """What lengths mean: each row cut to its length, run alone, padded with zeros."""
    time = 1 if module.batch_first else 0

    def call(x, hx):
        ys, states = [], []
        for b, length in enumerate(lengths):
            row = x.narrow(1 - time, b, 1).narrow(time, 0, length)
            state = tree_map(lambda s, b=b: s[:, b : b + 1], hx)
            width = (2 if module.bidirectional else 1) * (module.proj_size or module.hidden_size)
            y = x.new_zeros(*(d if i < 2 else width for i, d in enumerate(row.shape)))
            if length:
                y, state = module(row, state)
            pad = (0, 0, 0, T - length) if time else (0, 0, 0, 0, 0, T - length)
            ys.append(nn.functional.pad(y, pad))
            states.append(state)
        return torch.cat(ys, 1 - time), tree_map(lambda *s: torch.cat(s, 1), *states)

    return call


LENGTHS = {
    "mixed": [3, 0, T, 1, T - 1],
    "full": [T] * 3,
    "none": [0, 0],
    "sorted": [5, 4, 2],
    "one": [4],
    "empty": [],
    "tensor": torch.tensor([2, T, 0]),
    "tensor-view": torch.tensor([[2, 9], [0, 9], [4, 9]])[:, 0],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_option
@every_layer
def test_lengths(kind, options, lengths):
    ours, theirs, x, hx = make(kind, options, len(lengths))
    call = rows_alone(theirs, [int(n) for n in lengths]) if len(lengths) else theirs
    assert_same(ours, theirs, x, hx, lambda x, hx: ours(x, hx, lengths=lengths), call)


@every_layer
def test_full_lengths_change_nothing(kind):
    ours, _, x, hx = make(kind, OPTIONS["L2-D2"], 3)
    with_lengths = flatten(ours(x, hx, lengths=[T, T, T]))
    torch.testing.assert_close(with_lengths, flatten(ours(x, hx)), rtol=0, atol=0)


@every_layer
def test_unbatched(kind):
    ours, _, x, hx = make(kind, {"bidirectional": True}, 1)
    resets = torch.arange(T) == 2
    expected = ours(x, hx, lengths=[5], resets=resets.unsqueeze(1))
    one = tree_map(lambda s: s.squeeze(1), hx)
    got = ours(x.squeeze(1), one, lengths=[5], resets=resets)
    squeezed = {name: t.squeeze(1) for name, t in flatten(expected).items()}
    torch.testing.assert_close(flatten(got), squeezed, rtol=0, atol=0)


def single(module, k, direction):
    """One layer and direction of a torch.nn layer as a layer of its own, on the same parameters."""
    inputs = module.input_size if k == 0 else module.weight_ih_l1.shape[1]
    extra = {"proj_size": module.proj_size} if module.mode == "LSTM" else {}
    if module.mode[:3] == "RNN":
        extra["nonlinearity"] = module.nonlinearity
    layer = type(module)(inputs, H, bias=module.bias, dtype=torch.float64, **extra)
    for name in list(layer._parameters):
        source = name.replace("_l0", f"_l{k}") + "_reverse" * direction
        layer._parameters[name] = getattr(module, source)
    layer._init_flat_weights()
    return layer


def row_in_pieces(layer, row, state, cuts, reverse):
    """One row cut before each of ``cuts``: the piece that comes first in its direction is entered
    with ``state`` (zeros if the forward direction begins at a cut), the others with zeros."""
    edges = [0, *(t for t in cuts if 0 < t < len(row)), len(row)]
    spans = list(itertools.pairwise(edges))[:: -1 if reverse else 1]
    parts = []
    for n, (start, end) in enumerate(spans):
        if n or (0 in cuts and not reverse):
            state = tree_map(torch.zeros_like, state)
        piece = row[start:end]
        part, state = layer(piece.flip(0) if reverse else piece, state)
        parts.append(part)
    return (torch.cat(parts).flip(0) if reverse else torch.cat(parts)), state


def pieces_alone(module, cuts, lengths):
    """What resets mean, layer by layer, direction by direction and row by row."""

    def call(x, hx):
        y, ends = x.transpose(0, 1) if module.batch_first else x, []
        for k in range(module.num_layers):
            outs = []
            for direction in range(2 if module.bidirectional else 1):
                layer, rows, states = single(module, k, direction), [], []
                for b, length in enumerate(lengths):
                    k_row = (slice(len(ends), len(ends) + 1), slice(b, b + 1))
                    state = tree_map(lambda s, index=k_row: s[index], hx)
                    row = y.new_zeros(0, 1, module.proj_size or H)
                    if length:
                        piece = y[:length, b : b + 1]
                        row, state = row_in_pieces(layer, piece, state, cuts[b], direction)
                    rows.append(nn.functional.pad(row, (0, 0, 0, 0, 0, T - length)))
                    states.append(state)
                outs.append(torch.cat(rows, 1))
                ends.append(tree_map(lambda *s: torch.cat(s, 1), *states))
            y = torch.cat(outs, -1)
        state = tree_map(lambda *s: torch.cat(s), *ends)
        return y.transpose(0, 1) if module.batch_first else y, state

    return call


CUTS = {
    "some": ([[3], [], [0, 1], [2, 4, 6]], [T] * 4),
    "start": ([[0], [0]], [T] * 2),
    "all": ([[*range(T)], [*range(T)]], [T] * 2),
    "none": ([[], []], [T] * 2),
    "lengths": ([[3, 5], [0, 2], [2, 4, 6], [1]], [5, 0, T, 1]),
}


@pytest.mark.parametrize(("cuts", "lengths"), CUTS.values(), ids=CUTS)
@every_option
@every_layer
def test_resets(kind, options, cuts, lengths):
    ours, theirs, x, hx = make(kind, options, len(cuts))
    resets = torch.zeros(T, len(cuts), dtype=torch.bool)
    for b, times in enumerate(cuts):
        resets[times, b] = True
    resets = resets.t() if ours.batch_first else resets
    kwargs = {"resets": resets} | ({} if lengths == [T] * len(cuts) else {"lengths": lengths})
    call = pieces_alone(theirs, cuts, lengths)
    assert_same(ours, theirs, x, hx, lambda x, hx: ours(x, hx, **kwargs), call)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cell_states(bidirectional, proj_size):
    """Of the last layer, in the layout of y, with their gradient: against a loop of one step."""
    options = {"bidirectional": bidirectional, "proj_size": proj_size}
    ours, theirs = twins("LSTM", I, H, dtype=torch.float64, **options)
    x, hx = torch.randn(T, 2, I, dtype=torch.float64), make_hx(ours, 2)

    def loop(x, hx):
        ys, cs, ends = [], [], []
        for direction in range(1 + bidirectional):
            layer = nn.LSTM(I, H, proj_size=proj_size, dtype=torch.float64)
            for name in list(layer._parameters):
                layer._parameters[name] = getattr(theirs, name + "_reverse" * direction)
            layer._init_flat_weights()
            state = tuple(s[direction : direction + 1] for s in hx)
            y, c = [None] * T, [None] * T
            for t in range(T)[:: -1 if direction else 1]:
                y[t], state = layer(x[t : t + 1], state)
                c[t] = state[1]
            ys.append(torch.cat(y))
            cs.append(torch.cat(c))
            ends.append(state)
        state = tuple(torch.cat(s) for s in zip(*ends, strict=True))
        return torch.cat(ys, -1), state, torch.cat(cs, -1)

    assert_same(ours, theirs, x, hx, lambda x, hx: ours(x, hx, return_cell_states=True), loop)


@pytest.mark.parametrize("proj_size", [0, 2])
def test_layouts_of_cell_states(proj_size):
    options = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size}
    layer = fusedrnn.LSTM(I, H, **options)
    first = fusedrnn.LSTM(I, H, batch_first=True, **options)
    first.load_state_dict(layer.state_dict())
    x, lengths = torch.randn(T, 3, I), [5, 7, 2]
    y, (_, c_n), c = layer(x, lengths=lengths, return_cell_states=True)
    assert c.shape == (T, 3, 2 * H) and y.shape[:2] == c.shape[:2]
    ends = [c[n - 1, b, :H] for b, n in enumerate(lengths)]
    assert torch.equal(torch.stack(ends), c_n[2]) and torch.equal(c[0, :, H:], c_n[3])
    assert not any(c[n:, b].any() for b, n in enumerate(lengths))
    swapped = first(x.transpose(0, 1), lengths=lengths, return_cell_states=True)[2]
    assert torch.equal(swapped, c.transpose(0, 1))
    one = layer(x[:, 1], return_cell_states=True)[2]
    torch.testing.assert_close(one, layer(x, return_cell_states=True)[2][:, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    got = layer(packed, return_cell_states=True)[2]
    assert torch.equal(nn.utils.rnn.pad_packed_sequence(got)[0], c)


BAD = {
    "lengths negative": ({"lengths": [1, -1, 2]}, r"lengths should be in \[0, 7\], got \[1, -1, 2"),
    "lengths long": ({"lengths": [1, 8, 2]}, r"lengths should be in \[0, 7\], got \[1, 8, 2\]"),
    "lengths few": ({"lengths": [1, 2]}, r"int64 of shape \[3\], got torch.int64 of shape \[2\]"),
    "lengths none": ({"lengths": []}, r"int64 of shape \[3\], got torch.int64 of shape \[0\]"),
    "lengths scalar": ({"lengths": 3}, r"int64 of shape \[3\], got torch.int64 of shape \[\]"),
    "lengths 2-D": ({"lengths": torch.ones(3, 1).long()}, r"int64 of shape \[3\], got .*\[3, 1\]"),
    "lengths int32": ({"lengths": torch.ones(3).int()}, r"int64 of shape \[3\], got torch.int32"),
    "lengths float": ({"lengths": [1.5, 2.0, 3.0]}, r"int64 of shape \[3\], got torch.float32"),
    "lengths bool": ({"lengths": [True] * 3}, r"int64 of shape \[3\], got torch.bool"),
    "lengths meta": ({"lengths": torch.ones(3, device="meta").long()}, "on the CPU or on cpu as"),
    "resets dtype": ({"resets": torch.zeros(T, 3)}, r"bool of shape \[7, 3\], got torch.float32"),
    "resets shape": ({"resets": torch.zeros(3, T).bool()}, r"bool of shape \[7, 3\], got .*\[3, 7"),
    "resets 1-D": ({"resets": torch.zeros(T).bool()}, r"bool of shape \[7, 3\], got .*\[7\]"),
    "resets meta": ({"resets": torch.zeros(T, 3, device="meta").bool()}, "resets should be on cpu"),
}


@pytest.mark.parametrize(("kwargs", "sentence"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_values(kind, kwargs, sentence):
    ours, theirs, x, hx = make(kind, {}, 3)
    with pytest.raises(ValueError, match=sentence):
        ours(x, hx, **kwargs)
    assert_same(ours, theirs, x, hx, ours, theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_bad_combinations(kind):
    ours, _, x, _ = make(kind, {}, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, [7, 6, 5])
    for kwargs in ({"lengths": [7, 6, 5]}, {"resets": torch.zeros(T, 3).bool()}):
        with pytest.raises(ValueError, match=r"PackedSequence takes neither lengths .* nor resets"):
            ours(packed, **kwargs)
    with pytest.raises(TypeError, match="resets should be a bool tensor, got list"):
        ours(x, resets=[True])
    with pytest.raises(ValueError, match=r"shape \[7\] for unbatched input, got \[7, 1\]"):
        ours(x[:, 0], resets=torch.zeros(T, 1).bool())
    with pytest.raises(TypeError, match="positional argument"):
        ours(x, None, [7, 6, 5])
    if ours.mode != "LSTM":
        with pytest.raises(TypeError, match="unexpected keyword argument 'return_cell_states'"):
            ours(x, return_cell_states=True)
