"""Dropout inside the loop: its random numbers, its statistics, and training with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import philox
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
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


def test_errors_and_repr():
    for value in (-0.1, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match=r"weight_dropout should be a probability in \[0, 1\]"):
            fusedrnn.RNN(3, 4, weight_dropout=value)
    module = fusedrnn.GRU(3, 4, weight_dropout=0.5)
    assert repr(module) == "GRU(3, 4, weight_dropout=0.5)"
    with pytest.raises(ValueError, match=r"GRU has weight_dropout=0.5, which torch.nn has not"):
        fusedrnn.to_torch(module)
