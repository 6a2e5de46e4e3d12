"""The order in which float32 numbers are added: splits of the keys, batch invariance, atomic sums."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = [
    "CLAIMS",
    "atomic_sums",
    "attention_row",
    "completions",
    "fixed_size",
    "number_of_splits",
    "split_bounds",
]

_BLOG: Final = "He et al., Defeating nondeterminism in LLM inference, Thinking Machines, September 2025"
Singles = npt.NDArray[np.float32]


def split_bounds(n: int, *, splits: int = 0, size: int = 0) -> list[range]:
    """n keys in ``splits`` parts, as even as can be, or in parts of ``size`` and a rest."""
    size = size or max(1, -(-n // splits))
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def attention_row(s: Singles, v: Singles, parts: Sequence[range]) -> Singles:
    """Rows of attention in float32 from logits s, (R, n), and v, (n,): each part summed key after key, then
    merged.
    """
    top = s.max(axis=1)
    mass, out = np.zeros(len(s), np.float32), np.zeros(len(s), np.float32)
    for part in parts:
        held, total = np.zeros(len(s), np.float32), np.zeros(len(s), np.float32)
        for j in part:
            # Rounded from float64, so that a library's vector and scalar exponentials cannot differ.
            p = np.exp((s[:, j] - top).astype(float)).astype(np.float32)
            held = held + p
            total = total + p * v[j]
        mass, out = mass + held, out + total
    result: Singles = out / mass
    return result


def _equal(a: Singles, b: Singles) -> int:
    return int((a.view(np.int32) == b.view(np.int32)).sum())


def number_of_splits(counts: Sequence[int] = (1, 2, 3, 4, 8), n: int = 96, rows: int = 32) -> ClaimFinding:
    """Has a row the same bits whatever the number of splits that a scheduler chooses for a batch?"""
    rng = np.random.default_rng(52)
    s, v = rng.standard_normal((rows, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    first = attention_row(s, v, split_bounds(n, splits=counts[0]))
    again = _equal(first, attention_row(s, v, split_bounds(n, splits=counts[0])))
    same = {c: _equal(first, attention_row(s, v, split_bounds(n, splits=c))) for c in counts}
    changed = any(count < rows for count in same.values())
    tiny = np.array([1, 2.0**-24, 2.0**-24], np.float32)
    level = np.zeros((1, 3), np.float32)
    one, two = (attention_row(level, tiny, parts)[0] for parts in ([range(3)], [range(1), range(1, 3)]))
    return ClaimFinding(
        status="REFUTED" if changed else "SUPPORTED",
        evidence=f"{rows} rows of {n} keys: repeated with the same splits {again} rows are equal bit by bit; "
        f"against {counts[0]} split: " + ", ".join(f"{same[c]} of {rows} with {c}" for c in counts[1:]),
        table={"splits": list(same), "rows with the same bits": list(same.values())},
        counterexample=(
            "three equal logits, V = (1, 2⁻²⁴, 2⁻²⁴), float32: in one split 1 + 2⁻²⁴ = 1 (tie, to even) "
            f"twice, in splits {{1}}, {{2, 3}} 1 + 2⁻²³; divided by 3 the outputs are {float(one).hex()} and "
            f"{float(two).hex()}"
            if changed
            else ""
        ),
        seed=52,
    )


def fixed_size(*, size: int = 16, splits: int = 0, n: int = 80) -> ClaimFinding:
    """With splits of a fixed size, has a row the same bits alone, in a batch, padded, and in prefill as in
    decoding?

    Args:
        size: of a split; 0 for ``splits`` splits of as many keys as there are.
    """
    rng = np.random.default_rng(53)
    s, v = rng.standard_normal((n, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    causal = np.where(np.tri(n, dtype=bool), s, -np.inf).astype(np.float32)
    whole = attention_row(causal, v, split_bounds(n, size=size, splits=splits))
    padded = np.concatenate([causal, np.zeros((7, n), np.float32)])
    found = {
        "batch padded by 7 rows": _equal(
            whole, attention_row(padded, v, split_bounds(n, size=size, splits=splits))[:n]
        )
    }
    alone, decoding = 0, 0
    for i in range(n):
        alone += _equal(
            whole[i : i + 1], attention_row(causal[i : i + 1], v, split_bounds(n, size=size, splits=splits))
        )
        one = attention_row(s[i : i + 1, : i + 1], v[: i + 1], split_bounds(i + 1, size=size, splits=splits))
        decoding += _equal(whole[i : i + 1], one)
    found |= {"a query alone": alone, "decoding, keys so far only": decoding}
    wrong = [name for name, count in found.items() if count < n]
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence=f"{n} causal rows, "
        f"{'splits of ' + str(size) + ' keys' if size else str(splits) + ' splits'}, bits equal to the "
        "prefill's: "
        + ", ".join(f"{count} rows {name}" for name, count in found.items())
        + ". A masked key adds 0, which changes no float32 sum",
        table={"compared": list(found), "rows with the same bits": list(found.values())},
        counterexample=f"rows differ: {', '.join(wrong)}" if wrong else "",
        seed=53,
    )


def completions() -> ClaimFinding:
    """Sampled completions of a large model: not here."""
    return ClaimFinding(
        status="OPEN",
        evidence="1000 completions at temperature 0 of Qwen3-235B-A22B-Instruct-2507 gave 80 different ones, "
        "equal for 102 tokens; needed: that model and its server. The mechanism is checked as HW-5a and "
        "HW-5b",
    )


def atomic_sums(blocks: Sequence[Sequence[float]] | None = None, count: int = 6) -> ClaimFinding:
    """How many different dQ do the orders of atomic float32 additions of column blocks give? All orders are
    run.

    Args:
        blocks: contributions to one row of dQ, block by block; drawn if left out.
        count: how many blocks to draw.
    """
    rng = np.random.default_rng(54)
    drawn: Any = rng.standard_normal((count, 4)) if blocks is None else blocks
    parts = np.array(drawn, np.float32)
    found: dict[bytes, tuple[int, ...]] = {}
    orders = list(itertools.permutations(range(len(parts))))
    for order in orders:
        total = np.zeros(parts.shape[1], np.float32)
        for i in order:
            total = total + parts[i]
        found.setdefault(total.tobytes(), order)
    return ClaimFinding(
        status="HOLDS" if len(found) > 1 else "REFUTED",
        evidence=f"{len(orders)} orders of {len(parts)} blocks, {parts.shape[1]} columns of dQ: {len(found)} "
        "different results; a fixed order, as the deterministic option has, is one of them. Smallest "
        "example: 1, 2⁻²⁴, 2⁻²⁴ give 1 or 1 + 2⁻²³. That the order varies between runs is the hardware's "
        "doing and is not seen here",
        counterexample=""
        if len(found) > 1
        else "these contributions are added without rounding: one result for all orders",
        seed=54,
    )


CLAIMS: Final = (
    Claim(
        id="HW-5a",
        subject="hardware",
        title="a row does not depend on the number of splits",
        statement="A row of attention has the same bits whatever number of splits of its keys the batch size "
        "leads to.",
        source="He et al., Defeating nondeterminism in LLM inference, Thinking Machines, September 2025, "
        "which refutes it",
        kind="search",
        check=lambda _: number_of_splits(),
        control=lambda _: number_of_splits((2, 2, 2)),
        covers=("HW-5",),
    ),
    Claim(
        id="HW-5b",
        subject="hardware",
        title="splits of a fixed size are batch invariant",
        statement="With splits of a fixed size a row has the same bits alone, in a batch, padded, and in "
        "prefill as in decoding.",
        source=_BLOG,
        kind="search",
        check=lambda _: fixed_size(),
        control=lambda _: fixed_size(size=0, splits=4),
    ),
    Claim(
        id="HW-5c",
        subject="hardware",
        title="different completions at temperature 0",
        statement="1000 completions at temperature 0 gave 80 different texts, equal for the first 102 "
        "tokens.",
        source=_BLOG,
        kind="none",
        check=lambda _: completions(),
        control=None,
    ),
    Claim(
        id="HW-7",
        subject="hardware",
        title="atomic sums of dQ",
        statement="dQ accumulated by atomic additions in FlashAttention's backward is not the same bits for "
        "every order of the column blocks; only a fixed order makes it so.",
        source="from memory: Dao-AILab/flash-attention, option deterministic",
        kind="exact",
        check=lambda _: atomic_sums(),
        control=lambda _: atomic_sums([[1.0, 2.0], [3.0, -5.0], [8.0, 0.5], [-2.0, 4.0]]),
    ),
)
