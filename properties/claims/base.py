"""A claim's outcome as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ClaimFinding"]


@dataclass(frozen=True)
class ClaimFinding:
    """What checking a claim gave.

    Attributes:
        name: of the claim; status: HOLDS, SUPPORTED, REFUTED, CONDITIONAL or OPEN, computed by the check.
        statement: what is claimed, in our words; source: where; evidence: what was computed, in words.
        table: numbers behind the evidence, columns of equal length.
    """

    name: str
    status: str
    statement: str
    source: str
    evidence: str
    table: dict[str, list[Any]] = field(default_factory=dict)
