"""Activations of state-space models on blocks inside kernels, accurate on both sides: softplus, σ, silu and
their slopes, and the ratio (eˣ − 1)/x of the zero-order hold.

All take and return float32 blocks. Only e^−|x| is ever formed, so nothing overflows, and no digits cancel:
1 − σ(x) is σ(−x) (bugs B63), log(1 + eˣ) and eˣ − 1 are series with terms of one sign, or nearly so. None
of them takes a logarithm: hardware's is good to 2^−22 *absolutely* near 1 (``lg2.approx``), where log(1 + t)
needs it relatively. With u = 2^−24, eˣ exact to ε and a division exact to 2 ulp, relative errors are

    softplus(x)      ε + 7u,      σ(x)     ε + 6u,      silu(x)     ε + 7u,
    (eˣ − 1)/x       5u for |x| < 1.5, (0.3 ε + 6u) beyond,
    its slope        ε + 6u for |x| < 1.5, (1.3 ε + 8u) beyond,

those of softplus and the ratio for all x, or x ≤ 0, the ones a selective scan takes. silu'(x) = σ(x)·(1 + x
σ(−x)) has its zero at x ≈ −1.278, and there an error of that size of σ(x), not of itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "SERIES_END",
    "expm1_ratio_series",
    "expm1_ratio_slope_series",
    "sigmoid",
    "silu",
    "silu_slope",
    "softplus",
]

# Up to |x| = 1.5 the series below are used, and beyond it eˣ − 1 itself, which loses at most a quarter of
# its digits' worth: e^−1.5 = 0.22. At 1.5 the first term left out of the series is below 2^−27 of the sum.
SERIES_END: tl.constexpr = tl.constexpr(1.5)


@triton.jit
def softplus(b_x):
    """log(1 + eˣ) = max(x, 0) + log(1 + t) with t = e^−|x|.

    log(1 + t) = 2 artanh(s), s = t/(2 + t) ≤ 1/3: Σ 2 s^(2k+1)/(2k+1), all terms of one sign; the first one
    left out, k = 8, is below 2^−29 of the sum. For x far below 0 this is eˣ, for x far above it x.
    """
    b_t = tl.exp(-tl.abs(b_x))
    b_s = b_t / (2.0 + b_t)
    b_q = b_s * b_s
    b_sum = 0.07692307692307693 + b_q * 0.06666666666666667
    b_sum = 0.09090909090909091 + b_q * b_sum
    b_sum = 0.1111111111111111 + b_q * b_sum
    b_sum = 0.14285714285714285 + b_q * b_sum
    b_sum = 0.2 + b_q * b_sum
    b_sum = 0.3333333333333333 + b_q * b_sum
    b_sum = 1.0 + b_q * b_sum
    return tl.maximum(b_x, 0.0) + 2.0 * b_s * b_sum


@triton.jit
def sigmoid(b_x):
    """σ(x) = 1/(1 + e^−x), which is the slope of softplus."""
    b_t = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_t) / (1.0 + b_t)


@triton.jit
def silu(b_x):
    """x σ(x)."""
    return b_x * sigmoid(b_x)


@triton.jit
def silu_slope(b_x):
    """The derivative of silu, σ(x)·(1 + x σ(−x))."""
    b_t = tl.exp(-tl.abs(b_x))
    b_side, b_other = tl.where(b_x >= 0, 1.0, b_t), tl.where(b_x >= 0, b_t, 1.0)
    return b_side / (1.0 + b_t) * (1.0 + b_x * (b_other / (1.0 + b_t)))


@triton.jit
def second_exponential(b_x):
    """Σ x^k/(k+2)! up to k = 11, which is (eˣ − 1 − x)/x², for |x| < 1.5."""
    b_sum = 2.08767569878681e-09 + b_x * 1.6059043836821613e-10
    b_sum = 2.505210838544172e-08 + b_x * b_sum
    b_sum = 2.755731922398589e-07 + b_x * b_sum
    b_sum = 2.7557319223985893e-06 + b_x * b_sum
    b_sum = 2.48015873015873e-05 + b_x * b_sum
    b_sum = 0.0001984126984126984 + b_x * b_sum
    b_sum = 0.001388888888888889 + b_x * b_sum
    b_sum = 0.008333333333333333 + b_x * b_sum
    b_sum = 0.041666666666666664 + b_x * b_sum
    b_sum = 0.16666666666666666 + b_x * b_sum
    return 0.5 + b_x * b_sum


@triton.jit
def expm1_ratio_series(b_x):
    """(eˣ − 1)/x = 1 + x φ(x) with φ of :func:`second_exponential`; for |x| < SERIES_END, 1 at 0."""
    return 1.0 + b_x * second_exponential(b_x)


@triton.jit
def expm1_ratio_slope_series(b_x, b_exp):
    """The derivative of (eˣ − 1)/x, which is eˣ φ(−x): terms of one sign for x ≤ 0; 1/2 at 0. b_exp is eˣ."""
    return b_exp * second_exponential(-b_x)
