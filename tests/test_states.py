"""Initial states, initialisations, and chunks of a sequence."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn.backends import native

KINDS = {"LSTM": fusedrnn.LSTM, "GRU": fusedrnn.GRU, "RNN": fusedrnn.RNN}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
others = pytest.mark.parametrize("initial_state", ["learned", "random"])


def layer(kind, initial_state, **options):
    """With states that are not zero."""
    module = kind(3, 5, 2, bidirectional=True, initial_state=initial_state, **options)
    for state in states(module):
        nn.init.normal_(state)
    return module


def states(module):
    return [getattr(module, name) for name in ("h0", "c0") if hasattr(module, name)]


def expanded(module, rows):
    """The states as an hx."""
    hx = tuple(s.unsqueeze(1).expand(-1, rows, -1) for s in states(module))
    return hx if len(hx) > 1 else hx[0]


@others
@kinds
def test_names_shapes_and_first_values(kind, initial_state):
    """After torch.nn's own parameters, which a seed gives the same values."""
    torch.manual_seed(0)
    plain = kind(3, 5, 2, bidirectional=True)
    torch.manual_seed(0)
    module = kind(3, 5, 2, bidirectional=True, initial_state=initial_state)
    names = ["h0", "c0"][: len(states(module))]
    assert len(names) == (2 if kind is fusedrnn.LSTM else 1)
    assert list(module.state_dict()) == list(plain.state_dict()) + names
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, module.state_dict()[name]), name
    assert len(module.all_weights) == 4 and all(len(w) == 4 for w in module.all_weights)
    for state in states(module):
        assert state.shape == (4, 5)
        assert isinstance(state, nn.Parameter) == (initial_state == "learned")
        assert state.any() == (initial_state == "random")
        assert state.abs().max() <= 5**-0.5


def test_sizes_with_a_projection():
    module = fusedrnn.LSTM(3, 5, proj_size=2, initial_state="learned", dtype=torch.float64)
    assert module.h0.shape == (1, 2) and module.c0.shape == (1, 5)
    assert module.h0.dtype == module.c0.dtype == torch.float64
    assert module(torch.randn(4, 2, 3).double())[0].shape == (4, 2, 2)


@others
@kinds
def test_is_hx_where_none_is_given(kind, initial_state):
    module, x = layer(kind, initial_state), torch.randn(4, 2, 3)
    expected = module(x, expanded(module, 2))
    torch.testing.assert_close(module(x), expected)
    other = tuple(torch.zeros(4, 2, 5) for _ in states(module))
    other = other if len(other) > 1 else other[0]
    assert not torch.allclose(module(x, other)[0], expected[0])
    unbatched = module(x[:, 0])
    torch.testing.assert_close(unbatched[0], expected[0][:, 0])
    packed = pack_sequence([x[:4, 0], x[:2, 1]])
    lengths = module(x, lengths=[4, 2])
    torch.testing.assert_close(module(packed)[1], lengths[1])


@kinds
def test_gradients_are_summed_over_the_batch(kind):
    module, x = layer(kind, "learned"), torch.randn(4, 7, 3)
    module(x)[0].square().sum().backward()
    hx = expanded(module, 7)
    hx = (hx,) if isinstance(hx, torch.Tensor) else hx
    hx = tuple(h.detach().clone().requires_grad_() for h in hx)
    y, _ = module(x, hx if len(hx) > 1 else hx[0])
    grads = torch.autograd.grad(y.square().sum(), hx)
    for state, grad in zip(states(module), grads, strict=True):
        torch.testing.assert_close(state.grad, grad.sum(1))


@others
@kinds
def test_enters_at_resets(kind, initial_state):
    """As if the parts were sequences of their own, in either direction; hx only at the ends."""
    module, x = layer(kind, initial_state), torch.randn(6, 1, 3)
    module = kind(3, 5, bidirectional=True, initial_state=initial_state)
    for state in states(module):
        nn.init.normal_(state)
    resets = torch.zeros(6, 1, dtype=torch.bool)
    resets[2] = True
    y, _ = module(x, resets=resets)
    parts = [module(x[:2])[0], module(x[2:])[0]]
    torch.testing.assert_close(y, torch.cat(parts))
    y.sum().backward()
    if initial_state == "learned":
        grads = [s.grad.clone() for s in states(module)]
        module.zero_grad()
        sum(module(part)[0].sum() for part in (x[:2], x[2:])).backward()
        torch.testing.assert_close(grads, [s.grad for s in states(module)])
    hx = expanded(module, 1)
    zeros = torch.zeros_like(hx[0] if isinstance(hx, tuple) else hx)
    y, _ = module(x, (zeros, zeros) if isinstance(hx, tuple) else zeros, resets=resets)
    torch.testing.assert_close(y[2:, :, :5], parts[1][..., :5])
    torch.testing.assert_close(y[:2, :, 5:], parts[0][..., 5:])


@pytest.mark.skipif(not native.isas(), reason="no native library")
@others
@kinds
def test_resets_in_a_stack(kind, initial_state):
    """Each layer and direction takes its own, recomputed or not."""
    module, x = layer(kind, initial_state), torch.randn(7, 4, 3)
    resets = torch.rand(7, 4) < 0.4
    parameters = list(module.parameters())
    found = []
    for backend, recompute in (("reference", "none"), ("cpu", "none"), ("cpu", "chunks")):
        module.backend, module.recompute = backend, recompute
        y, _ = module(x, resets=resets)
        found.append((y, *torch.autograd.grad(y.square().sum(), parameters)))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0])


@others
@kinds
def test_resets_under_autocast(kind, initial_state):
    """What enters there has the dtype of all else."""
    module, x = layer(kind, initial_state), torch.randn(7, 4, 3)
    resets = torch.rand(7, 4) < 0.4
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x, resets=resets)
    expected, _ = copy.deepcopy(module).bfloat16()(x.bfloat16(), resets=resets)
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_random_states_stay():
    module = fusedrnn.LSTM(3, 5, initial_state="random")
    before = [s.clone() for s in states(module)]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.randn(4, 2, 3))[0].sum().backward()
    optimizer.step()
    assert all(map(torch.equal, states(module), before))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, states(other), before))
    other = fusedrnn.LSTM(3, 5, initial_state="random")
    other.load_state_dict(module.state_dict())
    assert all(map(torch.equal, states(other), before))


@others
def test_in_other_dtypes_and_compiled(initial_state):
    module, x = layer(fusedrnn.LSTM, initial_state), torch.randn(4, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = module(x, resets=torch.zeros(4, 2, dtype=torch.bool))
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    assert module.double()(x.double())[0].dtype == torch.float64


def test_what_torch_nn_has_not():
    model = nn.Sequential(fusedrnn.GRU(3, 4), fusedrnn.LSTM(3, 4, initial_state="learned"))
    with pytest.raises(ValueError, match=r"1 \(LSTM\) has initial_state='learned', which torch.nn"):
        fusedrnn.to_torch(model)
    assert type(model[0]) is fusedrnn.GRU
    model = fusedrnn.to_torch(fusedrnn.LSTM(3, 4, forget_bias=1.0))
    assert type(model) is nn.LSTM and repr(model) == "LSTM(3, 4)"


class Own(nn.LSTM):
    """With attributes that mean something else to ours."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.initial_state = nn.Parameter(torch.randn(1, 4))
        self.backend = "gloo"

    def forward(self, x):
        h = self.initial_state.unsqueeze(1).expand(-1, x.shape[1], -1).contiguous()
        return super().forward(x, (h, h))


def test_attributes_of_torch_nn_s_own():
    module, x = Own(3, 4), torch.randn(5, 2, 3)
    expected, _ = module(x)
    with fusedrnn.patch():
        torch.testing.assert_close(module(x)[0], expected)
        assert fusedrnn.explain(module, x).backend is not None
    model = nn.Sequential(nn.GRU(3, 4), nn.LSTM(4, 4))
    model[1].initial_state = "mine"
    with pytest.raises(ValueError, match=r"1 \(LSTM\) has an attribute initial_state, as ours"):
        fusedrnn.convert(model)
    assert type(model[0]) is nn.GRU
    del model[1].initial_state
    fusedrnn.convert(model)
    assert model[1].initial_state == "zeros" and model[1].forget_bias is None
    with pytest.raises(AttributeError, match="initial_state"):
        model[1].initial_state = "learned"


@kinds
def test_reset_parameters_takes_torch_nn_s_random_numbers(kind):
    drawn = []
    for options in ({}, {"initial_state": "learned"}):
        module = kind(3, 4, **options)
        torch.manual_seed(1)
        module.reset_parameters()
        drawn.append([torch.rand(3), *(p for n, p in module.named_parameters() if n[1] != "0")])
    torch.testing.assert_close(drawn[0], drawn[1])


def test_errors_and_repr():
    for value in ("1", True, float("nan")):
        with pytest.raises(ValueError, match="forget_bias should be a finite number, got"):
            fusedrnn.LSTM(3, 4, forget_bias=value)
    with pytest.raises(ValueError, match=r"forget_bias=1\.0 needs bias=True"):
        fusedrnn.LSTMCell(3, 4, bias=False, forget_bias=1.0)
    with pytest.raises(ValueError, match=r"one of \('zeros', 'learned', 'random'\), got 'ones'"):
        fusedrnn.RNN(3, 4, initial_state="ones")
    with pytest.raises(ValueError, match=r"forget_bias=1\.0 needs bias=True, got bias=False"):
        fusedrnn.LSTM(3, 4, bias=False, forget_bias=1.0)
    assert repr(fusedrnn.LSTM(3, 4)) == "LSTM(3, 4)"
    module = fusedrnn.LSTM(3, 4, forget_bias=1, initial_state="random", backend="cpu")
    assert repr(module) == "LSTM(3, 4, forget_bias=1.0, initial_state='random', backend='cpu')"


def test_forget_bias():
    module = fusedrnn.LSTM(3, 5, 2, bidirectional=True, forget_bias=1.0)
    for _ in range(2):
        for name, parameter in module.named_parameters():
            i, f, *rest = parameter.chunk(4)
            if name.startswith("bias_ih"):
                assert (f == 1).all()
                i = torch.cat((i, *rest))
            assert i.abs().max() <= 5**-0.5 and i.any()
        nn.init.zeros_(module.bias_ih_l0)
        module.reset_parameters()


def test_forget_bias_of_a_cell():
    cell = fusedrnn.LSTMCell(3, 5, forget_bias=-2)
    i, f, *_ = cell.bias_ih.chunk(4)
    assert (f == -2).all() and i.abs().max() <= 5**-0.5
    assert repr(cell) == "LSTMCell(3, 5, forget_bias=-2.0)"


LAYERS = {
    "LSTM": lambda: fusedrnn.LSTM(3, 5, 2, proj_size=4, bidirectional=True),
    "GRUCell": lambda: fusedrnn.GRUCell(3, 5),
    "torch.nn": lambda: nn.Sequential(nn.Linear(2, 2), nn.LSTM(3, 5)),
    "Recurrent": lambda: fusedrnn.Recurrent(fusedrnn.cells.LSTM, 3, 5),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_blocks_of_gates(make, gain):
    module = make()
    before = {name: p.clone() for name, p in module.named_parameters()}
    fusedrnn.init.orthogonal_(module, gain)
    weights = 0
    for name, p in module.named_parameters():
        if "weight_" not in name:
            assert torch.equal(p, before[name]), name
            continue
        weights += 1
        for block in (p,) if "weight_hr" in name else p.split(5):
            gram = block @ block.t() if block.shape[0] <= block.shape[1] else block.t() @ block
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)))
    assert weights >= 2
    fusedrnn.init.xavier_uniform_(module, gain)
    for name, p in module.named_parameters():
        if "weight_ih" in name or "weight_hh" in name:
            bound = gain * (6 / (5 + p.shape[1])) ** 0.5
            for block in p.split(5):
                assert 0.5 * bound < block.abs().max() <= bound, name


def test_nothing_to_initialise():
    layer = nn.utils.parametrizations.weight_norm(fusedrnn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"0\.weight_hh_l0 should be a parameter, it is made of"):
        fusedrnn.init.orthogonal_(nn.Sequential(layer))
    with pytest.raises(ValueError, match="Linear has no recurrent layer or cell"):
        fusedrnn.init.xavier_uniform_(nn.Linear(2, 2))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [fusedrnn.LSTM, fusedrnn.GRU, nn.LSTM, nn.GRU], ids=str)
def test_tbptt(kind, batch_first):
    """The same outputs as at once; gradients of each chunk alone."""
    module = kind(3, 5, 2, batch_first=batch_first)
    x, dim = torch.randn(7, 2, 3), 0
    if batch_first:
        x, dim = x.transpose(0, 1), 1
    whole, final = module(x)
    ys, hx = [], None
    for y, state in fusedrnn.tbptt(module, x, 3):
        module.zero_grad()
        y.sum().backward()
        got = [p.grad.clone() for p in module.parameters()]
        begin = sum(part.shape[dim] for part in ys)
        part = x.narrow(dim, begin, y.shape[dim])
        expected = torch.autograd.grad(module(part, hx)[0].sum(), list(module.parameters()))
        torch.testing.assert_close(got, list(expected))
        hx, ys = state, [*ys, y.detach()]
        every = state if isinstance(state, tuple) else (state,)
        assert not any(s.requires_grad for s in every)
    assert [y.shape[dim] for y in ys] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(ys, dim), whole)
    torch.testing.assert_close(state, final)


def test_tbptt_begins_where_it_is_told():
    module, x = fusedrnn.LSTM(3, 5, initial_state="learned"), torch.randn(4, 3)
    nn.init.normal_(module.h0)
    parts = [y for y, _ in fusedrnn.tbptt(module, x, 4)]
    torch.testing.assert_close(parts[0], module(x)[0])
    hx = torch.randn(1, 5), torch.randn(1, 5)
    parts = [y for y, _ in fusedrnn.tbptt(module, x, 2, hx)]
    torch.testing.assert_close(torch.cat(parts), module(x, hx)[0])


def test_bad_chunks():
    x = torch.zeros(4, 2, 3)
    with pytest.raises(TypeError, match="x should be a tensor, got PackedSequence"):
        fusedrnn.tbptt(fusedrnn.GRU(3, 4), pack_sequence([x[:, 0]]), 2)
    with pytest.raises(TypeError, match=r"chunk should be an integer, got 2\.5"):
        fusedrnn.tbptt(fusedrnn.GRU(3, 4), x, 2.5)
    with pytest.raises(ValueError, match="chunk should be at least 1, got 0"):
        fusedrnn.tbptt(fusedrnn.GRU(3, 4), x, 0)
    with pytest.raises(ValueError, match="one direction, got bidirectional=True"):
        fusedrnn.tbptt(fusedrnn.GRU(3, 4, bidirectional=True), x, 2)
