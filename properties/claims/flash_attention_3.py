"""FlashAttention-3's low precision, exactly: rotation by a Hadamard matrix, scales of blocks, the fused
exponent.

arXiv 2407.08608. Rotations and scales are run over the rationals; float8 numbers are enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.small_formats import E4M3, FLOAT32, Format, exponent
from attnproof.properties.forms.base import Array, each
from attnproof.properties.forms.numbers import Tally, counted, rationals

__all__ = [
    "CLAIMS",
    "block_scales",
    "cancelling_factor",
    "hadamard",
    "peak_of_p",
    "powers_of_two",
    "quantised",
    "rotated_products",
    "rotation_cost",
    "speeds",
    "spread_of_outliers",
    "transform",
]

_PAPER: Final = "Shah et al., FlashAttention-3, arXiv 2407.08608"


def hadamard(order: int) -> Array:
    """Sylvester's matrix of ±1 of ``order`` 2^k, as fmpq."""
    matrix = np.array([[flint.fmpq(1)]], dtype=object)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def transform(x: Array) -> Array:
    """x·H of rows of length 2^k by log₂ passes of sums and differences."""
    x = x.copy()
    half = 1
    while half < x.shape[-1]:
        for start in range(0, x.shape[-1], 2 * half):
            a, b = x[..., start : start + half], x[..., start + half : start + 2 * half]
            x[..., start : start + half], x[..., start + half : start + 2 * half] = a + b, a - b
        half *= 2
    return x


def rotated_products(
    *, same_signs: bool = True, orders: Sequence[int] = (1, 2, 4, 8, 16, 32)
) -> ClaimFinding:
    """Is (QM)(KM)ᵀ = QKᵀ for M = diag(signs)·H/√d? Over the rationals as (QDH)(KDH)ᵀ = d·QKᵀ.

    Args:
        same_signs: False rotates K with signs of its own.
    """
    rng = np.random.default_rng(31)
    rows, wrong = [], []
    for d in orders:
        q, k = rationals(rng, 5, d), rationals(rng, 6, d)
        signs = each(lambda x: flint.fmpq(int(x)), rng.choice((-1, 1), d))
        others = signs if same_signs else each(lambda x: flint.fmpq(int(x)), rng.choice((-1, 1), d))
        left, right = transform(q * signs), transform(k * others)
        equal = bool((left @ right.T == d * (q @ k.T)).all())
        orthogonal = bool((hadamard(d) @ hadamard(d).T == d * np.eye(d, dtype=int)).all())
        passes = bool((left == (q * signs) @ hadamard(d)).all())
        rows.append((d, equal, orthogonal, passes))
        if not (equal and orthogonal and passes):
            wrong.append(d)
    titles = ("d", "products equal", "HHᵀ = d·I", "fast transform = H")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"30 rational products a width, d = {list(orders)}, random signs: "
        + (f"differ at d = {wrong}" if wrong else "all equal after division by d"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=(
            "d = 2, q = k = (1, 0), signs (1, 1) for q and (−1, 1) for k: qDH = (1, 1), kDH = (−1, −1), "
            "product −2; 2·q·k = 2"
            if wrong
            else ""
        ),
        seed=31,
    )


def rotation_cost(orders: Sequence[int] = (2, 4, 8, 16, 64, 128), *, dense: bool = False) -> ClaimFinding:
    """Does rotating a row cost d·log₂d sums and d changes of sign? ``dense`` multiplies by the matrix
    instead.
    """
    rows = []
    for d in orders:
        tally = Tally()
        x = counted(tally, 1, d)
        _ = x @ np.array(hadamard(d)) if dense else transform(x)
        # A difference is counted as a product by −1 and a sum.
        rows.append((d, tally.sums, d * int(math.log2(d))))
    wrong = [row for row in rows if row[1] != row[2]]
    titles = ("d", "sums counted", "d·log₂d")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"sums and differences counted for d = {list(orders)}: {[row[1] for row in rows]}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="d = {}: {} sums, d·log₂d = {}".format(*wrong[0]) if wrong else "",
    )


def _peak_over_rms(x: Array) -> flint.fmpq:
    """The square of max|x|/rms(x) of a row: 1 … d, and the same for x and x/√d."""
    ratio: flint.fmpq = max(x * x) * len(x) / sum(x * x, flint.fmpq(0))
    return ratio


def spread_of_outliers(
    d: int = 64, *, aligned: bool = True, draws: int = 60, outliers: bool = True
) -> ClaimFinding:
    """Does the rotation bring down max|x|/rms of every row?

    Args:
        aligned: try also the row whose rotation is a single number.
        draws: random rows with one outlier of 10 to 40 standard deviations.
        outliers: False draws rows of ±1, which have none.
    """
    rng = np.random.default_rng(32)
    signs = each(lambda x: flint.fmpq(int(x)), rng.choice((-1, 1), d))
    kinds: list[tuple[str, Array]] = []
    for _ in range(draws):
        if outliers:
            x = rationals(rng, d, low=-24, high=24, denominator=10)
            x[int(rng.integers(d))] = flint.fmpq(int(rng.integers(10, 41)))
        else:
            x = each(lambda s: flint.fmpq(int(s)), rng.choice((-1, 1), d))
        kinds.append(("random", x))
    single = np.full(d, flint.fmpq(0), dtype=object)
    single[3 % d] = flint.fmpq(1)
    kinds += [("one number", single)] if outliers else []
    kinds += [("a row of H times the signs", hadamard(d)[5 % d] * signs)] if aligned else []
    rows = [
        (name, float(_peak_over_rms(x)), float(_peak_over_rms(transform(x * signs)))) for name, x in kinds
    ]
    risen, fallen = [row for row in rows if row[2] > row[1]], [row for row in rows if row[2] < row[1]]
    status = "HOLDS" if not risen else "CONDITIONAL" if fallen else "REFUTED"
    return ClaimFinding(
        status=status if status != "HOLDS" else "SUPPORTED",
        evidence=f"d = {d}, (max/rms)² before and after, exactly: falls in {len(fallen)} and rises in "
        f"{len(risen)} of {len(rows)} "
        "rows; " + "; ".join(f"{name}: {a:.3g} → {b:.3g}" for name, a, b in rows[-3:]),
        table={
            "row": [row[0] for row in rows],
            "before": [row[1] for row in rows],
            "after": [row[2] for row in rows],
        },
        counterexample=(
            "d = 2, signs (1, 1), x = (1, 1): xH/√2 = (√2, 0), so max/rms rises from 1 to √2; for every d "
            "the row of H times the signs becomes a single number √d. The condition is a row dominated by "
            "few numbers: (√d, 0, …) becomes ±1 everywhere"
            if risen
            else ""
        ),
        seed=32,
    )


def quantised(x: Array, form: Format = E4M3) -> tuple[flint.fmpq, Array]:
    """(scale, numbers of ``form``): max|x| goes to the format's largest."""
    peak: Any = max(abs(x).flat)
    scale = peak / form.largest
    scale = scale or flint.fmpq(1)
    return scale, each(form.nearest, x / scale)


def block_scales(*, own: bool = True, rows: int = 3, columns: int = 2) -> ClaimFinding:
    """Is a tile of S, formed from quantised blocks and rescaled, the product of the dequantised operands?

    Args:
        own: False rescales every tile by the scales of the first blocks.
    """
    rng = np.random.default_rng(33)
    q, k = rationals(rng, 3 * rows, 4), rationals(rng, 4 * columns, 4)
    q[0], k[-1] = 40 * q[0], 9 * k[-1]
    left = [quantised(q[i : i + rows]) for i in range(0, len(q), rows)]
    right = [quantised(k[j : j + columns]) for j in range(0, len(k), columns)]
    whole = np.concatenate([s * x for s, x in left]) @ np.concatenate([s * x for s, x in right]).T
    wrong = 0
    for i, (a, x) in enumerate(left):
        for j, (b, y) in enumerate(right):
            scale = a * b if own else left[0][0] * right[0][0]
            tile = scale * (x @ y.T)
            wrong += int((tile != whole[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]).sum())
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{whole.size} rational entries of S in {len(left) * len(right)} tiles, {len(left)} and "
        f"{len(right)} different scales: {wrong} differ from the product of the dequantised operands",
        counterexample=(
            "q = (448), (896) and k = (448), blocks of one row: scales 1, 2 and 1, numbers 448; the second "
            "tile is 448·448·2, with the first scale 448·448"
            if wrong
            else ""
        ),
        seed=33,
    )


def powers_of_two(
    form: Format = E4M3, shifts: Sequence[int] = range(-3, 4), *, uniform: bool = False
) -> ClaimFinding:
    """Does scaling by a power of two before rounding change nothing while the result is normal and finite?

    All midpoints and quarters between neighbours of the format, and the numbers themselves.

    Args:
        uniform: rounds to a fixed step, as an integer format does, where a scale matters.
    """
    numbers = [x for x in form.positives() if exponent(x) >= form.least]
    tried, wrong = 0, []
    step = flint.fmpq(2) ** form.least

    def rounded(x: flint.fmpq) -> flint.fmpq:
        return (x / step + flint.fmpq(1, 2)).floor() * step if uniform else form.nearest(x)

    for low, high in zip(numbers, numbers[1:], strict=False):
        for part in range(4):
            x = low + (high - low) * flint.fmpq(part, 4)
            for shift in shifts:
                factor = flint.fmpq(2) ** shift
                if exponent(x * factor) < form.least or x * factor * 2 > form.largest:
                    continue
                tried += 1
                if rounded(x * factor) / factor != rounded(x):
                    wrong.append((x, shift))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{tried} numbers and scales 2^{min(shifts)} … 2^{max(shifts)} of {form.name}, in its "
        f"normal range: {len(wrong)} round otherwise. A block's scale matters for what would be subnormal or "
        f"beyond {form.largest}, and by scales that are no powers of two",
        counterexample=f"x = {wrong[0][0]}, scale 2^{wrong[0][1]}, rounded to multiples of {step}"
        if wrong
        else "",
    )


def _exp2(x: flint.fmpq) -> flint.fmpq:
    """2^x correctly rounded to float32, from a ball of 200 bits; both ends round alike or it raises."""
    before = flint.ctx.prec
    flint.ctx.prec = 200
    try:
        ball = flint.arb(2) ** flint.arb(x)
        ends = {FLOAT32.nearest(_rational(end)) for end in (ball.lower(), ball.upper())}
    finally:
        flint.ctx.prec = before
    (value,) = ends
    return value


def _rational(x: Any) -> flint.fmpq:
    mantissa, power = x.man_exp()
    return flint.fmpq(mantissa) * flint.fmpq(2) ** int(power)


def peak_of_p(*, fused: bool = True, d: int = 64, largest: int = 400) -> ClaimFinding:
    """Is P at the row's maximum exactly 1, with exp2 of one fused m·s − fl(m·s)? For integer maxima m.

    Args:
        fused: False rounds m·s on both sides, as a separate multiplication does.
    """
    scale = FLOAT32.nearest(flint.fmpq(*math.log2(math.e).as_integer_ratio()) / flint.fmpq(math.isqrt(d)))
    found = []
    for m in range(1, largest + 1):
        product = m * scale
        held = FLOAT32.nearest(product)
        delta = (product if fused else held) - held
        # |δ| < 2⁻²⁵ cannot move 2^δ from 1.
        p = _exp2(delta) if abs(delta) > flint.fmpq(2) ** -26 else flint.fmpq(1)
        if p != 1:
            found.append((m, delta, p))
    worst = max(found, key=lambda x: abs(x[2] - 1), default=None)
    return ClaimFinding(
        status="REFUTED" if found else "HOLDS",
        evidence=f"d = {d}, s = fl(log₂e/{math.isqrt(d)}), m = 1 … {largest}, exponentials correctly "
        f"rounded: P ≠ 1 for {len(found)}"
        + (f", furthest at m = {worst[0]}: P − 1 = {float(worst[2] - 1):.3g}" if worst else ""),
        counterexample=(
            f"s = {scale.p}/{scale.q}, m = {found[0][0]}: m·s − fl(m·s) = {found[0][1]}, of which 2^ rounds "
            f"to 1 {'+' if found[0][2] > 1 else '−'} {abs(found[0][2] - 1)} in float32"
            if found
            else ""
        ),
    )


def cancelling_factor(*, common: bool = True) -> ClaimFinding:
    """Does a factor that all of a row's P and ℓ share (2^δ, or FP8's 2⁸) cancel in O and leave ℓ·2⁻⁸ as it
    was?

    Args:
        common: False leaves the factor out of ℓ.
    """
    rng = np.random.default_rng(34)
    rows, wrong = 0, 0
    for factor in (flint.fmpq(256), flint.fmpq(16777215, 16777216), flint.fmpq(3, 7)):
        for _ in range(20):
            p, v = rationals(rng, 6, low=1), rationals(rng, 6)
            mass = p.sum() * (factor if common else 1)
            wrong += int((factor * p) @ v / mass != p @ v / p.sum())
            rows += 1
    fitting = [k for k in range(12) if E4M3.nearest(flint.fmpq(2) ** k) == flint.fmpq(2) ** k]
    good = not wrong and max(fitting) == 8
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{rows} rational rows, factors 256, 1 − 2⁻²⁴, 3/7: {wrong} outputs differ; the largest "
        f"power of two that e4m3 holds is 2^{max(fitting)}, so P·2⁸ ≤ 256 ≤ {E4M3.largest} and the largest "
        "offset without saturation is 8",
        counterexample="P = (1), V = (1), factor 256: O = 256 in place of 1" if wrong else "",
        seed=34,
    )


def speeds() -> ClaimFinding:
    """Measured speeds: what they would take."""
    return ClaimFinding(
        status="OPEN",
        evidence="speeds of the authors' CUDA kernels on an H100 SXM; needed: that GPU and their build. "
        f"Nothing of it follows from counting: {740 / 989:.0%} of a peak of 989 TFLOP/s is the printed 75 %",
    )


def _claim(
    number: str, title: str, statement: str, source: str, checks: Sequence[Any], kind: str = "exact"
) -> Claim:
    return Claim(
        id=f"FA3-{number}",
        subject="FlashAttention",
        title=title,
        statement=statement,
        source=source,
        kind=kind,
        check=lambda _: checks[0](),
        control=(lambda _: checks[1]()) if len(checks) > 1 else None,
        covers=(f"FA3-{number[:-1]}",) if number.endswith("a") else (),
    )


CLAIMS: Final = (
    _claim(
        "2a",
        "rotation leaves QKᵀ",
        "For M = diag(random signs)·H/√d with Sylvester's Hadamard matrix H, (QM)(KM)ᵀ = QKᵀ exactly, if "
        "both have the same signs.",
        f"{_PAPER}, Section 3.3, incoherent processing",
        (rotated_products, lambda: rotated_products(same_signs=False)),
    ),
    _claim(
        "2b",
        "cost of the rotation",
        "Rotating a row of d numbers takes d·log₂d sums.",
        f"{_PAPER}, Section 3.3",
        (rotation_cost, lambda: rotation_cost((4, 8), dense=True)),
        "count",
    ),
    _claim(
        "2c",
        "rotation spreads outliers",
        "The rotation brings the largest entry of a row nearer to its root mean square.",
        f"{_PAPER}, Section 3.3; QuIP",
        (spread_of_outliers, lambda: spread_of_outliers(aligned=False)),
        "search",
    ),
    _claim(
        "3a",
        "a scale a block",
        "With one scale a block of Q and of K, each tile of S rescaled by the two scales is the product of "
        "the dequantised operands.",
        f"{_PAPER}, Section 3.3, block quantisation",
        (block_scales, lambda: block_scales(own=False)),
    ),
    _claim(
        "3b",
        "powers of two change no normal float8",
        "Scaling by a power of two before rounding to e4m3 leaves the relative error of every normal number "
        "as it is.",
        f"derived; it explains the small gain of block quantisation in {_PAPER}, Table 3",
        (powers_of_two, lambda: powers_of_two(uniform=True)),
    ),
    _claim(
        "4a",
        "P is 1 at the maximum",
        "With P = exp2(x·s − fl(m·s)) in one fused operation the largest P of a row is exactly 1.",
        "an expectation about Dao-AILab/flash-attention, hopper/softmax.h, scale_apply_exp2",
        (peak_of_p, lambda: peak_of_p(fused=False)),
    ),
    _claim(
        "4b",
        "an offset of 8 cancels",
        "A factor shared by P and ℓ, such as FP8's 2⁸ that brings P to [0, 256], cancels in O; 2⁸ is the "
        "largest power of two that e4m3 holds.",
        "Dao-AILab/flash-attention, hopper/softmax.h, Max_offset",
        (cancelling_factor, lambda: cancelling_factor(common=False)),
    ),
    _claim(
        "5",
        "measured speeds",
        "Up to 740 TFLOP/s in FP16 on an H100 (75 % of its peak), close to 1.2 PFLOP/s in FP8.",
        f"{_PAPER}, Section 4.1",
        (speeds,),
        "none",
    ),
)
