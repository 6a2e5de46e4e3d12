"""How claims of equality are checked: every form of a family against its recurrence, number by number.

Inputs are rational, so that forms that are equal give equal numbers; any difference is one of algebra. They
are drawn from so many values that equal numbers at one point prove the identity, up to a probability below
2^-80: a polynomial of degree d that is not 0 vanishes at a point of independent entries, each drawn from S
values, with probability at most d/S (Schwartz–Zippel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import GENERIC_BITS

__all__ = ["DEGREE_BITS", "LENGTH", "SCHWARTZ_ZIPPEL", "Row", "Run", "compared", "equality", "row"]

LENGTH = 19
"""Positions of the exact comparisons: chunks of 3 and of 16 have a ragged tail."""

DEGREE_BITS: Final = 16
"""Differences of forms at these lengths and widths have degrees below 2 to this power."""

SCHWARTZ_ZIPPEL: Final = (
    f"identities of rational functions of degree below 2^{DEGREE_BITS} at these sizes, tested exactly at a "
    f"random point, each entry one of 2^{GENERIC_BITS} values or more: a false one passes with probability "
    f"below 2^-{GENERIC_BITS - DEGREE_BITS}"
)

Run = Callable[[str | int, slice, Any], tuple[Array, Any]]
"""A family's form ("recurrent", "parallel", or a chunk's length) over a slice of its inputs, from a state."""

Row = tuple[str, str, int, bool, float]
"""Variant, form, numbers compared, whether all are equal, the largest difference."""

_TITLES = ("variant", "form", "numbers compared", "equal", "largest difference")


def _arrays(result: Any) -> list[Array]:
    """The arrays of a nested tuple of arrays and numbers."""
    if isinstance(result, tuple):
        return [array for part in result for array in _arrays(part)]
    return [np.asarray(result, dtype=object).reshape(-1)]


def compared(
    variant: str, run: Run, length: int = LENGTH, *, parallel: bool = True, chunked: bool = True
) -> list[Row]:
    """Every form against the recurrence, and the state handed over at every split, the empty ones included.

    The second part of a split runs in another form (chunks of 3) than the first.

    Args:
        parallel: compare the quadratic form; chunked: compare chunks and states handed over.
    """
    whole = slice(0, length)
    reference = run("recurrent", whole, None)
    forms: list[str | int] = [*(["parallel"] if parallel else []), *([1, 3, 16, length] if chunked else [])]
    rows = [
        row(variant, form if isinstance(form, str) else f"C = {form}", reference, [run(form, whole, None)])
        for form in forms
    ]
    if not chunked:
        return rows
    handed = []
    for split in range(length + 1):
        first, state = run("recurrent", slice(0, split), None)
        second, state = run(3, slice(split, length), state)
        handed.append((np.concatenate([first, second]), state))
    return [*rows, row(variant, "handed over at every split", reference, handed)]


def row(variant: str, form: str, reference: Any, results: Iterable[Any]) -> Row:
    """One comparison: each of ``results`` (nested tuples of arrays) with ``reference``, number by number."""
    pairs = [pair for result in results for pair in zip(_arrays(reference), _arrays(result), strict=True)]
    apart = [difference(x, y) for x, y in pairs]
    return (variant, form, sum(x.size for x, _ in pairs), all(d == 0 for d in apart), float(max(apart)))


def equality(
    rows: Sequence[Row], *, seed: int | None = None, example: str = "", remark: str = ""
) -> ClaimFinding:
    """HOLDS if every comparison is exactly equal, else REFUTED.

    Args:
        seed: of the inputs, drawn by :func:`attnproof.properties.forms.numbers.generic`.
        example: a small case to be redone by hand, told where something differs.
        remark: why equality at the point says more than :data:`SCHWARTZ_ZIPPEL`, such as on other pieces.
    """
    wrong = [f"{variant}, {form}: {apart:.3g}" for variant, form, _, same, apart in rows if not same]
    variants = list(dict.fromkeys(row[0] for row in rows))
    told = "differs in " + "; ".join(wrong[:5]) if wrong else "no difference"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{sum(row[2] for row in rows)} rational numbers of {len(rows)} comparisons over "
        f"{len(variants)} variants: {told}" + ("" if wrong else f" ({SCHWARTZ_ZIPPEL}{remark})"),
        table={title: [row[i] for row in rows] for i, title in enumerate(_TITLES)},
        counterexample=(example or "Largest differences: " + "; ".join(wrong[:5])) if wrong else "",
        seed=seed,
    )
