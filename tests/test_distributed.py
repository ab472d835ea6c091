"""Training on two processes equals torch.nn's on one: DDP, and FSDP2 from the meta device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Each process trains ours on its half of the batch; every process checks the whole result against
# torch.nn trained on all of it. argv: rank, file to meet at.
PROGRAM = """
import copy, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
import fusedrnn

rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

class Model(nn.Module):
    def __init__(self, classes):
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
        self.lstm = classes.LSTM(5, 6, proj_size=3, **options)
        self.gru = classes.GRU(6, 6, **options)
        self.rnn = classes.RNN(12, 6, **options)
        self.cell = classes.LSTMCell(12, 6, dtype=torch.float64)

    def forward(self, x):
        for layer in (self.lstm, self.gru, self.rnn):
            x, _ = layer(x)
        return self.cell(x[-1])[0]

torch.manual_seed(0)
theirs = Model(nn)
state = copy.deepcopy(theirs.state_dict())
x = torch.randn(7, 8, 5, dtype=torch.float64)
half = x[:, 4 * rank : 4 * rank + 4]

def wrapped(how):
    # Our model on these weights, and a function that gives its whole state_dict.
    if how == "ddp":
        ours = Model(fusedrnn)
        ours.load_state_dict(state)
        ours = nn.parallel.DistributedDataParallel(ours)
        return ours, lambda: {k.removeprefix("module."): v for k, v in ours.state_dict().items()}
    with torch.device("meta"):
        ours = Model(fusedrnn)
    for part in (*ours.children(), ours):
        fully_shard(part, mesh=mesh)
    assert all(p.is_meta for p in ours.parameters())
    ours.to_empty(device="cpu")
    for layer in ours.children():
        layer.reset_parameters()
    assert all(p.to_local().isfinite().all() for p in ours.parameters())
    sharded = {k: distribute_tensor(v, p.device_mesh, p.placements)
               for (k, v), p in zip(state.items(), ours.parameters(), strict=True)}
    ours.load_state_dict(sharded, assign=how == "fsdp-assign")
    return ours, lambda: {k: v.full_tensor() for k, v in ours.state_dict().items()}

def train(model, x):
    for _ in range(3):
        model.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad

mesh = init_device_mesh("cpu", (2,))
train(theirs, x)
assert not torch.equal(theirs.state_dict()["gru.weight_hh_l0"], state["gru.weight_hh_l0"])
for how in ("ddp", "fsdp-load", "fsdp-assign"):
    ours, full = wrapped(how)
    train(ours, half)
    torch.testing.assert_close(full(), dict(theirs.state_dict()))
    print(how, "equal", flush=True)
dist.destroy_process_group()
# Python's own end would race with gloo's threads, which free tensors at their leisure and abort
# where there is no interpreter left to free them in (pytorch/pytorch#190489).
os._exit(0)
"""


def test_training_steps(tmp_path, request):
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    workers = []
    for rank in "01":
        command = [sys.executable, "-c", PROGRAM, rank, str(tmp_path / "meeting")]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        workers.append(subprocess.Popen(command, env=environment, **output))
        request.addfinalizer(workers[-1].kill)
    for worker in workers:
        output, _ = worker.communicate(timeout=600)
        assert worker.returncode == 0, output
        equal = [line for line in output.splitlines() if line.endswith(" equal")]
        assert equal == ["ddp equal", "fsdp-load equal", "fsdp-assign equal"], output
