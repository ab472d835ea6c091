"""Forks, threads, exits and repeated errors, each in a process of its own with a timeout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedrnn.backends import native

START = """
import os, sys, threading, time
import torch
torch.manual_seed(0)
torch.set_num_threads({threads})

def work(layer):
    # One training step: large enough for every thread to get a part.
    x = torch.randn(20, 64, 32, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    return y.detach()
"""


def run(program: str, threads: int = 2) -> None:
    """The program ends, within five minutes, with exit status 0 and "done" as its last line."""
    root = str(Path(__file__).parent.parent)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = root
    result = subprocess.run(
        [sys.executable, "-c", START.format(threads=threads) + program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1:] == ["done"], result.stdout


FORK = """
import warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)

def child_survives(function, seconds=5):
    # True if a forked child runs function to its end in time.
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False
"""


def test_forked_child_after_import():
    run(
        FORK
        + """
import fusedrnn
assert child_survives(lambda: [work(c(32, 128)) for c in (fusedrnn.LSTM, fusedrnn.GRU)])
work(fusedrnn.LSTM(32, 128))
print("done")
""",
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_child_after_a_run(threads):
    """Wherever nn.Linear survives the same: OpenMP's own threads do not outlive every fork."""
    run(
        FORK
        + """
import fusedrnn
linear = lambda: work(lambda x: (torch.nn.Linear(32, 512)(x), None))
layer = fusedrnn.LSTM(32, 128)
linear()
expected = work(layer)
if child_survives(linear):
    assert child_survives(lambda: work(layer))
else:
    print("nn.Linear does not survive")
assert work(layer).shape == expected.shape
print("done")
""",
        threads=threads,
    )


def test_data_loader_worker():
    run(
        """
import fusedrnn
from torch.utils.data import DataLoader, Dataset

class Encoded(Dataset):
    layer = fusedrnn.GRU(3, 8)
    def __len__(self):
        return 6
    def __getitem__(self, i):
        x = torch.full((5, 3), float(i))
        return self.layer(x)[0].detach()

with torch.no_grad():
    expected = torch.stack([Encoded()[i] for i in range(6)])
loader = DataLoader(Encoded(), 3, num_workers=2, multiprocessing_context="fork", timeout=200)
torch.testing.assert_close(torch.cat(list(loader)), expected)
print("done")
""",
        threads=1,
    )


def test_import_in_a_thread():
    run(
        """
errors = []
threading.excepthook = lambda args: errors.append(args)
def load():
    import fusedrnn
    work(fusedrnn.LSTM(32, 128))
threads = [threading.Thread(target=load) for _ in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not errors, errors
import fusedrnn
work(fusedrnn.LSTM(32, 128))
print("done")
""",
    )


@pytest.mark.skipif(
    native.isa() is None,
    reason="no native library: a loop of PyTorch's operations ends as PyTorch's own do",
)
@pytest.mark.parametrize("training", [True, False])
def test_exit_while_a_daemon_thread_is_in_a_call(training):
    """Inside the one long operation that a call is. (Between two operations of PyTorch itself,
    Python before 3.14 ends the thread, and PyTorch the process: nn.Linear in a loop aborts.)"""
    run(
        f"""
import fusedrnn
layer = fusedrnn.LSTM(8, 1024)
inside, returned = threading.Event(), threading.Event()
def call():
    x = torch.randn(10_000, 1, 8)
    torch.set_grad_enabled({training})
    inside.set()
    layer(x)
    returned.set()
threading.Thread(target=call, daemon=True).start()
inside.wait()
time.sleep(0.5)
assert not returned.is_set()
print("done")
"""
    )


def test_threads_at_once():
    """Three Python threads, each with a layer of its own and one that they share."""
    run(
        """
import fusedrnn
shared = fusedrnn.LSTM(32, 96, 2, bidirectional=True)
layers = [fusedrnn.LSTM(32, 128), fusedrnn.GRU(32, 100), fusedrnn.RNN(32, 64, 2)]
x = torch.randn(20, 64, 32)
def results(layer):
    y, _ = layer(x)
    yield y
    yield from torch.autograd.grad(y.square().sum(), list(layer.parameters()))
expected = {id(l): list(results(l)) for l in (*layers, shared)}
errors, rounds = [], []
threading.excepthook = lambda args: errors.append(args.exc_value)
def loop(layer):
    for _ in range(3):
        for l in (layer, shared):
            torch.testing.assert_close(list(results(l)), expected[id(l)])
            rounds.append(l)
threads = [threading.Thread(target=loop, args=(layer,)) for layer in layers]
[t.start() for t in threads]
[t.join() for t in threads]
assert not errors, errors
assert len(rounds) == 18
print("done")
""",
    )


def test_errors_leak_nothing():
    """Failing calls, and failing backwards, leave neither threads nor memory behind."""
    run(
        """
import gc, pathlib
import pytest
import fusedrnn
layer = fusedrnn.LSTM(32, 128)
x = torch.randn(10, 64, 32)
bad = [
    lambda: layer(x[..., 1:]),
    lambda: layer(x, (torch.zeros(1, 64, 128), torch.zeros(1, 3, 128))),
    lambda: layer(x, lengths=[11] * 64),
    lambda: layer(x, resets=torch.zeros(3, 3).bool()),
    lambda: layer(x.double()),
    lambda: fusedrnn.functional.lstm(x, None, list(layer.parameters())[1:]),
    lambda: layer(x)[0].sum().backward(torch.ones(3)),
    lambda: edited(),
]
def edited():
    z = x.clone()
    y, _ = layer(z)
    z.zero_()
    y.sum().backward()
def fail_all():
    for call in bad:
        with pytest.raises((RuntimeError, ValueError)):
            call()
def threads():
    return len(os.listdir("/proc/self/task"))
def megabytes():
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
work(layer)
fail_all()
fail_all()
count, before = threads(), megabytes()
for _ in range(20):
    fail_all()
# What one call saves is over 2 MB: forty kept ones would be over 80.
assert threads() == count, (threads(), count)
assert megabytes() - before < 40, (megabytes(), before)
layer.zero_grad()
work(layer)
print("done")
""",
    )


@pytest.mark.skipif(native.isa() is None, reason="no native library")
@pytest.mark.parametrize("threads", [1, 2])
def test_subnormal_numbers(threads):
    """They are zeros to the engine, in all its threads, and afterwards again what they were to the
    caller: in each of these threads."""
    run(
        """
import fusedrnn
layer = fusedrnn.LSTM(4, 128)
[torch.nn.init.zeros_(p) for p in layer.parameters()]
x, h = torch.zeros(2, 512, 4), torch.zeros(1, 512, 128)
c, gates = torch.full((1, 512, 128), 1e-38), torch.zeros(512, 4 * 128)
large = torch.full((1 << 20,), 1e-39)
for flushes in (False, True, False):
    torch.set_flush_denormal(flushes)
    before = (large * 0.5).count_nonzero().item()
    assert flushes or before == large.numel()
    # Every step halves c.
    assert not layer(x, (h, c))[1][1].any()
    assert not fusedrnn.functional.lstm_cell_update(gates, c[0])[1].any()
    assert (large * 0.5).count_nonzero().item() == before
print("done")
""",
        threads=threads,
    )
