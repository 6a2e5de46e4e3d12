"""Claims of the literature, one file a subject, and the ledger that finds them all."""

from __future__ import annotations

import importlib
import pkgutil
import re

from attnproof.properties.claims.base import KINDS, Claim

__all__ = ["ledger"]

_ID = re.compile(r"[A-Z]+[0-9]*-[0-9]+[a-z]?")


def ledger() -> dict[str, Claim]:
    """Every claim by its id, in the order of subject and id.

    Raises:
        ValueError: two claims with one id, an id or a kind of evidence that is none, or a claim that has
            neither a control nor the kind "none".
    """
    found: dict[str, Claim] = {}
    for module in pkgutil.iter_modules(__path__):
        for claim in getattr(importlib.import_module(f"{__name__}.{module.name}"), "CLAIMS", ()):
            if claim.id in found:
                raise ValueError(f"two claims have the id {claim.id!r}; give one another letter")
            if not _ID.fullmatch(claim.id):
                raise ValueError(f"claim id {claim.id!r} must look like SPL-6 or LSE-7a")
            if claim.kind not in KINDS:
                raise ValueError(f"{claim.id}: kind {claim.kind!r} must be one of {', '.join(KINDS)}")
            if (claim.control is None) != (claim.kind == "none"):
                raise ValueError(
                    f"{claim.id}: a claim has a control unless nothing can be checked (kind 'none')"
                )
            found[claim.id] = claim
    return dict(sorted(found.items(), key=lambda pair: (pair[1].subject.lower(), _order(pair[0]))))


def _order(name: str) -> tuple[str, int, str]:
    letters, _, rest = name.partition("-")
    number = re.match(r"[0-9]+", rest)
    assert number is not None
    return letters, int(number.group()), rest[number.end() :]
