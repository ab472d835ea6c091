"""Dropout and zoneout inside the loop: random numbers, statistics, and training with them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import base, philox, regularisers
from fusedrnn.backends import native

KINDS = {
    "LSTM": fusedrnn.LSTM,
    "GRU": fusedrnn.GRU,
    "RNN": fusedrnn.RNN,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


# From the known answers of Random123, the paper's own code: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    low, high = (int(word, 16) for word in key.split())
    seed = torch.tensor([low | high << 32], dtype=torch.uint64).view(torch.int64)
    c = torch.tensor([[int(word, 16) for word in counter.split()]])
    assert [f"{int(word):08x}" for word in philox.words(c, seed)[0]] == words.split()


@pytest.mark.parametrize("shape", [(1,), (4, 7), (0, 3), (513, 129)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8], ids=str
)
def test_the_engine_s_masks_are_those_of_plain_operations(monkeypatch, shape, p, dtype):
    if not native.isas():
        pytest.skip("no native library")
    like, seed = torch.empty(shape, dtype=dtype), torch.tensor([-(2**62) + 12345])
    masks = [philox.mask(like, seed, p, 3, 1)]
    monkeypatch.setattr(philox, "_has_native", False)
    masks.append(philox.mask(like, seed, p, 3, 1))
    assert torch.equal(*masks) and masks[0].dtype == dtype and masks[0].shape == shape
    other = torch.empty(shape, dtype=dtype).t() if len(shape) > 1 else like
    assert other.is_contiguous() or torch.equal(
        philox.mask(other, seed, p, 3, 1).contiguous().flatten(), masks[0].flatten()
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_statistics(threads):
    """Of a million numbers: how many are dropped, alone and beside their neighbours; other seeds,
    places and kinds have other masks, and threads the same."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        like, n, p = torch.empty(1000, 1000), 1_000_000, 0.3
        mask = philox.mask(like, torch.tensor([7]), p, 0, 0)
        torch.set_num_threads(1)
        assert torch.equal(mask, philox.mask(like, torch.tensor([7]), p, 0, 0))
    finally:
        torch.set_num_threads(before)
    assert mask.unique().tolist() == [0, torch.tensor(1 / 0.7).item()]
    deviation = (p * (1 - p) / n) ** 0.5
    gone = mask == 0
    assert abs(gone.double().mean() - p) < 5 * deviation
    for shift in (1, 2, 3, 4, 1000):
        both = (gone.flatten()[shift:] & gone.flatten()[:-shift]).double().mean()
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5
    for seed, place, kind in ((8, 0, 0), (7 + 2**32, 0, 0), (7, 1, 0), (7, 0, 1)):
        other = philox.mask(like, torch.tensor([seed]), p, place, kind) == 0
        assert abs((gone & other).double().mean() - p * p) < 5 * deviation


@kinds
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weight_dropout_is_a_mask_on_the_weights(kind, backend):
    """The same as torch.nn on masked weights, with all gradients."""
    if backend == "cpu" and not native.isas():
        pytest.skip("no native library")
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    ours = kind(3, 5, weight_dropout=0.4, backend=backend, **options)
    theirs = getattr(nn, kind.__name__)(3, 5, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    y, _ = ours(x)
    torch.manual_seed(5)
    seed = philox.seed()
    masks = {}
    for k, suffix in enumerate(("_l0", "_l0_reverse", "_l1", "_l1_reverse")):
        name = f"weight_hh{suffix}"
        masks[name] = philox.mask(theirs.get_parameter(name), seed, 0.4, k, philox.WEIGHT)
        assert masks[name].any() and not masks[name].all()
        with torch.no_grad():
            theirs.get_parameter(name).mul_(masks[name])
    expected, _ = theirs(x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *ours.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [x, *theirs.parameters()], upstream)
    names = ["x", *(name for name, _ in theirs.named_parameters())]
    for name, gradient, want in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(gradient, want * masks.get(name, 1), msg=name)


@kinds
def test_weight_dropout_in_training_alone(kind):
    module, plain = kind(3, 5, weight_dropout=0.5), kind(3, 5)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 3)
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    torch.manual_seed(0)
    module(x), plain.train()(x)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), untouched)  # no number is drawn where none is needed
    first, second = module.train()(x)[0], module(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    first = module(x)[0]
    torch.manual_seed(0)
    assert torch.equal(module(x)[0], first) and torch.equal(
        copy.deepcopy(module).eval()(x)[0], plain(x)[0]
    )
    # The first step has no product with W_hh.
    torch.testing.assert_close(module(x)[0][:1], plain(x)[0][:1])


def test_weight_dropout_of_everything():
    module = fusedrnn.LSTM(3, 5, weight_dropout=1.0)
    plain = copy.deepcopy(module).eval()
    nn.init.zeros_(plain.weight_hh_l0)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(module(x)[0], plain(x)[0])


def test_weight_dropout_elsewhere():
    """In functions, compiled, in 16 bits, under autocast."""
    module = fusedrnn.GRU(3, 5, weight_dropout=0.5)
    x = torch.randn(4, 2, 3)
    torch.manual_seed(1)
    y, _ = module(x)
    torch.manual_seed(1)
    params = list(module.parameters())
    again, _ = fusedrnn.functional.gru(x, None, params, training=True, weight_dropout=0.5)
    assert torch.equal(again, y)
    assert torch.equal(
        fusedrnn.functional.gru(x, None, params, weight_dropout=0.5)[0], module.eval()(x)[0]
    )
    module.train()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x)[0], y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        torch.testing.assert_close(module(x)[0].float(), y, atol=0.03, rtol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(module.bfloat16()(x.bfloat16())[0].float(), y, atol=0.03, rtol=0)


BACKENDS = ["cpu", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def require(backend: str) -> None:
    if backend == "cpu" and not native.isas():
        pytest.skip("no native library")


def loop(kind: type, layer: nn.Module, x: torch.Tensor, masks: dict[str, torch.Tensor]) -> list:
    """y of one layer and direction from torch.nn's own cell, one step after another, on masked
    weights where h is dropped: ``W (m * h)`` is ``(W m) h``, row by row."""
    cell = getattr(nn, f"{kind.__name__}Cell")(x.shape[2], layer.hidden_size, dtype=x.dtype)
    theirs = dict(zip(["weight_ih", "weight_hh", "bias_ih", "bias_hh"], layer.parameters(),
                      strict=True))  # fmt: skip
    rows = []
    for b in range(x.shape[1]):
        h = c = x.new_zeros(1, layer.hidden_size)
        y = []
        for t in range(x.shape[0]):
            dropped = masks["dropout"][b]
            own = theirs | {"weight_hh": theirs["weight_hh"] * dropped}
            if kind is fusedrnn.LSTM:
                new = torch.func.functional_call(cell, own, (x[t, b : b + 1], (h, c)))
                c = torch.where(masks["renew_c"][t, b] > 0, new[1], c)
            else:
                new = (torch.func.functional_call(cell, own, (x[t, b : b + 1], h)),)
            h = torch.where(masks["renew_h"][t, b] > 0, new[0], h)
            y.append(h)
        rows.append(torch.cat(y))
    return torch.stack(rows, 1)


@kinds
@backends
def test_recurrent_dropout_and_zoneout_are_these_masks(kind, backend):
    """Against torch.nn's cells and autograd, with all gradients."""
    require(backend)
    layer = kind(3, 5, recurrent_dropout=0.4, zoneout=0.3, dtype=torch.float64, backend=backend)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    y, _ = layer(x)
    torch.manual_seed(5)
    seed = philox.seed()

    def flags(kind: int) -> torch.Tensor:
        return philox.mask(torch.empty(4, 2, 5, dtype=torch.uint8), seed, 0.3, 0, kind)

    masks = {
        "dropout": philox.mask(torch.empty(2, 5).double(), seed, 0.4, 0, philox.RECURRENT),
        "renew_h": flags(philox.ZONE_H),
        "renew_c": flags(philox.ZONE_C),
    }
    assert all(mask.any() and not mask.all() for mask in masks.values())
    expected = loop(kind, layer, x, masks)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], upstream)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, gradient, want in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(gradient, want, msg=name)


@kinds
def test_layers_and_directions_have_masks_of_their_own(kind):
    options = {"num_layers": 2, "bidirectional": True, "recurrent_dropout": 0.5, "zoneout": 0.5}
    layer = kind(3, 5, **options)
    rates, weights = base.rates_of(layer), base.weights_of(layer)
    x = torch.randn(6, 3, 3)
    _, noise = regularisers.regularised(rates, x, weights, len(base.cell_of(layer).states), True)
    assert len(noise) == 4
    for name in ("dropout", "renew_h", "renew_c"):
        masks = [getattr(n, name) for n in noise]
        if name == "renew_c" and kind is not fusedrnn.LSTM:
            assert masks == [None] * 4
            continue
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    torch.manual_seed(0)
    y, _ = layer(x)
    torch.manual_seed(0)
    with fusedrnn.backend("reference"):
        torch.testing.assert_close(layer(x)[0], y)


CELLS = {
    "LSTM": fusedrnn.LSTMCell,
    "GRU": fusedrnn.GRUCell,
    "RNN": fusedrnn.RNNCell,
}


@pytest.mark.parametrize("kind", CELLS.values(), ids=list(CELLS))
def test_zoneout_of_a_cell(kind):
    """In training a unit is either the old or the new one, as often as asked; eval is what is
    expected of it."""
    torch.manual_seed(0)
    plain = kind(3, 50)
    zoned = kind(3, 50, zoneout=0.2)
    zoned.load_state_dict(plain.state_dict())
    x, h, c = torch.randn(40, 3), torch.randn(40, 50), torch.randn(40, 50)
    lstm = kind is fusedrnn.LSTMCell
    hx = (h, c) if lstm else h

    def states(module):
        new = module(x, hx)
        return list(new) if lstm else [new]

    kept = []
    for before, new, got in zip([h, c], states(plain), states(zoned), strict=False):
        old = got == before
        assert torch.equal(got[~old], new[~old])
        assert abs(old.double().mean() - 0.2) < 5 * (0.2 * 0.8 / old.numel()) ** 0.5
        kept.append(old)
    assert not lstm or not torch.equal(*kept)
    zoned.eval()
    for before, new, got in zip([h, c], states(plain), states(zoned), strict=False):
        torch.testing.assert_close(got, 0.2 * before + 0.8 * new)


@backends
def test_zoneout_of_all_or_of_one_state(backend):
    require(backend)
    x, hx = torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    layer = fusedrnn.LSTM(3, 5, zoneout=1.0, backend=backend)
    for module in (layer, layer.eval()):
        y, (h_n, c_n) = module(x, hx)
        assert torch.equal(y, hx[0].expand(4, 2, 5)) and torch.equal(c_n, hx[1])
    layer = fusedrnn.LSTM(3, 5, zoneout=(0.0, 1.0), backend=backend)
    y, (h_n, c_n) = layer(x, hx)
    assert torch.equal(c_n, hx[1]) and not torch.equal(h_n, hx[0])
    layer = fusedrnn.LSTM(3, 5, zoneout=(1.0, 0.0), backend=backend)
    y, (h_n, c_n) = layer(x, hx)
    assert torch.equal(h_n, hx[0]) and not torch.equal(c_n, hx[1])


@kinds
@backends
def test_recurrent_dropout_of_everything(kind, backend):
    """Nothing passes through W_hh; what else reads h sees it."""
    require(backend)
    layer = kind(3, 5, recurrent_dropout=1.0, backend=backend)
    plain = copy.deepcopy(layer).eval()
    nn.init.zeros_(plain.weight_hh_l0)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


@kinds
def test_recurrent_dropout_in_training_alone(kind):
    layer, plain = kind(3, 5, recurrent_dropout=0.5), kind(3, 5)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3)
    torch.manual_seed(0)
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])
    untouched = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), untouched)  # no number is drawn where none is needed
    zoned = kind(3, 5, zoneout=0.5).eval()
    torch.manual_seed(0)
    zoned(x)
    assert torch.equal(torch.rand(3), untouched)
    first, second = layer.train()(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    first = layer(x)[0]
    torch.manual_seed(0)
    assert torch.equal(layer(x)[0], first)


def test_recurrent_dropout_and_zoneout_elsewhere():
    """In functions, compiled, under autocast, under torch.func and for second derivatives."""
    rates = {"recurrent_dropout": 0.5, "zoneout": 0.25}
    layer = fusedrnn.GRU(3, 5, **rates)
    x = torch.randn(4, 2, 3)
    params = list(layer.parameters())
    torch.manual_seed(1)
    y, _ = layer(x)
    torch.manual_seed(1)
    again, _ = fusedrnn.functional.gru(x, None, params, training=True, **rates)
    assert torch.equal(again, y)
    in_eval, _ = fusedrnn.functional.gru(x, None, params, **rates)
    assert torch.equal(in_eval, layer.eval()(x)[0])
    layer.train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x)[0], y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        torch.testing.assert_close(layer(x)[0].float(), y, atol=0.03, rtol=0)
    layer.double()

    def loss(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return layer(x)[0].square().sum()

    wide = x.double().requires_grad_()
    (first,) = torch.autograd.grad(loss(wide), wide, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(x.double()), first)
    assert torch.autograd.gradgradcheck(loss, wide[:2].detach().requires_grad_())


def test_rates_that_are_set_later():
    """A schedule sets them; they are checked when they are used."""
    for module in (fusedrnn.LSTM(3, 4), fusedrnn.LSTMCell(3, 4)):
        x = torch.randn(2, 1, 3) if isinstance(module, fusedrnn.LSTM) else torch.randn(2, 3)
        for zoneout in (1.0, (0.5, 1.0), [0.25, 0.5], (1.0,)):
            module.zoneout = zoneout
            module(x)
        for zoneout in (2.0, [0.1, 0.2, 0.3], "0.5"):
            module.zoneout = zoneout
            with pytest.raises(ValueError, match="zoneout should be a probability"):
                module(x)
    assert fusedrnn.LSTMCell(3, 4, zoneout=[0.1, 0.2]).zoneout == (0.1, 0.2)
    assert fusedrnn.GRUCell(3, 4, zoneout=(0.5,)).zoneout == 0.5
    layer = fusedrnn.GRU(3, 4)
    layer.recurrent_dropout = -1
    with pytest.raises(ValueError, match="recurrent_dropout should be a probability"):
        layer(torch.randn(2, 1, 3))


@pytest.mark.parametrize("rates", [{"recurrent_dropout": 0.5}, {"zoneout": 0.5}], ids=str)
def test_omega_of_a_layer_with_noise(rates):
    """Each step by its own masks, against the norms that the gradients have in the layer."""
    layer = fusedrnn.GRU(4, 5, **rates)
    x = torch.randn(6, 3, 4)

    def last(out):
        return out[0][-1].sum()

    torch.manual_seed(3)
    found = fusedrnn.diagnostics.omega(layer, x, last)
    torch.manual_seed(3)
    flow = []
    with fusedrnn.backends.reference.watched() as runs:
        value = last(layer(x.requires_grad_()))
    states = [state[0] for state in runs[0][1]]
    flow = torch.autograd.grad(value, states)
    norms = torch.stack([g.square().sum(1).sqrt() for g in flow])  # the last of y alone has a loss
    expected = (norms[:-1] / norms[1:] - 1).square().sum() / 3
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("rates", [{"recurrent_dropout": 0.3}, {"zoneout": (0.2, 0.4)}], ids=str)
def test_what_explains_and_converts(rates):
    layer = fusedrnn.LSTM(3, 4, **rates)
    assert fusedrnn.explain(layer, torch.randn(5, 2, 3)).backend in ("cpu", "reference")
    ((name, value),) = rates.items()
    assert repr(layer) == f"LSTM(3, 4, {name}={value!r})"
    assert getattr(copy.deepcopy(layer), name) == value
    with pytest.raises(ValueError, match=f"LSTM has {name}=.*, which torch.nn has not"):
        fusedrnn.to_torch(layer)


@pytest.mark.parametrize(
    "value, kind",
    [(-0.1, "LSTM"), ("0.5", "LSTM"), ((0.1, 2.0), "LSTM"), ((0.1, 0.2, 0.3), "LSTM"),
     ((), "LSTM"), ((0.1, 0.2), "GRU"), (float("nan"), "RNN")],
)  # fmt: skip
def test_bad_zoneout(value, kind):
    for make in (KINDS[kind], CELLS[kind]):
        with pytest.raises(ValueError, match="zoneout should be a probability"):
            make(3, 4, zoneout=value)


def test_errors_and_repr():
    for value in (-0.1, 1.5, float("nan"), True, "0.5"):
        for name in ("weight_dropout", "recurrent_dropout"):
            with pytest.raises(ValueError, match=rf"{name} should be a probability in \[0, 1\]"):
                fusedrnn.RNN(3, 4, **{name: value})
    module = fusedrnn.GRU(3, 4, weight_dropout=0.5)
    assert repr(module) == "GRU(3, 4, weight_dropout=0.5)"
    with pytest.raises(ValueError, match=r"GRU has weight_dropout=0.5, which torch.nn has not"):
        fusedrnn.to_torch(module)
