"""The smallest failing input of a search, as lines of text."""

from __future__ import annotations

from attnproof.reports.record import Counterexample
from attnproof.reports.wording import counted, duration

__all__ = ["lines"]


def lines(found: Counterexample) -> list[str]:
    """Verdict and case, tensors, what is wrong, the judge's word, how it was found; lines without ends."""
    text = [f"FAIL  {found.case.id}"]
    if found.invariant:
        text.append(f"  invariant {found.invariant} is broken")
    text += [f"  {words}" for words in found.tensors]
    text += [f"  {sentence}" for sentence in found.sentences]
    text += [f"  {failure.rule}: {failure.reason}" for failure in found.verdict.failures[:1]]
    where = "" if found.found.id == found.case.id else f", at {found.found.id}"
    spent = f"{duration(found.seconds)} ({counted(found.cases, 'case')}, phase {found.phase})"
    text.append(f"  found after {spent}{where}; made small in {duration(found.shrinking_seconds)}")
    return text
