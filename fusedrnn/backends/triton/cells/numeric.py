"""The arithmetic that the cells share, on blocks of float32 or float64."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Within 4 ulp on a GPU, also around 0, by the polynomials of csrc/numeric.h: the derivative of
    a saturated unit, formed from the result, magnifies an error in it."""
    s = x * x
    if x.dtype == tl.float64:
        tail = -0.000016072547947184083844
        tail = tail * s + 0.000077144319803766954723
        tail = tail * s - 0.00022856416746185350786
        tail = tail * s + 0.00058631651730852488023
        tail = tail * s - 0.0014549588704285590817
        tail = tail * s + 0.0035919891722170132245
        tail = tail * s - 0.0088632210024128102355
        tail = tail * s + 0.021869487576076014545
        tail = tail * s - 0.053968253931266772715
        tail = tail * s + 0.13333333333262088958
        tail = tail * s - 0.33333333333332855243
    else:
        tail = -0.0057049780772
        tail = tail * s + 0.020639078449
        tail = tail * s - 0.053739712056
        tail = tail * s + 0.13331442156
        tail = tail * s - 0.3333328194
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))  # 1 where exp overflows
    return tl.where(s < 0.625 * 0.625, x + x * s * tail, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid_backward(dy, y):
    """The gradient of x from that of ``y = sigmoid(x)``."""
    return dy * (y * (1 - y))


@triton.jit
def tanh_backward(dy, y):
    """The gradient of x from that of ``y = tanh(x)``."""
    return dy * (1 - y * y)
