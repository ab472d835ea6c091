"""The modules as objects: constructors, attributes, parameters, state_dict, methods."""

from __future__ import annotations

import inspect
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from against_torch import CELLS, LAYERS, assert_equals_torch, make_hx, twins
from torch import nn

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
ATTRIBUTES = [*nn.RNNBase.__constants__, "_flat_weights_names", "_all_weights", "training"]

# Arguments by what may be built from them: all layers, the LSTM alone, the RNN alone, ...
VALID = {
    "LSTM GRU RNN": [
        ((3, 4), {}),
        ((), {"input_size": 3, "hidden_size": 4}),
        ((3,), {"hidden_size": 4, "num_layers": 3, "bidirectional": True, "bias": False}),
        ((3, 4), {"num_layers": 2, "dropout": 0.1, "batch_first": True}),
        ((3, 4), {"num_layers": 2, "dropout": 1}),
        ((3, 4), {"bidirectional": 1}),
        ((3, 4), {"device": "meta", "dtype": torch.float64}),
        ((3, 4), {"device": torch.device("cpu"), "dtype": torch.bfloat16}),
        ((True, 4), {}),
    ],
    "LSTM": [
        ((3, 4, 2, False, True, 0.1, True, 2, "cpu", torch.float64), {}),
        ((3, 4), {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
        ((3, 4), {"proj_size": 3, "bias": False}),
    ],
    "GRU": [((3, 4, 2, False, True, 0.1, True), {})],
    "RNN": [
        ((3, 4, 2, "relu", False, True, 0.1, True), {}),
        ((3, 4), {"nonlinearity": "relu"}),
        ((3, 4, 1, "tanh"), {}),
    ],
    "LSTMCell GRUCell RNNCell": [
        ((3, 4), {}),
        ((3, 4, False), {}),
        ((3, 4), {"bias": False, "dtype": torch.float64}),
        ((3, 4), {"device": "meta"}),
        ((3, 4), {"bias": 1}),
    ],
    "LSTMCell GRUCell": [((3, 4, True, "meta", torch.float64), {})],
    "RNNCell": [
        ((3, 4, True, "relu", "meta", torch.float64), {}),
        ((3, 4), {"nonlinearity": "nonsense"}),
    ],
}
INVALID = {
    "LSTM GRU RNN": [
        ((), {}),
        ((3,), {}),
        ((3, 4), {"nonsense": 1}),
        ((3, 4), {"hidden_size": 4}),
        ((3, 4), {"dropout": "a"}),
        ((3, 4), {"dropout": None}),
        ((3, 4), {"dropout": -0.1}),
        ((3, 4), {"dropout": 1.1}),
        ((3, 4), {"dropout": True}),
        ((3, 4), {"dropout": "0.5"}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"bias": None}),
        ((3, 4), {"batch_first": 1}),
        ((3.0, 4), {}),
        ((3, 4.0), {}),
        ((np.int64(3), 4), {}),
        ((3, np.int64(4)), {}),
        ((0, 4), {}),
        ((-1, 4), {}),
        ((3, 0), {}),
        ((3, 4), {"num_layers": 0}),
        ((3, 4), {"num_layers": 2.0}),
        ((3, 4), {"num_layers": "2"}),
        ((3, 4), {"device": "nowhere"}),
        ((3, 4), {"dtype": torch.int64}),
        ((3, 4), {"bias": 1, "batch_first": 1, "dropout": 2}),
    ],
    "LSTM": [((3, 4), {"proj_size": s}) for s in (-1, 4, 5)],
    "GRU RNN": [((3, 4), {"proj_size": s}) for s in (0, 2)],
    "RNN": [((3, 4), {"nonlinearity": "x"}), ((3, 4, 1, "x"), {}), ((3, 4, 1, None), {})],
    "LSTMCell GRUCell RNNCell": [((), {}), ((3,), {}), ((3, 4), {"nonsense": 1}), ((-1, 4), {})],
}


def pairs(table):
    return [
        pytest.param(kind, args, kwargs, id=f"{kind}{args}{kwargs}")
        for kinds, rows in table.items()
        for kind in kinds.split()
        for args, kwargs in rows
    ]


def shapes(module):
    return [
        (name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in module.named_parameters()
    ]


@pytest.mark.parametrize(("kind", "args", "kwargs"), pairs(VALID))
def test_constructor(kind, args, kwargs):
    """Same parameters in the same order with the same values, attributes, repr, state_dict."""
    modules = []
    for classes in (nn, fusedrnn):
        torch.manual_seed(5)
        modules.append(getattr(classes, kind)(*args, **kwargs))
        modules.append(torch.rand(3))
    theirs, their_next, ours, our_next = modules
    assert repr(ours) == repr(theirs) and ours._get_name() == type(ours).__name__ == kind
    assert shapes(ours) == shapes(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert not list(ours.buffers()) and not list(ours.children())
    names = ATTRIBUTES if isinstance(theirs, nn.RNNBase) else type(theirs).__constants__
    for name in (*names, *(["nonlinearity"] if kind[:3] == "RNN" else [])):
        got, expected = getattr(ours, name), getattr(theirs, name)
        assert got == expected and type(got) is type(expected), name
    assert torch.equal(our_next, their_next)  # as many random numbers drawn
    for name, p in theirs.named_parameters():
        assert p.is_meta or torch.equal(getattr(ours, name), p), name
    if isinstance(theirs, nn.RNNBase):
        got = [[id(p) for p in row] for row in ours.all_weights]
        assert got == [[id(getattr(ours, n)) for n in row] for row in theirs._all_weights]
        assert [id(p) for p in ours._flat_weights] == [id(p) for p in ours.parameters()]


def message(error):
    """Without the name of the class whose __init__ it is: ours are spelled out, torch.nn's not."""
    return str(error).split(".__init__() ")[-1]


@pytest.mark.parametrize(("kind", "args", "kwargs"), pairs(INVALID))
def test_constructor_errors(kind, args, kwargs):
    with pytest.raises(Exception) as theirs:
        getattr(nn, kind)(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(fusedrnn, kind)(*args, **kwargs)
    assert type(ours.value) is type(theirs.value)
    if not isinstance(theirs.value, TypeError) or "should be" in str(theirs.value):
        assert message(ours.value) == message(theirs.value)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_backend(kind):
    with pytest.raises(ValueError, match=r"unknown backend 'x', expected one of \['cudnn', 'c"):
        getattr(fusedrnn, kind)(3, 4, backend="x")
    assert "backend='reference'" in repr(getattr(fusedrnn, kind)(3, 4, backend="reference"))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_dropout_of_one_layer_warns(kind):
    text = "dropout option adds dropout after all but last recurrent layer"
    with pytest.warns(UserWarning, match=text):
        getattr(fusedrnn, kind)(3, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fusedrnn, kind)(3, 4, dropout=0.5, num_layers=2)


@pytest.mark.parametrize("kind", KINDS)
def test_signature_names_every_argument(kind):
    """For editors, and for nn.utils.skip_init, which looks for device."""
    parameters = inspect.signature(getattr(fusedrnn, kind)).parameters
    documented = ["input_size", "hidden_size", "bias", "device", "dtype", "backend"]
    assert [name for name in parameters if name in documented] == documented
    module = nn.utils.skip_init(getattr(fusedrnn, kind), 3, 4)
    assert shapes(module) == shapes(getattr(nn, kind)(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_default_device_and_dtype(kind):
    with torch.device("meta"):
        assert all(p.is_meta for p in getattr(fusedrnn, kind)(3, 4).parameters())
    torch.set_default_dtype(torch.float64)
    module = getattr(fusedrnn, kind)(3, 4)
    torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float64 for p in module.parameters())


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_reset_parameters(kind):
    ours, theirs = twins(kind, 3, 4)
    for module in (ours, theirs):
        torch.manual_seed(9)
        module.reset_parameters()
    for name, p in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), p)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_state_dict_both_ways(kind):
    options = {"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}
    ours, theirs = twins(kind, 3, 4, **options)  # loads torch.nn's into ours, strictly
    theirs.reset_parameters()
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in ours.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*bias_hh"):
        ours.load_state_dict({k: v for k, v in ours.state_dict().items() if "bias_hh" not in k})
    assigned = {k: torch.randn_like(v) for k, v in ours.state_dict().items()}
    ours.load_state_dict(assigned, assign=True)
    theirs.load_state_dict(assigned)
    assert_equals_torch(ours, theirs, torch.randn(5, 2, 3) if kind in LAYERS else torch.randn(2, 3))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_methods_of_rnnbase(kind, batch_first):
    """check_*, get_expected_*, permute_hidden and _weights_have_changed answer as torch.nn's."""
    ours, theirs = twins(kind, 3, 4, 2, bidirectional=True, batch_first=batch_first)
    x, packed = torch.randn(5, 2, 3), torch.randn(7, 3)
    hx = make_hx(ours, 5 if batch_first else 2)
    sizes = [torch.tensor([3, 3, 1]), None]
    for batch_sizes, data in zip(sizes, (packed, x), strict=True):
        for name in ("get_expected_hidden_size", "get_expected_cell_size"):
            assert hasattr(ours, name) == hasattr(theirs, name)
            if hasattr(ours, name):
                expected = getattr(theirs, name)(data, batch_sizes)
                assert getattr(ours, name)(data, batch_sizes) == expected
        assert ours.check_input(data, batch_sizes) is None
    assert ours.check_forward_args(x, hx, None) is None
    order = torch.tensor([1, 0])
    permuted = ours.permute_hidden(make_hx(ours, 2), order)
    assert isinstance(permuted, tuple) == isinstance(hx, tuple)
    assert ours.permute_hidden(hx, None) is hx
    state = torch.zeros(1, 2, 3)
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match=r"^wanted \(1, 2\), found \[1, 2, 3\]$"):
            module.check_hidden_size(state, (1, 2), "wanted {}, found {}")
        with pytest.raises(RuntimeError, match=r"^Expected hidden size \(1, 2\), got \[1, 2, 3\]$"):
            module.check_hidden_size(state, (1, 2))
    assert ours.flatten_parameters() is None
    assert ours._init_flat_weights() is None and ours._update_flat_weights() is None
    assert ours._weights_have_changed() is False
    assert ours._apply(lambda t: t.double()) is ours
    assert {p.dtype for p in ours._flat_weights} == {torch.float64}
    assert "_flat_weight_refs" not in ours.__getstate__()
    assert all(isinstance(ref, weakref.ref) for ref in ours._flat_weight_refs)


def test_downstream_idioms():
    layer = fusedrnn.GRU(3, 4, 2)
    assert isinstance(layer, nn.RNNBase) and not isinstance(layer, nn.GRU)
    for name in layer._flat_weights_names:
        if "weight" in name:
            nn.init.xavier_uniform_(layer._parameters[name])
    nn.init.zeros_(layer.all_weights[0][0])
    assert not layer.weight_ih_l0.any()
    with pytest.raises(TypeError, match=r"cannot assign 'torch.FloatTensor' as parameter"):
        layer.weight_hh_l0 = torch.zeros(12, 4)
    layer.weight_hh_l0 = nn.Parameter(torch.ones(12, 4))
    assert layer._flat_weights[1] is layer.weight_hh_l0
    layer._flat_weights = layer._flat_weights[:]
    with pytest.raises(AttributeError, match=r"^assign weight_hh_l0, not _flat_weights: "):
        layer._flat_weights = [w * 2 if w is layer.weight_hh_l0 else w for w in layer._flat_weights]
    layer.dropout = 0.5
    assert "dropout=0.5" in repr(layer)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_state_of_an_old_pickle(kind):
    """Before 1.8 without proj_size; before 1.4 with tensors in _all_weights."""
    layer = getattr(fusedrnn, kind)(3, 4, bidirectional=True)
    state = layer.__getstate__()
    del state["proj_size"]
    state["_all_weights"] = [[torch.zeros(1)]]
    del state["_flat_weights_names"]
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    assert old.proj_size == 0 and old._all_weights == layer._all_weights
    x = torch.randn(5, 2, 3)
    assert torch.equal(old(x)[0], layer(x)[0])
    assert torch.equal(pickle.loads(pickle.dumps(old))(x)[0], layer(x)[0])
