"""A claim of the literature, its check, and what the check found, as plain data.

A module of this package lists its claims as ``CLAIMS``; :func:`attnproof.properties.claims.ledger` finds them
all. The status of a finding is computed by the check. Every claim but an OPEN one has a *control*: the same
check on an input that was made false (or true) by construction, whose status must differ, so that a status
says something about the claim and not about the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeVar

import torch

__all__ = ["KINDS", "STATUSES", "Check", "Claim", "ClaimFinding", "Effort", "Laboratory", "Plot"]

STATUSES: Final = ("HOLDS", "SUPPORTED", "REFUTED", "CONDITIONAL", "OPEN")
"""HOLDS: proved over the stated domain, by exact arithmetic, by enclosures or by the short proof that the
evidence gives; or an identity of rational functions that was tested exactly at a random point of a range so
large that by Schwartz–Zippel a false one passes with probability below 2^-64, which the evidence tells, at
the sizes it names. SUPPORTED: no
counterexample in a stated, adversarial search, or a measured effect with its interval. REFUTED: a
counterexample, exact or enclosed. CONDITIONAL: holds under a condition that the claim leaves out; both sides
are shown. OPEN: cannot be checked here, with the reason."""

KINDS: Final = ("exact", "enclosure", "search", "measurement", "count", "none")
"""Kinds of evidence: exact arithmetic; rigorous enclosures; search for a counterexample; a measurement with
its interval; operations or bytes counted; none (OPEN)."""

Effort = Literal["quick", "default", "thorough"]
T = TypeVar("T")


class Laboratory(Protocol):
    """What checks need from the rooms above: how much work to do, kernels run, instructions modelled."""

    @property
    def effort(self) -> Effort:
        """How thorough the checks are to be."""

    def choose(self, quick: T, default: T, thorough: T | None = None) -> T:
        """The one for this effort; ``thorough`` is ``default`` if left out."""

    def run(
        self, target: str, *tensors: torch.Tensor | None, device: str = "emulator:sm_90", **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Outputs of a kernel, ``package.module:attribute``, called as the contract says.

        Raises:
            RuntimeError: the kernel raised, crashed or hung; with its message.
        """

    def instruction(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The emulator's model of an approximate PTX instruction of one float32 operand.

        Args:
            name: such as "tanh.approx.f32" or "ex2.approx.ftz.f32".

        Raises:
            ValueError: the emulator has no such instruction.
        """


@dataclass(frozen=True)
class Plot:
    """Numbers for a chart ("line" or "scatter"): columns of equal length, of which ``x``, ``y`` and ``color``
    name three; ``log`` names those on logarithmic axes.
    """

    title: str
    chart: Literal["line", "scatter"]
    columns: dict[str, list[Any]]
    x: str
    y: str
    color: str = ""
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClaimFinding:
    """What checking a claim gave.

    Attributes:
        status: one of :data:`STATUSES`, computed by the check.
        evidence: what was computed, in words.
        table: numbers behind the evidence, columns of equal length (plain numbers, texts, truth values).
        plots: charts of them.
        counterexample: of REFUTED and CONDITIONAL: the smallest one, in words and numbers to be redone by
            hand, at most 20 lines.
        seed: of whatever was drawn at random.
    """

    status: str
    evidence: str
    table: dict[str, list[Any]] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    counterexample: str = ""
    seed: int | None = None


Check = Callable[[Laboratory], ClaimFinding]


@dataclass(frozen=True)
class Claim:
    """A sentence of the literature that can be checked.

    Attributes:
        id: such as "SPL-6" or "LSE-7a": letters of the subject, a number, a letter where one entry of the
            literature makes several claims.
        subject: heading under which the ledger shows it, such as "splines".
        title: a few words.
        statement: what is claimed, in our words, with its formula.
        source: paper and section.
        kind: of evidence, one of :data:`KINDS`.
        check: computes the finding; it must not draw at random without a fixed seed.
        control: the check on an input that must change its status; None for an OPEN claim only.
        covers: further ids under which the claim, or part of it, is known elsewhere, such as "SEED3-6".
    """

    id: str
    subject: str
    title: str
    statement: str
    source: str
    kind: str
    check: Check
    control: Check | None
    covers: tuple[str, ...] = ()
