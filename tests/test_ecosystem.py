"""Modules in PyTorch's tools: copies, files, devices, weight changes, hooks, subclasses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from against_torch import CELLS, LAYERS, assert_equals_torch, flatten, make_hx, run, twins
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

I, H = 5, 4  # noqa: E741
CLASSES = [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN]
CLASSES += [fusedrnn.LSTMCell, fusedrnn.GRUCell, fusedrnn.RNNCell]
every_kind = pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
every_layer = pytest.mark.parametrize("kind", LAYERS)


def pair(kind, **options):
    """Ours and torch.nn's, in float64, with an input for both."""
    options |= {"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}
    ours, theirs = twins(kind, I, H, dtype=torch.float64, **options)
    shape = (6, 3, I) if kind in LAYERS else (3, I)
    return ours, theirs, torch.randn(shape, dtype=torch.float64)


def by_file(module, **options):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, **options)


def by_safe_file(module):
    with torch.serialization.safe_globals([*CLASSES, set]):
        return by_file(module, weights_only=True)


def by_state_file(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(module)
    again.reset_parameters()
    again.load_state_dict(torch.load(file, weights_only=True))
    return again


def by_meta(module):
    again = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    again.load_state_dict(module.state_dict())
    return again


def by_assignment(module):
    again = copy.deepcopy(module).to("meta")
    again.load_state_dict(module.state_dict(), assign=True)
    return again


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: by_file(m, weights_only=False),
    "torch.save-safe": by_safe_file,
    "state_dict": by_state_file,
    "meta": by_meta,
    "assign": by_assignment,
    "dtypes": lambda m: copy.deepcopy(m).to(torch.complex128).to(torch.float64).double(),
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
}


@pytest.mark.filterwarnings("ignore:(Complex modules are|Casting complex values)")
@pytest.mark.parametrize("how", COPIES)
@every_kind
def test_copies(kind, how):
    ours, theirs, x = pair(kind)
    run(ours, x)
    again = COPIES[how](ours)
    assert type(again) is type(ours) and repr(again) == repr(ours)
    assert_equals_torch(again, theirs, x)
    if isinstance(again, nn.RNNBase):
        assert [id(p) for p in again._flat_weights] == [id(p) for p in again.parameters()]


def test_torch_load_is_safe_by_default():
    with pytest.raises(pickle.UnpicklingError, match="fusedrnn"):
        by_file(fusedrnn.LSTM(I, H))


@every_kind
def test_meta(kind):
    """A module without memory runs without memory, and shapes are torch.nn's."""
    ours, theirs, x = pair(kind)
    expected = flatten(theirs(x))
    out = flatten(ours.to("meta")(x.to("meta")))
    assert all(t.is_meta for t in out.values())
    assert {k: t.shape for k, t in out.items()} == {k: t.shape for k, t in expected.items()}


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def last_weight(module):
    return [name for name, _ in module.named_parameters() if "weight" in name][-1]


def weight_norm(module):
    parametrizations.weight_norm(module, last_weight(module))


def old_weight_norm(module):
    torch.nn.utils.weight_norm(module, last_weight(module))


def orthogonal(module):
    parametrizations.orthogonal(module, last_weight(module))


def spectral_norm(module):
    torch.manual_seed(0)
    parametrizations.spectral_norm(module, last_weight(module), n_power_iterations=200)


def custom(module):
    parametrize.register_parametrization(module, last_weight(module), Double())


def pruned(module):
    prune.l1_unstructured(module, last_weight(module), amount=0.5)


def tied(module):
    for name in list(dict(module.named_parameters())):
        if name.endswith("_reverse"):
            setattr(module, name, module._parameters[name.removesuffix("_reverse")])
    if isinstance(module, nn.RNNBase):
        assert module.weight_ih_l0_reverse is module.weight_ih_l0
    else:
        module.bias_hh = module.bias_ih


def frozen(module):
    for p in list(module.parameters())[1::2]:
        p.requires_grad_(False)


CHANGES = [weight_norm, old_weight_norm, orthogonal, spectral_norm, custom, pruned, tied, frozen]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@every_kind
def test_changed_weights_train(kind, change):
    """Outputs and the gradient of every parameter behind the weights, over two SGD steps."""
    ours, theirs, x = pair(kind)
    for module in (ours, theirs):
        torch.manual_seed(4)
        change(module)
    for _ in range(2):
        results = [run(module, x) for module in (ours, theirs)]
        torch.testing.assert_close(*results)
        for module, result in zip((ours, theirs), results, strict=True):
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if p.requires_grad:
                        p -= 0.1 * result[f"d {name}"]
    if parametrize.is_parametrized(ours):  # torch.nn's cannot be copied
        again = copy.deepcopy(ours)
        torch.testing.assert_close(run(again, x), run(ours, x))


@every_layer
def test_weight_drop(kind):
    """The idioms that replace a weight by a tensor at each call."""
    ours, theirs, x = pair(kind)
    for module in (ours, theirs):
        raw = module.weight_hh_l0
        del module.weight_hh_l0
        module.register_parameter("raw", nn.Parameter(raw.detach()))
    for _ in range(2):
        for module in (ours, theirs):
            torch.manual_seed(6)
            module.weight_hh_l0 = nn.functional.dropout(module.raw, 0.5)
        x = x.detach().requires_grad_()
        outs = [flatten(module(x)) for module in (ours, theirs)]
        torch.testing.assert_close(*outs)
        sums = [sum(t.sum() for t in out.values()) for out in outs]
        torch.testing.assert_close(
            *(torch.autograd.grad(s, [x, m.raw]) for s, m in zip(sums, (ours, theirs), strict=True))
        )
    ours.double()  # moves a module whose weight is missing
    other, _, _ = pair(kind)
    tensor = torch.randn_like(other.weight_hh_l0)
    other._parameters["weight_hh_l0"] = tensor
    y = other(x)[0]
    assert y.grad_fn is not None and not torch.equal(y, outs[0]["out.0"])


@every_kind
def test_functional_call(kind):
    ours, theirs, x = pair(kind)
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    out = flatten(torch.func.functional_call(ours, weights, (x,)))
    theirs.load_state_dict(weights)
    torch.testing.assert_close(out, flatten(theirs(x)))
    ours.load_state_dict(weights)  # and nothing of the call stays behind
    torch.testing.assert_close(flatten(ours(x)), out)


@every_layer
def test_replica_of_data_parallel(kind):
    """What nn.DataParallel does on each device: tensors in place of the parameters."""
    ours, theirs, x = pair(kind)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p * 1)
    outs = flatten(replica(x)), flatten(theirs(x))
    torch.testing.assert_close(*outs)
    for out in outs:
        sum(t.sum() for t in out.values()).backward()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(getattr(ours, name).grad, p.grad)
    torch.testing.assert_close(flatten(nn.DataParallel(ours)(x)), outs[1])


@every_kind
def test_hooks(kind):
    ours, _, x = pair(kind)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    ours.register_forward_hook(lambda m, args, out: seen.append("forward"))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    ours.weight_ih_l0.register_hook(lambda g: seen.append("weight")) if kind in LAYERS else None
    next(iter(flatten(ours(x.requires_grad_())).values())).sum().backward()
    assert [s for s in seen if s != "weight"] == ["pre", "forward", "backward"]
    assert ("weight" in seen) == (kind in LAYERS)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-tanh"])
def test_subclass(kind):
    """As forecasting libraries write it: packs, and calls super().forward by keyword."""
    ours, theirs, _ = pair(kind, batch_first=True)

    def subclass(base):
        class Mine(base):
            def forward(self, x, lengths, hx=None):
                packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
                y, state = super().forward(packed, hx=hx)
                return pad_packed_sequence(y, batch_first=True)[0], state

        return Mine

    for module in (ours, theirs):
        module.__class__ = subclass(type(module))
    x, lengths, hx = torch.randn(3, 6, I, dtype=torch.float64), [4, 6, 1], make_hx(ours, 3)
    torch.testing.assert_close(ours(x, lengths, hx), theirs(x, lengths, hx))
    assert copy.deepcopy(ours)(x, lengths)[0].shape == (3, 6, 2 * H)


@pytest.mark.parametrize("step", [torch.optim.SGD, torch.optim.Adam])
@every_kind
def test_training(kind, step):
    """Ten steps of an optimizer from the same seed give the same weights."""
    ours, theirs, x = pair(kind)
    for module in (ours, theirs):
        optimizer = step(module.parameters(), lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            sum(t.square().sum() for t in flatten(module(x)).values()).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(getattr(ours, name), p)
