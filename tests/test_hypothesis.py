"""500 random calls against torch.nn: outputs and every gradient."""

from __future__ import annotations

import torch
from against_torch import assert_equals_torch, make_hx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

small = st.integers(1, 9)
size = st.one_of(small, st.sampled_from([16, 17, 31, 64, 65]))


@st.composite
def calls(draw):
    """Class, constructor options, dtype and what to call it with."""
    name = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    options = {
        "input_size": draw(size),
        "hidden_size": draw(size),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }
    if name == "LSTM" and options["hidden_size"] > 1 and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, options["hidden_size"] - 1))
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if options["num_layers"] > 1 and draw(st.booleans()):
        options["dropout"] = draw(st.sampled_from([0.1, 0.5]))
    steps, batch = draw(st.integers(1, 20)), draw(st.integers(0, 9))
    lengths = None
    if batch and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    return name, options, steps, batch, lengths, draw(st.booleans()), draw(st.integers(0, 2**31))


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(calls())
def check(call):
    name, options, steps, batch, lengths, with_hx, seed = call
    torch.manual_seed(seed)
    theirs = getattr(nn, name)(**options)
    ours = getattr(fusedrnn, name)(**options)
    ours.load_state_dict(theirs.state_dict())
    shape = (batch, steps) if options["batch_first"] else (steps, batch)
    x = torch.randn(*shape, options["input_size"], dtype=options["dtype"])
    if lengths is not None:
        x = pack_padded_sequence(x, lengths, options["batch_first"], enforce_sorted=False)
    assert_equals_torch(ours, theirs, x, make_hx(ours, batch) if with_hx else None)
    check.examples += 1


def test_random_calls(one_thread):
    check.examples = 0
    check()
    assert check.examples >= 500
