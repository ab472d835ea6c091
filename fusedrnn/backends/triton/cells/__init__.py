"""The cells in Triton: per module the functions ``forward`` and ``backward`` of one cell.

Each argument is a tuple of blocks ``[BLOCK_B, BLOCK_H]`` of float32 or float64:

- ``forward(gx, gh, state) -> new, saved``: what gates got from x and from h, biases included, and
  the states that enter, h first; the new states, and what backward needs beside ``state``.
- ``backward(state, saved, dnew) -> dgx, dgh, dstate``: ``dstate[0]`` without what passes through
  ``gh``, which the driver adds.

A cell with params takes them as a last argument, a tuple of rows ``[1, BLOCK_H]``, and its backward
returns their gradients last, ``[BLOCK_B, BLOCK_H]`` each: what every row adds to them.

Of a cell whose second state layer norm may make another of on its way into h, the module has three
more. There c is as it goes into h, and gates' gradients are before their activations:

- ``output(saved, c) -> h``;
- ``backward_of_output(saved, c, dh) -> dgate, dc``: of the gate that lets c out;
- ``backward_of_gates(state, saved, dgate, dc)`` returns what ``backward`` does; dc is all that
  comes to the new c from outside.

Of a cell with late gates, which see h times a factor, the module has two more:

- ``factor(gx, gh, state)``, where gh is that of the other gates; forward saves it first;
- ``backward_of_late(state, saved, dnew) -> dlate``: the late gates' gradients, before their
  activations; ``backward`` takes as a last argument that of the factor.

What forward saves, and the new h, is rounded to the dtype of x in between.
"""
