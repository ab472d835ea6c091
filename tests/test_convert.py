"""convert, to_torch, patch, backend, explain, info: existing models run on fusedrnn."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn.backends import native
from fusedrnn.convert import PAIRS

# What runs float32 on the CPU if nobody asks for anything.
DEFAULT = "cpu" if native.isas() else "reference"


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5)
        self.elman = nn.RNN(5, 3, nonlinearity="relu")
        self.cells = nn.ModuleList([nn.LSTMCell(3, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 3)])

    def forward(self, x):
        y, _ = self.rnn(x)
        y, _ = self.gru(y)
        y, _ = self.elman(y)
        h, c = self.cells[0](y[0])
        return self.cells[2](self.cells[1](h + c, h), c)


def run(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)


def test_convert_and_back():
    model, x = Tagger(), torch.randn(2, 7, 4)
    params, expected = dict(model.named_parameters()), run(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.rnn.register_forward_hook(lambda *_: calls.append(1))
    assert fusedrnn.convert(model) is model
    assert [type(m) for m in model.children()][:3] == [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN]
    assert all(params[name] is p for name, p in model.named_parameters())
    assert_same(run(model, x), expected)
    assert calls == [1]
    optimizer.step()
    changed = run(model, x)
    assert fusedrnn.to_torch(model) is model
    assert type(model.rnn) is nn.LSTM and type(model.cells[2]) is nn.RNNCell
    assert_same(run(model, x), changed)
    model.double()
    assert_same([t.float() for t in run(model, x.double())], changed)


def test_convert_leaves_subclasses_alone():
    class Mine(nn.LSTM):
        pass

    model = fusedrnn.convert(nn.Sequential(Mine(2, 3)))
    assert type(model[0]) is Mine


@pytest.mark.parametrize("pair", PAIRS.items(), ids=lambda p: p[1].__name__)
def test_to_torch_of_a_new_layer(pair):
    theirs, ours = pair
    layer = ours(3, 4, backend="reference")
    x = torch.randn(2, 3) if "Cell" in ours.__name__ else torch.randn(5, 2, 3)
    expected = layer(x)
    layer = fusedrnn.to_torch(layer)
    assert type(layer) is theirs and "backend" not in layer.__dict__
    torch.testing.assert_close(layer(x), expected)


def test_patch_counts_and_restores():
    model, x = Tagger(), torch.randn(2, 7, 4)
    before = {cls: cls.forward for cls in PAIRS}
    expected = run(model, x)
    with fusedrnn.patch() as patched:
        assert_same(run(model, x), expected)
        packed = nn.utils.rnn.pack_padded_sequence(x, [7, 3], batch_first=True)
        model.rnn(packed)
    assert patched.calls == {
        "LSTM": 2, "GRU": 1, "RNN": 1, "LSTMCell": 1, "GRUCell": 1, "RNNCell": 1,
    }  # fmt: skip
    assert {cls: cls.forward for cls in PAIRS} == before
    with pytest.raises(KeyError), fusedrnn.patch():
        raise KeyError
    assert {cls: cls.forward for cls in PAIRS} == before
    run(model, x)
    assert patched.calls["LSTM"] == 2


def test_patch_reaches_subclasses_and_changed_weights():
    class Mine(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    layer, x = Mine(3, 4), torch.randn(5, 2, 3)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    expected = layer(x)
    with fusedrnn.patch() as patched:
        torch.testing.assert_close(layer(x), expected)
    assert patched.calls["LSTM"] == 1 and isinstance(layer, nn.LSTM)


def test_patch_lets_compile_trace():
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)
    with fusedrnn.patch():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


def test_backend_context():
    layer, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    with fusedrnn.backend("reference"):
        assert fusedrnn.explain(layer, x).backend == "reference"
        other = []
        thread = threading.Thread(target=lambda: other.append(fusedrnn.explain(layer, x).backend))
        thread.start()
        thread.join()
        assert other == [
            fusedrnn.explain(fusedrnn.LSTM(3, 4, backend=["cpu", "reference"]), x).backend
        ]
        with fusedrnn.backend(None):
            assert fusedrnn.explain(layer, x).backend == DEFAULT
        assert fusedrnn.explain(layer, x).backend == "reference"
    with fusedrnn.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu'"):
        layer.to(torch.complex64)(x.to(torch.complex64))
    with pytest.raises(
        ValueError,
        match=r"unknown backend 'nope', expected one of \['cudnn', 'cuda', 'triton', 'cpu'",
    ):
        fusedrnn.backend("nope").__enter__()
    with pytest.raises(ValueError, match="unknown backend"):
        fusedrnn.LSTM(3, 4, backend="nope")


def test_backend_environment():
    code = (
        "import fusedrnn, torch\n"
        "print(fusedrnn.explain(fusedrnn.GRU(2, 3), torch.zeros(1, 1, 2)).backend)"
    )

    def run(value):
        env = {**os.environ, "FUSEDRNN_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run("reference, cpu").stdout.strip() == "reference"
    assert "unknown backend 'gpu'" in run("gpu").stderr


def test_explain():
    layer, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3, dtype=torch.complex64)
    said = fusedrnn.explain(layer, x)
    assert said.backend == "reference"
    assert "cpu" in said.reasons
    assert str(said).startswith("reference: a loop")
    assert fusedrnn.explain(fusedrnn.LSTM(3, 4, backend="cpu"), x).backend is None
    packed = nn.utils.rnn.pack_sequence([x[:, 0].real])
    assert fusedrnn.explain(nn.GRUCell(3, 4), packed.data).algorithm
    assert fusedrnn.explain(layer, packed).backend == DEFAULT
    with pytest.raises(TypeError, match="got Linear"):
        fusedrnn.explain(nn.Linear(2, 2), x)


def test_info():
    result = subprocess.run(
        [sys.executable, "-m", "fusedrnn", "info"], capture_output=True, text=True, check=True
    )
    assert f"fusedrnn   {fusedrnn.__version__}" in result.stdout
    assert f"torch      {torch.__version__}" in result.stdout


def test_onnx_goes_through_to_torch():
    """What export sees after to_torch is torch.nn's own layer (the exporter itself is optional)."""
    model = fusedrnn.to_torch(nn.Sequential(fusedrnn.LSTM(3, 4)))
    program = torch.export.export(model, (torch.randn(5, 2, 3),))
    assert any("lstm" in str(node.target) for node in program.graph.nodes)
