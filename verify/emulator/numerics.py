"""Roundings that torch does not have: tf32, towards zero, saturating float8, fused multiply-add."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The largest finite values; conversions on NVIDIA GPUs saturate there (PTX ISA, cvt.satfinite), infinities
# included.
FLOAT8_MAX: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2fnuz: 57344.0,
}


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to 10 explicit mantissa bits, ties away from zero (PTX cvt.rna.tf32.f32)."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    # The carry would turn a NaN with a high payload into something else.
    return torch.where(torch.isfinite(x), rounded, x)


def truncate_to_bfloat16(x: Tensor) -> Tensor:
    """float32 to bfloat16, towards zero."""
    bits = x.contiguous().view(torch.int32) >> 16
    cut = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isnan(x), torch.full_like(cut, float("nan")), cut)


def truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a narrower float type towards zero."""
    if dtype == torch.bfloat16:
        return truncate_to_bfloat16(x.float())
    nearest = x.to(dtype)
    wide = nearest.to(x.dtype)
    over = wide.abs() > x.abs()
    carrier = torch.int8 if dtype.itemsize == 1 else torch.int16 if dtype.itemsize == 2 else torch.int32
    # One step down in magnitude is one less in the bit pattern, whatever the sign.
    bits = nearest.view(carrier)
    return torch.where(over, bits - 1, bits).view(dtype)


def to_float8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest, ties to even, saturating at the largest finite value; NaN stays NaN."""
    limit = FLOAT8_MAX[dtype]
    return x.float().clamp(-limit, limit).to(dtype)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _odd_sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b in float64 rounded to odd: rounding it again to a shorter format is as good as rounding once.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
    odd", 2008.
    """
    total, rest = _two_sum(a, b)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    inexact = (rest != 0) & torch.isfinite(rest) & torch.isfinite(total) & even
    away = (rest > 0) == (total > 0)
    return torch.where(inexact, torch.where(away, bits + 1, bits - 1), bits).view(torch.float64)


def square_root(x: Tensor) -> Tensor:
    """√x, rounded correctly: torch's own is not on every CPU (one float32 result in five differs)."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.double().numpy()))).to(x.dtype)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c with one rounding for float32 and narrower.

    Products of two float32 numbers are exact in float64; the sum is rounded to odd there, which makes the
    second rounding harmless. float64 itself is computed with an error-free product and two roundings in rare
    cases (error at most 0.5 + 2⁻⁵² ulp).
    """
    if a.dtype != torch.float64:
        return _odd_sum(a.double() * b.double(), c.double()).to(a.dtype)
    product = a * b
    # Veltkamp and Dekker: the product's own rounding error, exact barring overflow.
    factor = 134217729.0
    high_a, high_b = a * factor, b * factor
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total, rest = _two_sum(product, c)
    fused = total + (rest + error)
    return torch.where(torch.isfinite(fused), fused, product + c)


def split(x: Tensor, kind: str, pieces: int) -> list[Tensor]:
    """float32 as a sum of `pieces` numbers of a shorter format (`tf32` or `bf16`), largest first."""
    parts = []
    for _ in range(pieces):
        part = round_to_tf32(x) if kind == "tf32" else x.bfloat16().float()
        # An infinity minus itself would be NaN: the remainder of a non-finite number is zero.
        x = torch.where(torch.isfinite(part), x - part, 0.0)
        parts.append(part)
    return parts
