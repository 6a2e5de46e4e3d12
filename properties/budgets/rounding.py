"""Unit roundoffs of a declared precision, and the growth of rounding errors.

u is the unit roundoff of a format (half the spacing at 1), η half its smallest subnormal number. Formats:
Blanchard, Higham & Higham 2021, tables 1 and 2. γ_n = n·u / (1 − n·u) bounds n roundings (Higham 2002, lemma
3.1); λ√n·u is their probable growth (Higham & Mary 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attnproof.properties.contract import Contract, Precision

__all__ = ["LARGEST", "MEAN_SQUARE", "Roundings", "growth", "half_spacing"]

_UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    # A tf32 operand may be rounded to 10 bits or truncated to them, as tensor cores do with the bits they are
    # given.
    "tf32": 2.0**-10,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "ieee": 0.0,
    # Tensor cores align the products of a block of K to the largest and truncate at ≥ 24 fractional bits,
    # then truncate the sum to 24 bits (theory.md HW-3): (K + 1)·2⁻²⁴ + 2⁻²³ relative to the block's absolute
    # sum for K ≥ 4 terms, which is at most 2⁻²² for each term added.
    "truncated": 2.0**-22,
}
_SUBNORMAL = {
    "float64": 2.0**-1075,
    "float32": 2.0**-150,
    "tf32": 2.0**-137,
    "bfloat16": 2.0**-134,
    "float16": 2.0**-25,
}
_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "tf32": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-14,
}
LARGEST = {
    "float64": torch.finfo(torch.float64).max,
    "float32": torch.finfo(torch.float32).max,
    "tf32": torch.finfo(torch.float32).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
    "float16": 65504.0,
}

MEAN_SQUARE = 1.0 / (8.0 * math.log(2.0))
"""Mean square of a rounding error relative to the rounded number, over u².

The error of m·2^e, 1 ≤ m < 2, is uniform in ±u·2^e: relative to it u²/(3 m²), which over logarithmically
uniform m is u²/3 · ∫₀¹ 2^−2t dt = u² / (8 ln 2). A third, for m = 1, would be 1.85 times as much.
"""

# Mean relative error of truncation to spacing u·2^e of m·2^e: u/2 · ∫₀¹ 2^−t dt.
_TRUNCATED_MEAN = 1.0 / (4.0 * math.log(2.0))


@dataclass(frozen=True)
class Roundings:
    """The unit roundoffs of a kernel, from its declared precision and the dtype of its inputs.

    Attributes:
        operand: rounding of matmul operands that were computed (a scaled q); input: of operands that are the
            inputs themselves, nonzero only where the declared operand format is narrower than the inputs'
            dtype.
        accumulate: each addition of a sum or matmul.
        elementwise: float operations outside matmuls.
        scores, probabilities, lse, output: storage.
        exp: relative error of one exponential, its argument's rounding not included.
        operand_tiny, scores_tiny, probabilities_tiny, accumulate_tiny, output_tiny: absolute error where
            results are subnormal, or are flushed.
        largest: largest number of the accumulation; scores_largest: of stored scores.
        truncated: accumulation truncates, so that its errors have one sign and grow with n.
        formats: (u, η, largest number) by the name of what is stored.
        operand_lean: how much smaller than themselves operands may be on average, where a format is declared
            to which hardware may truncate them.
    """

    operand: float
    input: float
    accumulate: float
    elementwise: float
    scores: float
    probabilities: float
    lse: float
    output: float
    exp: float
    operand_tiny: float
    scores_tiny: float
    probabilities_tiny: float
    accumulate_tiny: float
    output_tiny: float
    largest: float
    scores_largest: float
    truncated: bool
    operand_lean: float
    formats: Mapping[str, tuple[float, float, float]]

    def storage(self, kind: str) -> tuple[float, float, float]:
        """(unit roundoff, half the smallest subnormal number, largest number) of where ``kind`` is stored.

        ``kind`` is a storage field of Precision, or "operand" for a computed matmul operand.
        """
        return self.formats[kind]

    @classmethod
    def of(cls, contract: Contract, dtype: str, output_dtype: str | None = None) -> Roundings:
        """The roundings of a kernel under ``contract`` for inputs of ``dtype``.

        ``output_dtype`` of a given output.
        """
        precision: Precision = contract.precision.resolved(dtype)
        storage = {
            name: str(getattr(precision, name)) for name in ("scores", "probabilities", "lse", "output")
        }
        if output_dtype is not None:
            storage["output"] = output_dtype
        operand, accumulate = str(precision.matmul_input), str(precision.accumulate)
        accumulated = "float32" if accumulate == "truncated" else accumulate
        wide = "float64" if dtype == "float64" else "float32"
        elementwise = _UNIT[wide]
        storage |= {name: str(getattr(precision, name)) for name in ("dscores", "state")}
        narrower = _UNIT[operand] > _UNIT[dtype]
        tiny = _NORMAL if contract.flush_subnormals else _SUBNORMAL
        return cls(
            operand=_UNIT[operand],
            input=_UNIT[operand] if narrower else 0.0,
            accumulate=_UNIT[accumulate],
            elementwise=elementwise,
            scores=_UNIT[storage["scores"]],
            probabilities=_UNIT[storage["probabilities"]],
            lse=_UNIT[storage["lse"]],
            output=_UNIT[storage["output"]],
            exp=2.0 * float(precision.exp_ulp or 2.0) * elementwise,
            operand_tiny=0.0 if operand == "ieee" else tiny[operand],
            scores_tiny=tiny[storage["scores"]],
            # Hardware exponentials flush subnormal results to zero, whatever else a kernel does (theory.md
            # HW-1).
            probabilities_tiny=max(tiny[storage["probabilities"]], _NORMAL[wide]),
            accumulate_tiny=2.0 * tiny[accumulated],
            output_tiny=tiny[storage["output"]],
            largest=LARGEST[accumulated],
            scores_largest=min(LARGEST[storage["scores"]], LARGEST[accumulated]),
            truncated=accumulate == "truncated",
            operand_lean=_TRUNCATED_MEAN * _UNIT["tf32"] if operand == "tf32" and narrower else 0.0,
            formats={
                **{name: (_UNIT[form], tiny[form], LARGEST[form]) for name, form in storage.items()},
                "operand": (
                    _UNIT[operand],
                    0.0 if operand == "ieee" else tiny[operand],
                    LARGEST[wide if operand == "ieee" else operand],
                ),
            },
        )


def growth(n: torch.Tensor | float, unit: float) -> torch.Tensor:
    """γ_n = n·u / (1 − n·u), the worst growth of n roundings; +inf where n·u ≥ 1."""
    product = torch.as_tensor(n, dtype=torch.float64) * unit
    return torch.where(product < 1.0, product / (1.0 - product).clamp(min=1e-300), torch.inf)


def half_spacing(x: torch.Tensor, unit: float, tiny: float) -> torch.Tensor:
    """Half the distance of neighbouring numbers of a format at ``x``: what one rounding errs by at most.

    ``unit`` and ``tiny`` are the format's u and half its smallest subnormal number.
    """
    mantissa, exponent = torch.frexp(x)
    spacing = torch.ldexp(torch.full_like(x, unit), exponent - 1)
    return torch.where(mantissa == 0, 0.0, spacing).clamp(min=tiny)
