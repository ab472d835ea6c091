"""The cells in Triton: per module the functions ``forward`` and ``backward`` of one cell.

Each argument is a tuple of blocks ``[BLOCK_B, BLOCK_H]`` of float32 or float64:

- ``forward(gx, gh, state) -> new, saved``: what gates got from x and from h, biases included, and
  the states that enter, h first; the new states, and what backward needs beside ``state``.
- ``backward(state, saved, dnew) -> dgx, dgh, dstate``: ``dstate[0]`` without what passes through
  ``gh``, which the driver adds.

What forward saves, and the new h, is rounded to the dtype of x in between.
"""
