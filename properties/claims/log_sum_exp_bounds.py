"""Published rounding-error bounds of log-sum-exp and softmax, counted to first order and attacked in formats.

Blanchard, D. J. Higham and N. J. Higham, IMA J. Numer. Anal. 41(4), 2021, arXiv 1909.03469. Each algorithm
is written once and run twice: over :class:`Counting`, which gives the largest first-order error that *any*
row of logits can have, and over :class:`Rounded`, where every operation is rounded to fp16, bf16 or fp32 and
rows are sought whose error exceeds the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.correct_rounding import FORMATS, FP16, Floats, Format, Rounded
from attnproof.properties.claims.log_sum_exp_algorithms import (
    SEED,
    Attack,
    Bound,
    attacked,
    count,
    exact,
    ratios,
    run,
    sized,
)
from attnproof.properties.claims.rounding_counts import Form

__all__ = ["CLAIMS", "bounded"]

_COUNTED = 64
"""Lengths of rows for which errors are counted."""


def _plainest(algorithm: str, bound: Bound, found: Sequence[Attack]) -> tuple[Format, tuple[float, ...]]:
    """The least counterexample: x = (c, c) in fp16 with the least integer c, else the worst row found."""
    pairs = np.repeat(np.arange(1.0, 1025.0)[:, None], 2, axis=1)
    over = np.flatnonzero(ratios(algorithm, bound(2), FP16, pairs) > 1.0)
    if over.size:
        return FP16, tuple(pairs[over[0]].tolist())
    worst = max(found, key=lambda attack: (attack.ratio > 1.0, -attack.n, attack.ratio))
    return worst.form, worst.row


def _told(algorithm: str, bound: Bound, form: Format, row: tuple[float, ...]) -> str:
    x = np.array([row])
    computed = [
        float(a[0]) for a in run(algorithm, [x[:, i] for i in range(len(row))], np.ones(1), Rounded(form))
    ]
    due = exact(algorithm, x)[0].tolist()
    value = algorithm in {"log", "shifted log"}
    error = max(abs(a - b) for a, b in zip(computed, due, strict=True)) / (1.0 if value else max(due))
    limit = float(sized(bound(len(row)), x)[0]) * form.u
    size = "Absolute" if value else "Relative"
    lines = [f"{form.name}, every operation rounded to nearest (u = 2^-{form.precision}); x = {row}."]
    if "shifted" in algorithm and row[0] == row[-1] and len(row) == 2:
        r = Rounded(form)
        log = float(r.log1p(np.ones(1))[0])
        y = float(r.add(x[0, :1], np.array([log]))[0])
        lines.append(
            f"e^(x − x_max) = 1, s = 1, log1p(1) → {log!r}, x_max + log1p = {row[0] + log!r} → {y!r}."
        )
    lines += [
        f"Computed ({algorithm}): {', '.join(f'{a!r}' for a in computed[:8])}.",
        f"Exact: {', '.join(f'{a:.10g}' for a in due[:8])}.",
        f"{size} error {error:.6g} = {error / form.u:.4g} u.",
        f"The bound allows ({bound(len(row))})·u = {limit:.6g} = {limit / form.u:.4g} u.",
    ]
    return "\n".join(lines)


def bounded(algorithm: str, bound: Bound, effort: tuple[Sequence[int], int, int]) -> ClaimFinding:
    """HOLDS if no row of up to 64 logits can exceed the bound to first order, and none of the search does."""
    short = [n for n in range(2, _COUNTED + 1) if not count(algorithm, n).within(bound(n))]
    found = list(attacked(algorithm, bound, *effort))
    over = [attack for attack in found if attack.ratio > 1.0]
    status = "REFUTED" if over else "SUPPORTED" if short else "HOLDS"
    told = (
        f"counted for n = {short[0]}: ({count(algorithm, short[0]).resolved()})·u can occur, the bound is "
        f"({bound(short[0]).resolved()})·u"
        if short
        else f"counted for n = 2 … {_COUNTED}: never above the bound; at n = {_COUNTED} "
        f"({count(algorithm, _COUNTED).resolved()})·u of ({bound(_COUNTED).resolved()})·u"
    )
    largest = {form.name: max(a.ratio for a in found if a.form is form) for form in FORMATS}
    return ClaimFinding(
        status=status,
        evidence=told
        + ". The count is exact, and decides what holds; what is refuted is refuted by the search: "
        f"{sum(a.rows for a in found)} rows with n in {list(effort[0])}, every operation rounded, errors "
        "against float64, logits that neither over- nor underflow and whose first-order error is at "
        "most 1/8: "
        "largest error by bound " + ", ".join(f"{value:.3f} in {name}" for name, value in largest.items()),
        table={
            "format": [a.form.name for a in found],
            "n": [a.n for a in found],
            "rows": [a.rows for a in found],
            "largest error / bound": [a.ratio for a in found],
        },
        counterexample=_told(algorithm, bound, *_plainest(algorithm, bound, found)) if over else "",
        seed=SEED,
    )


def _growth(finding: ClaimFinding) -> ClaimFinding:
    """The same finding with a chart: both forms of softmax at equal logits x = c·(1, …, 1), n = 10, fp16."""
    c = FP16.rounded([1.37 * 2.0**k for k in range(-4, 9)])
    x = np.repeat(c[:, None], 10, axis=1)
    columns: dict[str, list[Any]] = {"c": [], "relative error / u": [], "form": []}
    for name in ("shifted", "shifted, division-free"):
        due = exact(name, x)
        results: list[Floats] = run(name, [x[:, i] for i in range(10)], np.ones(len(x)), Rounded(FP16))
        error = (np.abs(np.stack(results, axis=1) - due) / due).max(axis=1) / FP16.u
        columns["c"] += c.tolist()
        columns["relative error / u"] += error.tolist()
        columns["form"] += [name] * len(c)
    plot = Plot("Equal logits c in fp16, n = 10", "line", columns, "c", "relative error / u", "form", ("c",))
    return replace(finding, plots=(plot,))


_EFFORTS = (((2, 5, 16), 48, 4), ((2, 3, 8, 16, 24, 64), 256, 20), ((2, 3, 5, 8, 16, 24, 64, 120), 256, 30))
_SOURCE = "Blanchard, Higham & Higham 2021, arXiv 1909.03469, {}"


def _claim(
    name: str,
    title: str,
    statement: str,
    theorem: str,
    algorithm: str,
    bound: Bound,
    broken: Bound,
    covers: tuple[str, ...] = (),
    shown: Callable[[ClaimFinding], ClaimFinding] = lambda finding: finding,
) -> Claim:
    return Claim(
        id=name,
        subject="log-sum-exp",
        title=title,
        statement=statement,
        source=_SOURCE.format(theorem),
        kind="exact",
        check=lambda lab: shown(bounded(algorithm, bound, lab.choose(*_EFFORTS))),
        control=lambda lab: bounded(algorithm, broken, lab.choose(*_EFFORTS)),
        covers=covers,
    )


def _printed_42(n: int) -> Form:
    return Form(one=n, spread=1, log=1)


def _corrected_42(n: int) -> Form:
    return _printed_42(n) + Form(value=1)


def _printed_44(n: int) -> Form:
    return Form(one=n + 1, spread=1, log=1, off=1)


def _corrected_44(n: int) -> Form:
    return _printed_44(n) + Form(value=1)


CLAIMS: Final = (
    _claim(
        "LSE-3",
        "log-sum-exp without a shift",
        "To first order in u, log Σ e^{x_i} has a relative error of at most (1 + (n + 1)/|y|)·u if nothing "
        "over- or underflows.",
        "Theorem 3.2",
        "log",
        lambda n: Form(one=n + 1, value=1),
        # The control forgets the errors of the exponentials and sums: wrong where y is near 0.
        lambda n: Form(value=1),
    ),
    _claim(
        "LSE-4a",
        "softmax by division, without a shift",
        "To first order, e^{x_j} / Σ e^{x_i} has an error of at most (n + 3)·u relative to the largest one.",
        "Theorem 3.3",
        "division",
        lambda n: Form(one=n + 3),
        lambda n: Form(one=1),
    ),
    _claim(
        "LSE-5",
        "softmax without a division",
        "To first order, e^{x_j − ŷ} has a relative error of at most (|y| + max_j |x_j − y| + n + 2)·u; the "
        "term |y| is real: the error grows with a common offset of the logits.",
        "Theorem 3.4",
        "division-free",
        lambda n: Form(one=n + 2, value=1, off=1),
        lambda n: Form(one=1),
    ),
    _claim(
        "LSE-6a",
        "the shifted sum",
        "To first order, 1 + ŝ of Algorithm 4.1 has a relative error of at most (n + x_max − x_min)·u.",
        "equation (4.6)",
        "1 + s",
        lambda n: Form(one=n, spread=1),
        lambda n: Form(one=0, spread=1),
    ),
    _claim(
        "LSE-6b",
        "shifted softmax by division",
        "To first order, the weights of Algorithm 4.1 have an error of at most (n + 2 + 2(x_max − x_min))·u "
        "relative to the largest.",
        "Theorem 4.3",
        "shifted",
        lambda n: Form(one=n + 2, spread=2),
        lambda n: Form(one=1),
    ),
    _claim(
        "LSE-7a",
        "shifted log-sum-exp, as printed",
        "To first order, x_max + log1p(s) has a relative error of at most |y + n − x_min|/|y|·u.",
        "Theorem 4.2 as printed",
        "shifted log",
        _printed_42,
        _corrected_42,
        ("LSE-6",),
    ),
    _claim(
        "LSE-7b",
        "shifted log-sum-exp, with the last addition's rounding",
        "To first order, x_max + log1p(s) has a relative error of at most (1 + |y + n − x_min|/|y|)·u.",
        "Theorem 4.2, corrected: the final addition adds one rounding of |y|",
        "shifted log",
        _corrected_42,
        _printed_42,
    ),
    _claim(
        "LSE-7c",
        "shifted softmax without a division, as printed",
        "To first order, e^{x_j − ŷ} of the shifted algorithm has a relative error of at most "
        "(1 + max_j |x_j − y| + |y + n − x_min|)·u.",
        "Theorem 4.4 as printed",
        "shifted, division-free",
        _printed_44,
        _corrected_44,
        ("LSE-6",),
    ),
    _claim(
        "LSE-7d",
        "shifted softmax without a division, with the last addition's rounding",
        "To first order, e^{x_j − ŷ} of the shifted algorithm has a relative error of at most "
        "(1 + |y| + max_j |x_j − y| + |y + n − x_min|)·u.",
        "Theorem 4.4, corrected: the final addition adds one rounding of |y|",
        "shifted, division-free",
        _corrected_44,
        _printed_44,
        shown=_growth,
    ),
)
