"""PyTorch's own samples of the six modules, valid and invalid, on ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from against_torch import assert_equals_torch, flatten, run
from torch import Tensor, nn

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]
DTYPES = [torch.float32, torch.float64]
GROUPS = [(name, dtype, training) for name in NAMES for dtype in DTYPES for training in (1, 0)]
by_group = pytest.mark.parametrize(
    ("name", "dtype", "training"), GROUPS, ids=lambda v: str(v).removeprefix("torch.")
)


@pytest.fixture(scope="module")
def infos():
    from torch.testing._internal.common_modules import module_db  # takes seconds

    ours = {getattr(nn, name): name for name in NAMES}
    return {ours[info.module_cls]: info for info in module_db if info.module_cls in ours}


def make(function, info, dtype, training):
    return list(function(info, device="cpu", dtype=dtype, requires_grad=True, training=training))


def build(sample, name, dtype, training):
    arguments = sample.constructor_input
    theirs = getattr(nn, name)(*arguments.args, **arguments.kwargs).to(dtype).train(bool(training))
    ours = getattr(fusedrnn, name)(*arguments.args, **arguments.kwargs).to(dtype)
    ours.train(bool(training)).load_state_dict(theirs.state_dict())
    assert not sample.forward_input.kwargs
    return ours, theirs, sample.forward_input.args


def remade(value, change):
    if isinstance(value, Tensor):
        return change(value.detach())
    return type(value)(remade(part, change) for part in value)


def strided(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def constant(t):
    return t.select(-1, 0).unsqueeze(-1).expand_as(t)


def test_there_are_348_samples_and_116_error_inputs(infos):
    for info in infos.values():
        assert set(info.supported_dtypes("cpu")) == set(DTYPES)
    samples = [make(infos[n].module_inputs_func, infos[n], d, t) for n, d, t in GROUPS]
    assert sum(map(len, samples)) == 348
    errors = [make(infos[n].module_error_inputs_func, infos[n], d, t) for n, d, t in GROUPS if t]
    assert sum(map(len, errors)) == 116


@by_group
def test_samples(name, dtype, training, infos, subtests):
    info = infos[name]
    for i, sample in enumerate(make(info.module_inputs_func, info, dtype, training)):
        with subtests.test(sample=i):
            ours, theirs, inputs = build(sample, name, dtype, training)
            assert repr(ours) == repr(theirs)
            out = assert_equals_torch(ours, theirs, *inputs)
            assert_equals_torch(ours, theirs, *remade(inputs, constant))
            for module, values in (
                (ours, remade(inputs, strided)),
                (copy.deepcopy(ours), inputs),
                (pickle.loads(pickle.dumps(ours)), inputs),
            ):
                again = run(module, *values)
                assert again.keys() == out.keys()
                torch.testing.assert_close(again, out)


@by_group
def test_error_inputs(name, dtype, training, infos, subtests):
    info = infos[name]
    for i, error in enumerate(make(info.module_error_inputs_func, info, dtype, training)):
        with subtests.test(error=i):
            sample, raised = error.module_error_input, []
            on_forward = error.error_on.name == "FORWARD_ERROR"
            for classes in (nn, fusedrnn):
                build_it = getattr(classes, name)
                arguments = sample.constructor_input
                if on_forward:
                    module = build_it(*arguments.args, **arguments.kwargs)
                    module.to(arguments.kwargs.get("dtype", dtype)).train(bool(training))
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    if on_forward:
                        module(*sample.forward_input.args, **sample.forward_input.kwargs)
                    else:
                        build_it(*arguments.args, **arguments.kwargs)
                raised.append((type(caught.value), str(caught.value)))
            assert raised[0] == raised[1]


def test_flatten_finds_every_tensor():
    a, b, c = torch.rand(1), torch.rand(1), torch.rand(1)
    assert flatten((a, (b, c))) == {"out.0": a, "out.1.0": b, "out.1.1": c}
