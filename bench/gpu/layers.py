"""Small forward and backward passes on the backend "cuda", for compute-sanitizer."""

import itertools
import sys
from functools import partial

import torch

import fusedrnn

if "cuda" not in fusedrnn.list_backends():
    sys.exit('this fusedrnn has no backend "cuda"')
LAYERS = (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN, partial(fusedrnn.LSTM, proj_size=8))
BOTH = [partial(layer, bidirectional=True) for layer in LAYERS[:2]]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    *itertools.product(LAYERS, DTYPES, (20, 24)),  # rows in parts of 8 and of 16 bytes, in 16 bits
    *itertools.product(LAYERS[:2], DTYPES[1:], (136, 520)),  # several blocks: a cluster, a grid
    *itertools.product(BOTH, DTYPES[1:], (24, 136, 520)),
]
CASES = [(*case, 3) for case in CASES] + [(fusedrnn.LSTM, torch.bfloat16, 520, 97)]  # many rows
for layer, dtype, hidden, rows in CASES:
    module = layer(5, hidden, backend="cuda").to("cuda", dtype)
    x = torch.randn(3, rows, 5, device="cuda", dtype=dtype, requires_grad=True)
    y, _ = module(x)
    gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    if not all(value.isfinite().all() for value in (y, *gradients)):
        sys.exit(f"{module} in {dtype}: a value is not finite")
print("all values are finite")
