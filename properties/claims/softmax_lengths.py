"""Claims about the error of softmax against the length of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.correct_rounding import BF16, FORMATS, Floats, Format, Rounded
from attnproof.properties.claims.log_sum_exp_algorithms import exact, run

__all__ = ["CLAIMS", "least_stagnating", "square_root_growth", "worst_error"]

_SEED = 30
_STAGNATING: Final = 0.5
"""n·u from which sums of like terms come near 1/u, where adding another one rounds to nothing."""


def worst_error(form: Format, n: int, rows: int) -> float:
    """The largest error of softmax by division over normal rows, in u, relative to the largest weight."""
    x = form.rounded(np.random.default_rng((_SEED, n)).standard_normal((rows, n)))
    results: list[Floats] = run("division", [x[:, i] for i in range(n)], np.ones(rows), Rounded(form))
    due = exact("division", x)
    return float((np.abs(np.stack(results, axis=1) - due).max(axis=1) / due.max(axis=1)).max() / form.u)


def least_stagnating(form: Format) -> tuple[int, float]:
    """The least number n of equal logits 0 whose softmax is off by more than (√n + 3)·u, and its sum."""
    r, total, n, one = Rounded(form), np.ones(1), 1, np.ones(1)
    while True:
        total, n = r.add(total, one), n + 1
        weight = float(r.div(one, total)[0])
        if abs(weight * n - 1.0) > (n**0.5 + 3.0) * form.u:
            return n, float(total[0])


def square_root_growth(formats: Sequence[Format], lengths: Sequence[int], rows: int) -> ClaimFinding:
    """Is the error of random rows of n logits at most (√n + 3)·u?"""
    table: dict[str, list[Any]] = {"format": [], "n": [], "largest error / u": [], "√n + 3": []}
    over = []
    for form in formats:
        for n in lengths:
            error, limit = worst_error(form, n, rows), n**0.5 + 3.0
            if error > limit:
                over.append((form, n))
            for column, entry in zip(table, (form.name, n, error, limit), strict=True):
                table[column].append(entry)
    early = [(form.name, n) for form, n in over if n * form.u < _STAGNATING]
    example = ""
    if over:
        form = over[0][0]
        n, total = least_stagnating(form)
        r = Rounded(form)
        weight = float(r.div(np.ones(1), np.array([total]))[0])
        example = (
            f"{form.name} (u = 2^-{form.precision}), n = {n} logits 0: every e^0 = 1, and the sum of ones "
            "stops at "
            f"{total:g} (adding 1 is half a unit, a tie to even).\n"
            f"Weights are computed as {weight!r}, not 1/{n} = {1 / n:.6g}: error "
            f"{abs(weight * n - 1) / form.u:.4g} u, more than "
            f"√n + 3 = {n**0.5 + 3:.4g} u."
        )
    told = ", ".join(f"{form.name} at n = {n}" for form, n in over)
    return ClaimFinding(
        status="REFUTED" if early else "CONDITIONAL" if over else "SUPPORTED",
        evidence=f"largest error over {rows} normal rows (seed {_SEED}), every operation rounded, n in "
        f"{list(lengths)}, "
        f"{', '.join(form.name for form in formats)}: "
        + (
            f"above (√n + 3)·u for {told}, below it where n·u < {_STAGNATING:g}: beyond, sums stop growing "
            "and the error is biased"
            if over
            else "at most (√n + 3)·u"
        ),
        table=table,
        plots=(
            Plot(
                "Error of softmax by length",
                "line",
                table,
                "n",
                "largest error / u",
                "format",
                ("n", "largest error / u"),
            ),
        ),
        counterexample=example,
        seed=_SEED,
    )


CLAIMS: Final = (
    Claim(
        id="LSE-4c",
        subject="log-sum-exp",
        title="errors grow like √n",
        statement="With rounding errors like independent random ones of mean 0, the n in softmax's bound (n "
        "+ 3)·u becomes a √n.",
        source="Blanchard, Higham & Higham 2021, arXiv 1909.03469, section 3, after Higham & Mary 2019",
        kind="measurement",
        check=lambda lab: square_root_growth(
            FORMATS,
            lab.choose((16, 64, 512), (16, 64, 512, 1024), (16, 64, 512, 1024, 4096)),
            lab.choose(48, 128),
        ),
        control=lambda lab: square_root_growth((BF16,), (16, 64), 48),
    ),
)
