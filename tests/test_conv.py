"""fusedrnn.ConvLSTM against the loop of convolutions that its users would write."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedrnn


def loop(module, x, state, suffix, reverse):
    """One layer and direction over ``x [T,B,in,Y,X]``, gate by gate."""
    own = dict(module.named_parameters(recurse=False))
    w_ih, w_hh = own[f"weight_ih{suffix}"], own[f"weight_hh{suffix}"]
    bias = 0
    if module.bias:
        bias = (own[f"bias_ih{suffix}"] + own[f"bias_hh{suffix}"])[:, None, None]
    norms = dict(module.named_children())
    p_i, p_f, p_o = own[f"weight_peephole{suffix}"] if module.peephole else (0, 0, 0)
    h, c = state
    out = []
    for x_t in reversed(x) if reverse else x:
        gx = F.conv2d(x_t, w_ih, padding="same")
        gx = norms[f"norm_ih{suffix}"](gx) if norms else gx
        gh = F.conv2d(h, w_hh, padding="same")
        gh = norms[f"norm_hh{suffix}"](gh) if norms else gh
        i, f, g, o = (gx + gh + bias).chunk(4, 1)
        c = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
        h = torch.sigmoid(o + p_o * c) * torch.tanh(c)
        out.append(h)
    return torch.stack(out[::-1] if reverse else out), h, c


def expected(module, x, hx):
    directions = ("", "_reverse") if module.bidirectional else ("",)
    x = x.transpose(0, 1) if module.batch_first else x
    final = []
    for layer in range(module.num_layers):
        ys = []
        for end in directions:
            state = hx[0][len(final)], hx[1][len(final)]
            y, *states = loop(module, x, state, f"_l{layer}{end}", bool(end))
            ys.append(y)
            final.append(states)
        x = torch.cat(ys, 2)
    h_n, c_n = (torch.stack(s) for s in zip(*final, strict=True))
    return (x.transpose(0, 1) if module.batch_first else x), h_n, c_n


OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "nobias": {"bias": False, "batch_first": True},
    "peephole": {"peephole": True, "bidirectional": True},
    "norm": {"batch_norm": True, "num_layers": 2},
    "both": {"batch_norm": True, "peephole": True, "bidirectional": True, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


@options
@pytest.mark.parametrize("kernel", [3, (1, 5)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_against_a_loop(options, kernel, backend, mode):
    """Outputs, every gradient, and the statistics of batch norm."""
    if backend == "cpu" and not fusedrnn.backends.native.isas():
        pytest.skip("no native library")
    module = fusedrnn.ConvLSTM(2, 3, kernel, dtype=torch.float64, backend=backend, **options)
    for norm in module.children():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_var.uniform_(0.5, 2)
    module.train(mode == "train")
    other = copy.deepcopy(module)
    shape = (3, 4) if module.batch_first else (4, 3)
    x = torch.randn(*shape, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    places = module.num_layers * (2 if module.bidirectional else 1)
    hx = [torch.randn(places, 3, 3, 5, 6, dtype=x.dtype, requires_grad=True) for _ in "hc"]
    y, (h_n, c_n) = module(x, tuple(hx))
    found, wanted = [y, h_n, c_n], list(expected(other, x, hx))
    upstream = [torch.randn_like(t) for t in found]
    for outputs, of in ((found, module), (wanted, other)):
        outputs.extend(torch.autograd.grad(outputs, [x, *hx, *of.parameters()], upstream))
        outputs.extend(of.buffers())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@options
def test_as_other_modules(options):
    module = fusedrnn.ConvLSTM(2, 3, 3, **options).eval()
    shape = (2, 4) if module.batch_first else (4, 2)
    x = torch.randn(*shape, 2, 5, 6)
    y, (h_n, c_n) = module(x)
    places = module.num_layers * (2 if module.bidirectional else 1)
    zeros = (torch.zeros(places, 2, 3, 5, 6),) * 2
    torch.testing.assert_close(module(x, zeros), (y, (h_n, c_n)))
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x)[0], y) and repr(same) == repr(module)
    other = fusedrnn.ConvLSTM(2, 3, 3, **options).eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], y)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], y)


def test_parameters():
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "peephole": True, "batch_norm": True}
    module = fusedrnn.ConvLSTM(2, 3, (3, 5), forget_bias=1.0, **options)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    assert shapes["weight_ih_l0"] == shapes["weight_ih_l0_reverse"] == (12, 2, 3, 5)
    assert shapes["weight_ih_l1"] == (12, 6, 3, 5) and shapes["weight_hh_l1"] == (12, 3, 3, 5)
    assert shapes["weight_peephole_l1_reverse"] == (3, 3, 1, 1)
    for name, p in module.named_parameters(recurse=False):
        values = p
        if name.startswith("bias_ih"):
            assert (p[3:6] == 1).all()
            values = torch.cat((p[:3], p[6:]))
        assert values.abs().max() <= 45**-0.5 and values.any()
    assert len(list(module.children())) == 8
    for norm in module.children():
        assert (norm.weight == 0.1).all() and not norm.bias.any() and norm.num_features == 12
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


@options
def test_empty_batches_and_layouts(options):
    module = fusedrnn.ConvLSTM(2, 3, 3, **options).eval()
    x = torch.randn(4, 4, 2, 5, 6)
    empty = x[:0] if module.batch_first else x[:, :0]
    places = module.num_layers * (2 if module.bidirectional else 1)
    y, (h_n, _) = module(empty)
    assert y.numel() == 0 and h_n.shape == (places, 0, 3, 5, 6)
    y, (h_n, c_n) = module(x)
    assert y.is_contiguous() and h_n.is_contiguous() and c_n.is_contiguous()
    torch.testing.assert_close(module(x.mT.contiguous().mT)[0], y)


def test_per_sample_gradients():
    module = fusedrnn.ConvLSTM(2, 3, 3, peephole=True, dtype=torch.float64)
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 4, 1, 2, 5, 6, dtype=torch.float64)

    def loss(params, x):
        return torch.func.functional_call(module, params, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for k in range(5):
        alone = torch.func.grad(loss)(params, x[k])
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name][k], gradient)


def test_dropout_between_layers():
    module = fusedrnn.ConvLSTM(2, 3, 3, num_layers=2, dropout=1.0)
    x = torch.randn(4, 2, 2, 5, 6)
    dropped = module(x)[0]
    torch.testing.assert_close(dropped, module(torch.randn_like(x))[0])  # x never arrives
    assert not torch.allclose(module.eval()(x)[0], dropped)


@pytest.mark.parametrize("options", [{"peephole": True}, {"batch_norm": True}], ids=list)
def test_16_bits_and_autocast(options):
    module = fusedrnn.ConvLSTM(2, 3, 3, **options).eval()
    x = torch.randn(4, 2, 2, 5, 6)
    exact, _ = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = module(x)
    assert {y.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), exact, atol=0.02, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):  # goes on from its own state
        half, state = module(x[:2])
        rest, _ = module(x[2:], state)
    torch.testing.assert_close(torch.cat((half, rest)), y, atol=0.02, rtol=0)
    y, (_, c_n) = module.bfloat16()(x.bfloat16())
    assert y.dtype == c_n.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.02, rtol=0)


BAD = {
    "channels": ((0, 3, 3), {}, "input_channels must be greater than zero, got 0"),
    "even": ((2, 3, 4), {}, "kernel_size should be odd, or two odd numbers, got 4"),
    "three": ((2, 3, (3, 3, 3)), {}, r"two odd numbers, got \(3, 3, 3\)"),
    "dropout": ((2, 3, 3), {"dropout": 1.5}, r"dropout should be a probability in \[0, 1\]"),
    "forget": ((2, 3, 3), {"forget_bias": 1.0, "bias": False}, "needs bias=True, got bias=False"),
    "backend": ((2, 3, 3), {"backend": "gpu"}, "unknown backend 'gpu'"),
}


@pytest.mark.parametrize("args, kwargs, message", BAD.values(), ids=list(BAD))
def test_bad_arguments(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fusedrnn.ConvLSTM(*args, **kwargs)


def test_bad_inputs():
    with pytest.raises(TypeError, match="kernel_size should be of type int, got: float"):
        fusedrnn.ConvLSTM(2, 3, 3.0)
    with pytest.raises(TypeError, match="num_layers should be of type int, got: bool"):
        fusedrnn.ConvLSTM(2, 3, 3, True)
    module = fusedrnn.ConvLSTM(2, 3, 3)
    x, state = torch.randn(4, 1, 2, 5, 6), torch.zeros(1, 1, 3, 5, 6)
    with pytest.raises(TypeError, match="input should be a tensor, got list"):
        module([x])
    with pytest.raises(TypeError, match="hx should be a tuple of two tensors, got tuple"):
        module(x, (None, None))
    with pytest.raises(ValueError, match=r"shape \[T,B,2,Y,X\], got \[4, 2, 5, 6\]"):
        module(x[:, 0])
    with pytest.raises(ValueError, match=r"shape \[T,B,2,Y,X\], got \[4, 1, 1, 5, 6\]"):
        module(x[:, :, :1])
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        module(x[:0])
    with pytest.raises(TypeError, match="hx should be a tuple of two tensors, got Tensor"):
        module(x, state)
    with pytest.raises(ValueError, match=r"c_0 should have shape \[1, 1, 3, 5, 6\], got"):
        module(x, (state, state[..., :5]))
    with pytest.raises(RuntimeError, match=r"h_0 should be torch.float32 .*, got torch.float64"):
        module(x, (state.double(), state))
    with pytest.raises(TypeError, match="peephole should be of type bool, got: int"):
        fusedrnn.ConvLSTM(2, 3, 3, peephole=1)
    assert module(x, (state, state))[0].shape == (4, 1, 3, 5, 6)
