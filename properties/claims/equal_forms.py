"""How claims of equality are checked: every form of a family against its recurrence, number by number.

Inputs are rational, so that forms that are equal give equal numbers; any difference is one of algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.forms.base import Array, difference

__all__ = ["LENGTH", "Row", "Run", "compared", "equality", "row"]

LENGTH = 19
"""Positions of the exact comparisons: chunks of 3 and of 16 have a ragged tail."""

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


def equality(rows: Sequence[Row], *, seed: int | None = None, example: str = "") -> ClaimFinding:
    """HOLDS if every comparison is exactly equal, else REFUTED.

    Args:
        seed: of the rational inputs.
        example: a small case to be redone by hand, told where something differs.
    """
    wrong = [f"{variant}, {form}: {apart:.3g}" for variant, form, _, same, apart in rows if not same]
    variants = list(dict.fromkeys(row[0] for row in rows))
    told = "differs in " + "; ".join(wrong[:5]) if wrong else "no difference"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{sum(row[2] for row in rows)} rational numbers of {len(rows)} comparisons over "
        f"{len(variants)} variants: {told}",
        table={title: [row[i] for row in rows] for i, title in enumerate(_TITLES)},
        counterexample=(example or "Largest differences: " + "; ".join(wrong[:5])) if wrong else "",
        seed=seed,
    )
