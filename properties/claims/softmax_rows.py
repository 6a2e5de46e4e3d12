"""Claims about softmax rows in small formats: overflow, underflow, what a shift does, stored logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.correct_rounding import BF16, FORMATS, FP16, Floats, Format, Rounded
from attnproof.properties.claims.log_sum_exp_algorithms import exact, run

__all__ = [
    "CLAIMS",
    "accuracy_of_shifting",
    "distances",
    "flushed",
    "harmless",
    "log_probabilities",
    "overflow_threshold",
    "recomputed",
    "shifted_sum",
]

_SEED = 22
_BITS = 256


def distances(form: Format, depth: float) -> Floats:
    """Every number d = x_i − x_max of a format in [−depth, 0] with |d| normal, and 0, descending."""
    return np.concatenate([[0.0], -form.between(2.0**form.lowest, depth)])


def overflow_threshold(margin: float = 0.0) -> ClaimFinding:
    """Is the first number whose exponential overflows the first above log(largest number) + ``margin``?"""
    table: dict[str, list[Any]] = {
        "format": [],
        "log of the largest": [],
        "last finite": [],
        "first infinite": [],
    }
    wrong = []
    for form in FORMATS:
        edge = float(np.log(form.largest))
        # Exponential and rounding are monotone: the numbers next to the edge settle all others.
        near = np.unique(form.rounded(edge * (1.0 + form.u * np.arange(-6.0, 7.0) / 2)))
        infinite = np.isinf(Rounded(form).exp(near))
        last, first = float(near[~infinite].max()), float(near[infinite].min())
        for column, entry in zip(table, (form.name, edge, last, first), strict=True):
            table[column].append(entry)
        if not last <= edge + margin < first:
            wrong.append(
                f"{form.name}: e^{first!r} overflows, e^{last!r} does not; claimed above {edge + margin:.6g}"
            )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="; ".join(
            f"{name}: {last!r} is the last logit with a finite exponential, log(largest) = {edge:.6g}"
            for name, edge, last in zip(
                *(table[c] for c in ("format", "log of the largest", "last finite")), strict=True
            )
        ),
        table=table,
        counterexample="\n".join(wrong),
    )


def shifted_sum(*, by_largest: bool = True) -> ClaimFinding:
    """Terms and sums after a shift by the largest logit (or, for the control, by the smallest)."""
    wrong, told = "", []
    for form in (FP16, BF16):
        r = Rounded(form)
        d = distances(form, form.largest)
        terms = r.exp(d if by_largest else -d)
        outside = np.flatnonzero(~((terms >= 0) & (terms <= 1)))
        if outside.size and not wrong:
            far = float(abs(d[outside[0]]))
            wrong = f"{form.name}: x_i − shift = {far!r}, its exponential {float(terms[outside[0]])!r}"
        # Sums of terms in [0, 1] are at most those of ones, by monotone rounding; they start at exactly 1.
        total, n = np.ones(1), 1
        while n < 2 * 2**form.precision:
            total, n = r.add(total, np.ones(1)), n + 1
            if not 1 <= total[0] <= n and not wrong:
                wrong = f"{form.name}: {n} ones sum to {total[0]}"
        told.append(f"{form.name}: {len(d)} distances, and {n} ones sum to {total[0]:g}")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="every number d ≤ 0 of the format with |d| normal has fl(e^d) in [0, 1], the largest "
        "logit's is 1, "
        "so sums stay in [1, n] and the logarithm's argument is at least 1 (a difference that overflows to "
        "−∞ "
        f"gives 0): {'; '.join(told)} (they stop growing at 2/u)"
        + ("" if not wrong else f"; not so: {wrong}"),
        counterexample=wrong,
    )


def flushed(depth: float = 128.0) -> ClaimFinding:
    """Does no e^(x_i − x_max) underflow, for x_max − x_i up to ``depth``? In order of x = (0, d)."""
    table: dict[str, list[Any]] = {
        "format": [],
        "log(smallest number)": [],
        "first d with a subnormal e^d": [],
        "first d with e^d rounded to 0": [],
    }
    example = ""
    for form in FORMATS:
        # fp32 has too many numbers: eighths, which are all numbers of it.
        d = distances(form, depth) if form.precision <= 11 else -np.arange(0.0, depth + 0.125, 0.125)
        w = Rounded(form).exp(d)
        subnormal, zero = d[w < 2.0**form.lowest], d[w == 0]
        entries = (
            form.name,
            float(np.log(form.smallest)),
            *(float(x[0]) if x.size else 0.0 for x in (subnormal, zero)),
        )
        for column, entry in zip(table, entries, strict=True):
            table[column].append(entry)
        if zero.size and not example:
            with _precision(_BITS):
                value, half = float(flint.arb(float(zero[0])).exp().mid()), form.smallest / 2
            example = (
                f"{form.name}, x = (0, {float(zero[0])!r}): x_max = 0, e^{float(zero[0])!r} = {value:.6g} "
                "lies below "
                f"half the smallest number, {half:.6g}, and rounds to 0.\n"
                f"softmax's second weight is computed as 0, not {value / (1 + value):.6g}, and its "
                "logarithm as −∞."
            )
    zeros = table["first d with e^d rounded to 0"]
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"x = (0, d), −{depth:g} ≤ d ≤ 0, every number of fp16 and bf16, eighths in fp32: "
        + "; ".join(
            f"{name}: rounds to 0 from d = {zero!r} on, subnormal from {low!r} on"
            if zero
            else f"{name}: none rounds to 0"
            for name, low, zero in zip(
                table["format"], table["first d with a subnormal e^d"], zeros, strict=True
            )
        )
        + ". Rounding to nearest flushes below log(smallest) − log 2, not already below log(smallest)",
        table=table,
        counterexample=example,
    )


def harmless(share: float = 0.5) -> ClaimFinding:
    """Is each term that rounds to 0 at most ``share`` of the smallest number, of a sum that is at least 1?"""
    worst, wrong, terms = {}, "", 0
    for form in (FP16, BF16):
        d = distances(form, 256.0)
        lost = d[Rounded(form).exp(d) == 0]
        with _precision(_BITS):
            # e^d decreases: the first one lost is the largest.
            value = flint.arb(float(lost[0])).exp()
            fine = value <= share * form.smallest
        worst[form.name] = float((value / form.smallest).mid())
        terms += len(lost)
        if not fine and not wrong:
            wrong = (
                f"{form.name}: e^{float(lost[0])!r} = {worst[form.name]:.6g} of the smallest number is lost"
            )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{terms} distances of fp16 and bf16 round to 0; the largest term lost is, of the smallest "
        "number, "
        + ", ".join(f"{value:.4f} in {name}" for name, value in worst.items())
        + "; n − 1 of them of a sum ≥ 1 are a relative error below (n − 1)/2 times the smallest number",
        counterexample=wrong,
    )


def log_probabilities(*, of_weights: bool = False, depth: float = 64.0) -> ClaimFinding:
    """log softmax of x = (0, d) as x_i − y, against 3u·(1 + |x_i − y|); of weights: as log(g_i)."""
    rows, worst, example = 0, {}, ""
    for form in (FP16, BF16):
        d, r = distances(form, depth), Rounded(form)
        x = np.stack([np.zeros_like(d), d], axis=1)
        columns = [x[:, 0], x[:, 1]]
        due = d - exact("shifted log", x)[:, 0]
        if of_weights:
            computed = r.log(run("shifted", columns, np.ones(len(d)), r)[1])
        else:
            computed = r.sub(d, run("shifted log", columns, np.ones(len(d)), r)[0])
        ratios = np.abs(computed - due) / (3.0 * form.u * (1.0 + np.abs(due)))
        rows, worst[form.name] = rows + len(d), float(ratios.max())
        over = np.flatnonzero(ratios > 1.0)
        if over.size and not example:
            place = over[0]
            example = (
                f"{form.name}, x = (0, {float(d[place])!r}): computed {float(computed[place])!r}, exact "
                f"{due[place]:.8g}, error {abs(computed[place] - due[place]) / form.u:.4g} u"
            )
    way = "log(g_i)" if of_weights else "x_i − y"
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"x = (0, d), every number of fp16 and bf16 in [−{depth:g}, 0] ({rows} rows), {way} of the "
        "shifted "
        "algorithm, every operation rounded: largest error by 3u(1 + |x_i − y|): "
        + ", ".join(f"{value:.3g} in {name}" for name, value in worst.items()),
        counterexample=example,
    )


def recomputed(*, stored: bool = True) -> ClaimFinding:
    """Relative error of e^(s − L) from a stored L, at L half way between two numbers above a power of two."""
    table: dict[str, list[Any]] = {"format": [], "L": [], "relative error of P": [], "u·|L|": []}
    wrong = ""
    with _precision(_BITS):
        for form in FORMATS:
            for k in range(10):
                size = 2.0**k * (1.0 + form.u)
                kept = float(form.rounded(size)) if stored else size
                error = (flint.arb(size) - flint.arb(kept)).exp() - 1
                floor = flint.arb(form.u) * flint.arb(size)
                if not (error <= floor.exp() - 1 and error >= floor * (1 - 2 * form.u)) and not wrong:
                    told = f"relative error {float(error.mid()):.6g}"
                    wrong = f"{form.name}: L = {size!r} stored as {kept!r}, {told}"
                entries = (form.name, size, float(error.mid()), float(floor.mid()))
                for column, entry in zip(table, entries, strict=True):
                    table[column].append(entry)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="|fl(L) − L| ≤ u|L|, so the error is at most e^{u|L|} − 1; enclosed at ties above 1, 2, …, "
        "512 it "
        f"is at least (1 − 2u)·u|L| in {', '.join(form.name for form in FORMATS)}; at |L| ≈ 512: "
        + ", ".join(
            f"{table['relative error of P'][10 * i + 9]:.3g} in {form.name}" for i, form in enumerate(FORMATS)
        ),
        table=table,
        counterexample=wrong,
    )


def _mean(errors: Floats) -> tuple[float, float]:
    return float(errors.mean()), float(errors.std() / np.sqrt(len(errors)))


def accuracy_of_shifting(rows: int, offset: float = 0.0, spread: float = 5.5) -> ClaimFinding:
    """Errors of log-sum-exp and softmax with a shift and without, in fp16, over random rows of length 10.

    Args:
        rows: drawn from a normal distribution.
        offset: added to the logits, in fp16, before the shifted algorithms: a shift that rounds.
        spread: standard deviation of the logits; 5.5 makes a fifth of the rows overflow without a shift.
    """
    rng, r = np.random.default_rng(_SEED), Rounded(FP16)
    x = FP16.rounded(rng.normal(0.0, spread, (rows, 10)))
    x = np.take_along_axis(x, np.argsort(-x, axis=1), axis=1)
    errors, overflows = {}, {}
    for name in ("log", "shifted log", "division", "shifted", "shifted, division-free"):
        moved = offset if "shifted" in name else 0.0
        given = r.add(x, np.full_like(x, moved))
        results: list[Floats] = run(name, [given[:, i] for i in range(10)], np.ones(rows), r)
        due = exact(name, x)
        computed = np.stack(results, axis=1) - (moved if "log" in name and "free" not in name else 0.0)
        overflows[name] = ~np.isfinite(computed).all(axis=1)
        errors[name] = np.abs(computed - due).max(axis=1) / np.abs(due).max(axis=1) / FP16.u
    finite = ~overflows["log"]
    kept = {name: error[finite] for name, error in errors.items()}
    plain, shifted = kept["log"], kept["shifted log"]
    ratios = shifted[plain > 0] / plain[plain > 0]
    logs, weights, free = (
        _mean(kept[a] - kept[b])
        for a, b in (("shifted log", "log"), ("shifted", "division"), ("shifted, division-free", "shifted"))
    )
    dearer = [0.05 * float(kept[name].mean()) for name in ("log", "division")]
    fine = logs[0] - 3 * logs[1] <= dearer[0] and weights[0] - 3 * weights[1] <= dearer[1]
    lost = int(overflows["shifted log"].sum())
    status = "SUPPORTED" if fine and not lost and free[0] > 3 * free[1] else "REFUTED"
    told = ", ".join(f"{name} {float(error.mean()):.3f} u" for name, error in kept.items())
    return ClaimFinding(
        status=status,
        evidence=f"{rows} normal rows of length 10, deviation {spread}, seed {_SEED}: without a shift "
        f"{int((~finite).sum())} overflow, with it {lost}. Over the other {int(finite.sum())} the mean "
        "errors are "
        f"{told}. The logarithm is equal in {float((plain == shifted).mean()):.0%}, the ratio of its errors "
        f"{ratios.min():.2g} to {ratios.max():.3g}, mean {ratios.mean():.3f}; shifting adds {logs[0]:.3f} ± "
        f"{logs[1]:.3f} u to it and {weights[0]:.3f} ± {weights[1]:.3f} u to the weights, leaving out the "
        f"division {free[0]:.3f} ± {free[1]:.3f} u",
        table={
            "algorithm": list(kept),
            "mean error / u": [float(error.mean()) for error in kept.values()],
            "largest error / u": [float(error.max()) for error in kept.values()],
        },
        counterexample="" if status == "SUPPORTED" else f"mean errors: {told}",
        seed=_SEED,
    )


_PAPER = "Blanchard, Higham & Higham 2021, arXiv 1909.03469, {}"


def _claim(
    name: str, title: str, statement: str, source: str, check: Any, control: Any, **more: Any
) -> Claim:
    return Claim(
        name, "log-sum-exp", title, statement, source, more.pop("kind", "exact"), check, control, **more
    )


CLAIMS: Final[Sequence[Claim]] = (
    _claim(
        "LSE-4b",
        "overflow without a shift",
        "Without a shift a row overflows as soon as one logit is above log(largest number): 11.09 in fp16, "
        "88.7 in bf16 "
        "and fp32.",
        _PAPER.format("section 3 and tables 1, 2"),
        lambda lab: overflow_threshold(),
        lambda lab: overflow_threshold(-1.0),
    ),
    _claim(
        "LSE-7e",
        "weights recomputed from a stored logarithm",
        "P = e^(s − L) with L stored in a format of unit roundoff u has relative errors up to e^{u|L|} − 1, "
        "and reaches "
        "u|L| to first order: a backward pass needs L in fp32, and |L|·2^-24 is its floor.",
        "derived; consequence of the corrected Theorem 4.4 of arXiv 1909.03469",
        lambda lab: recomputed(),
        lambda lab: recomputed(stored=False),
        kind="enclosure",
    ),
    _claim(
        "LSE-9",
        "shifting costs no accuracy",
        "In fp16 shifted log-sum-exp and softmax are as accurate as unshifted where that does not overflow, "
        "never overflows "
        "itself, and the division-free form is less accurate.",
        _PAPER.format("section 5 (2500 rows of a network for MNIST; here random rows)"),
        lambda lab: accuracy_of_shifting(lab.choose(2500, 10000, 40000)),
        lambda lab: accuracy_of_shifting(2500, 64.0),
        kind="measurement",
    ),
    _claim(
        "LSE-10a",
        "what the shift prevents",
        "After a shift by the largest logit no exponential and no sum overflows, the sum lies in [1, n], "
        "and the "
        "logarithm's argument is at least 1.",
        _PAPER.format("section 4; derived"),
        lambda lab: shifted_sum(),
        lambda lab: shifted_sum(by_largest=False),
    ),
    _claim(
        "LSE-10b",
        "the shift prevents underflow",
        "Subtracting the largest logit prevents underflow of the exponentials.",
        "the article on the log-sum-exp trick (seed 0)",
        lambda lab: flushed(),
        lambda lab: flushed(8.0),
        covers=("SEED0-4",),
    ),
    _claim(
        "LSE-10c",
        "underflow is harmless for the sum",
        "Terms that underflow after the shift change the sum by less than n times the smallest number, "
        "relatively.",
        "derived",
        lambda lab: harmless(),
        lambda lab: harmless(0.25),
        kind="enclosure",
    ),
    _claim(
        "LSE-10d",
        "logarithms of weights",
        "x_i − y keeps log-probabilities accurate at every depth, where log(g_i) loses all accuracy and "
        "becomes −∞ as g_i "
        "underflows.",
        "derived; " + _PAPER.format("section 1 for log-softmax"),
        lambda lab: log_probabilities(),
        lambda lab: log_probabilities(of_weights=True),
    ),
)
