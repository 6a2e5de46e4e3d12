"""Acceptance rules in use, as their projects' code states them: wrong kernels that they accept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

import torch

from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = [
    "CLAIMS",
    "allclose",
    "constant_within",
    "flash_limit",
    "hidden_rows",
    "mean_of_values",
    "own_key_missing",
    "probe",
    "relative_rms",
    "warns_only",
    "zeros_accepted",
]

SUBJECT: Final = "exact oracles"
_SEED: Final = 11
Rule = Callable[[torch.Tensor, torch.Tensor], bool]


def allclose(tolerance: float) -> Rule:
    """|out − expected| ≤ tolerance + tolerance·|expected| for every element: KernelBench's rule."""

    def accepts(out: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool(((out - expected).abs() <= tolerance + tolerance * expected.abs()).all())

    return accepts


def relative_rms(limit: float) -> Rule:
    """rms(out − expected) < limit·rms(expected), or no element off by more than 10⁻⁶: fla's rule."""

    def accepts(out: torch.Tensor, expected: torch.Tensor) -> bool:
        error = out - expected
        ratio = error.square().mean().sqrt() / (expected.square().mean().sqrt() + 1e-8)
        return bool(ratio < limit) or bool(error.abs().max() <= 1e-6)

    return accepts


def warns_only(largest: Fraction, ratio: Fraction) -> bool:
    """fla's rule with its CI flag: a warning, and no failure, below 1 % or where no element is off by 0.3."""
    return ratio < Fraction(1, 100) or largest <= Fraction(3, 10)


def mean_of_values(lengths: Sequence[int], rule: Rule, *, spread: float = 1.0) -> ClaimFinding:
    """Does the rule accept the mean of V in place of softmax attention, for uniform [0, 1) inputs?

    Args:
        lengths: N; four heads of D = 64 with the scale 1/8, float64.
        rule: of acceptance.
        spread: factor of q, which makes the weights differ.
    """
    rows = []
    for n in lengths:
        draw = torch.Generator().manual_seed(_SEED)
        q, k, v = (torch.rand(4, n, 64, generator=draw, dtype=torch.float64) for _ in range(3))
        expected = torch.softmax(spread * q @ k.mT / 8.0, -1) @ v
        mean = v.mean(1, keepdim=True).expand_as(expected)
        rows.append((n, float((mean - expected).abs().max()), rule(mean, expected)))
    accepted = [n for n, _, passes in rows if passes]
    first = min(accepted, default=0)
    status = "REFUTED" if not accepted else "SUPPORTED" if len(accepted) == len(rows) else "CONDITIONAL"
    titles = ("N", "largest error of the mean of V", "accepted")
    return ClaimFinding(
        status=status,
        evidence=f"accepted at N = {accepted or 'none'} of {list(lengths)}, largest error "
        + ", ".join(f"{error:.3g} (N = {n})" for n, error, _ in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=""
        if status == "SUPPORTED"
        else f"q, k, v uniform in [0, 1), torch seed {_SEED}, four heads, D = 64, scale 1/8:\n"
        + "\n".join(
            f"N = {n}: the mean of V is off by {error:.4f}" for n, error, passes in rows if not passes
        )
        + (f"\naccepted from N = {first} on" if first else ""),
        seed=_SEED,
    )


def constant_within(size: Fraction, *, answer: Fraction = Fraction(0)) -> ClaimFinding:
    """Does the rule with the CI flag accept a constant answer for every output of at most this size?"""
    # The farthest output decides; at it the ratio is 1 or more, so that only the absolute rule can accept.
    farthest = -size if answer >= 0 else size
    largest = abs(answer - farthest)
    accepted = warns_only(largest, largest / abs(farthest))
    return ClaimFinding(
        status="HOLDS" if accepted else "REFUTED",
        evidence=f"outputs in [−{size}, {size}], all answered by {answer}: the largest error is {largest}, "
        f"the rule accepts up to 3/10; the relative error of {float(largest / size):.0%} does not matter",
        table={"largest output": [float(size)], "largest error": [float(largest)], "accepted": [accepted]},
        counterexample=""
        if accepted
        else f"every output {farthest}, answered by {answer}: off by {largest} > 3/10, relative error "
        f"{largest / abs(farthest)}",
    )


def hidden_rows(limits: Sequence[Fraction], rows: int, *, elementwise: bool = False) -> ClaimFinding:
    """Is one row that is wrong by 100 % among ``rows`` of equal norm accepted by a relative rms?

    Args:
        limits: of the relative rms.
        rows: their number.
        elementwise: judge every row by itself instead.
    """
    # Rows of norm 1, one answered by 0: the error's square is 1, that of the expected output their number.
    square = Fraction(1, 1 if elementwise else rows)
    found = [
        (float(limit), math.sqrt(square), square < limit * limit, math.isqrt(int(1 / limit**2)) ** 2)
        for limit in limits
    ]
    hidden = [limit for limit, _, passes, _ in found if passes]
    status = "HOLDS" if len(hidden) == len(found) else "CONDITIONAL" if hidden else "REFUTED"
    told = ", ".join(
        f"{limit:g} from {int(1 / Fraction(limit).limit_denominator(10**6) ** 2) + 1} rows on"
        for limit in map(float, limits)
    )
    return ClaimFinding(
        status=status,
        evidence=f"one row of {rows} answered by 0: relative rms {math.sqrt(square):.4g}; "
        f"a limit hides it: {told}",
        table={
            "limit": [row[0] for row in found],
            "relative rms": [row[1] for row in found],
            "accepted": [row[2] for row in found],
        },
        counterexample=""
        if status == "HOLDS"
        else f"{rows} rows of norm 1, one answered by 0: relative rms √(1/{int(1 / square)}) = "
        f"{math.sqrt(square):.4g}, above {min(map(float, limits)):g}",
    )


def probe(outputs: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """|(x + shift) − shift − x| of every output x, each step rounded to the outputs' format.

    Args:
        outputs: of any format.
        shift: 0.3 as a float32 number, or as one of the outputs' format.
    """
    moved = (outputs.float() + shift.float()).to(outputs.dtype)
    back = (moved.float() - shift.float()).to(outputs.dtype)
    return (back.float() - outputs.float()).to(outputs.dtype).abs()


def flash_limit(same: torch.Tensor, expected: torch.Tensor, *, factor: float = 2.0) -> float:
    """factor·max|same − expected| + 2·max|(expected + 0.3) − 0.3 − expected|: FlashAttention's rule.

    Args:
        same: plain attention in the kernel's own format.
        expected: attention in float32, rounded to that format.
        factor: 2; 3 where the logits have a softcap.
    """
    apart = float((same.float() - expected.float()).abs().max())
    return factor * apart + 2.0 * float(probe(expected, torch.tensor(0.3)).max())


def own_key_missing(firsts: Sequence[int], *, by_row: bool = False, count: int = 256) -> ClaimFinding:
    """Does FlashAttention's rule accept a causal kernel that leaves key i out of row i from a row on?

    bfloat16, N(0, 1), D = 64. Of all rows the first ``count`` and the ``count`` from the first wrong row on
    are computed: further ones can only raise the limit or lower the error, but for their spread.

    Args:
        firsts: the first wrong row, each a kernel of its own.
        by_row: hold every row against its own limit in place of the largest of all rows.
        count: rows computed on either side.
    """
    rows = []
    for first in firsts:
        draw = torch.Generator().manual_seed(_SEED)
        n = first + count
        q = torch.randn(2 * count, 64, generator=draw).bfloat16()
        k, v = torch.randn(2, n, 64, generator=draw).bfloat16()
        at = torch.cat([torch.arange(count), torch.arange(first, n)])
        seen = torch.arange(n) <= at[:, None]
        strict = seen & ((torch.arange(n) != at[:, None]) | (at[:, None] < first))
        expected, found = (_attention(q.float(), k.float(), v.float(), mask) for mask in (seen, strict))
        expected, found = expected.bfloat16(), found.bfloat16()
        same = _attention(q, k, v, seen)
        error = (found.float() - expected.float()).abs().amax(dim=1)
        limits = (
            [flash_limit(a, b) for a, b in zip(same, expected, strict=True)]
            if by_row
            else [flash_limit(same, expected)] * len(at)
        )
        accepted = all(float(e) <= limit for e, limit in zip(error, limits, strict=True))
        rows.append((first, float(error.max()), limits[int(error.argmax())], accepted))
    kept = [row for row in rows if row[3]]
    status = "REFUTED" if not kept else "SUPPORTED" if len(kept) == len(rows) else "CONDITIONAL"
    titles = ("wrong from row", "largest error", "limit at it", "accepted")
    told = "; ".join(f"from row {a} on: error {b:.3g}, limit {c:.3g}" for a, b, c, _ in rows)
    return ClaimFinding(
        status=status,
        evidence=f"bfloat16, N(0, 1), D = 64, row i without its key i, limits "
        f"{'of each row' if by_row else 'of the whole output'}: {told}. The limit comes from the first rows, "
        "whose outputs are of the size of V, while a late row averages many values and a key weighs little "
        "in it",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="" if status == "SUPPORTED" else f"torch seed {_SEED}: {told}",
        seed=_SEED,
    )


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Causal rows of attention, every step in the format of q."""
    logits = (q @ (k / 8.0).mT).masked_fill(~mask, -math.inf)
    return torch.softmax(logits, -1) @ v


def zeros_accepted(largest: float) -> ClaimFinding:
    """Does the probe alone let zeros pass for bfloat16 outputs ±t, for every t ≤ ``largest``?

    All t are tried, with 0.3 as a bfloat16 and as a float32 number: kernels of PyTorch differ in which they
    take.
    """
    t = torch.arange(1, 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    t = t[t.float() <= largest]
    both, rows = torch.stack([t, -t]), []
    for name, shift in (("bfloat16", torch.tensor(0.3).bfloat16()), ("float32", torch.tensor(0.3))):
        limit = 2.0 * probe(both, shift).amax(dim=0).float()
        rejected = t[t.float() > limit]
        rows.append((name, len(t), len(rejected), float(rejected[0]) if len(rejected) else 0.0))
    wrong = [row for row in rows if row[2]]
    titles = ("0.3 as", "sizes t", "rejected", "smallest rejected")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"all {len(t)} positive bfloat16 t ≤ {largest:g}, outputs ±t, answered by zeros; rejected: "
        + ", ".join(f"{row[2]} with 0.3 as {row[0]}" for row in rows)
        + ". Around 0.3 bfloat16 numbers are 2⁻⁹ apart: t is lost in the sum, and what is lost is doubled. "
        "Further outputs, and the error of the same precision, only raise the limit",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"outputs ±{wrong[0][3]!r}, 0.3 as {wrong[0][0]}: the limit is below their size"
        if wrong
        else "",
    )


_FLASH: Final = "Dao-AILab/flash-attention, tests/test_flash_attn.py and hopper/test_flash_attn.py"
_FLA: Final = "fla/utils/_testing.py, assert_close"
CLAIMS: Final = (
    Claim(
        id="EXA-6a",
        subject=SUBJECT,
        title="the mean of V within 1e-2",
        statement="With inputs uniform in [0, 1) and a tolerance of 10⁻² + 10⁻²·|expected|, the mean of V is "
        "accepted as softmax attention.",
        source="KernelBench, its task of scaled dot-product attention and tolerance of half precision",
        kind="measurement",
        check=lambda lab: mean_of_values(lab.choose((512, 1024), (512, 1024, 2048)), allclose(1e-2)),
        control=lambda lab: mean_of_values((512,), allclose(1e-2), spread=32.0),
    ),
    Claim(
        id="EXA-6b",
        subject=SUBJECT,
        title="a warning in place of a failure",
        statement="With the CI flag set, fla's comparison only warns where no element is off by more than "
        "0.3, so that zeros are accepted for any outputs of at most 0.3.",
        source=_FLA,
        kind="exact",
        check=lambda lab: constant_within(Fraction(3, 10)),
        control=lambda lab: constant_within(Fraction(2, 5)),
    ),
    Claim(
        id="EXA-6c",
        subject=SUBJECT,
        title="one wrong row in a relative rms",
        statement="A relative rms over all elements with a limit of 0.002 to 0.02 accepts one row in 10⁴ "
        "that is wrong by 100 %.",
        source=_FLA + ", limits of o and of gradients",
        kind="exact",
        check=lambda lab: hidden_rows((Fraction(1, 500), Fraction(1, 200), Fraction(1, 50)), 10**4),
        control=lambda lab: hidden_rows(
            (Fraction(1, 500), Fraction(1, 200), Fraction(1, 50)), 10**4, elementwise=True
        ),
    ),
    Claim(
        id="EXA-6d",
        subject=SUBJECT,
        title="twice the error of the same precision",
        statement="FlashAttention's rule, max|out − ref32| ≤ 2·max|out_same − ref32| (3 times with a "
        "softcap) + 2·max|(ref + 0.3) − 0.3 − ref|, accepts a causal bfloat16 kernel that leaves out every "
        "row's own key from row 4096 on.",
        source=_FLASH,
        kind="measurement",
        check=lambda lab: own_key_missing(lab.choose((4096,), (4096, 8192, 16384))),
        control=lambda lab: own_key_missing((4096,), by_row=True),
        covers=("EXA-6",),
    ),
    Claim(
        id="EXA-6e",
        subject=SUBJECT,
        title="a rounding probe as a tolerance",
        statement="By the absolute term of that rule alone, 2·max|(ref + 0.3) − 0.3 − ref|, zeros are "
        "accepted for bfloat16 outputs ±t of any size t ≤ 2⁻¹¹.",
        source=_FLASH,
        kind="exact",
        check=lambda lab: zeros_accepted(2.0**-11),
        control=lambda lab: zeros_accepted(2.0**-8),
    ),
)
