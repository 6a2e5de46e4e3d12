"""What a mutant is: one deliberate defect, put into a copy of a kernel that is right.

The tool is worth what it finds. Each mutant says what is wrong with it and names a case on which it is proved
wrong against Arb (:mod:`tests.quality.mutants.proof`), never by the judge, so that a detection rate is a
statement about the judge and the search. That case is not shown to the search.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from attnproof.properties.case import Case, CaseError

__all__ = ["HELD_OUT_SEED", "MECHANISMS", "Mutant", "MutantError", "all_mutants", "held_out"]

MECHANISMS = (
    "masking",
    "special-values",
    "numerics",
    "pointers",
    "wrapper",
    "accuracy",
    "deception",
    "race",
    "gradient",
)

HELD_OUT_SEED = 20261122
"""Seed of the draw of mutants that nobody may look at while the search is tuned."""


class MutantError(ValueError):
    """A mutant that is not well formed, or whose edits do not fit the source that they are made in."""


@dataclass(frozen=True)
class Mutant:
    """One deliberate defect.

    Attributes:
        name: a Python identifier, unique among all mutants.
        base: target of the right kernel that it derives from.
        edits: (old, new) replacements in the source of the base's module, or of ``module``; each old text
            occurs exactly once when its turn comes.
        mechanism: one of :data:`MECHANISMS`; "gradient" for one that leaves all outputs as they are.
        bug: "B03" of bugs.md, a paper, or "".
        story: one sentence: what is wrong, in plain words.
        trigger: text of a case on which it is proved wrong; never given to the search.
        shows: rules of failures that fit the mechanism, names of invariants included.
        module: dotted module whose text is edited, where it is not the base's.
        source: a whole module in place of edits, with the entry point under the base's attribute name.
        accuracy_only: whether it does nothing but lose 2 to 8 times in accuracy.
        unseen: why a judge of outputs can hardly tell it from what the base declares. Such a mutant counts
            like any other, and is listed with this reason where it lives.

    Raises:
        MutantError: where a field is none of that.
    """

    name: str
    base: str
    edits: tuple[tuple[str, str], ...]
    mechanism: str
    bug: str
    story: str
    trigger: str
    shows: tuple[str, ...]
    module: str = ""
    source: str = ""
    accuracy_only: bool = False
    unseen: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name.startswith("_"):
            raise MutantError(f"name={self.name!r}: expected a public Python identifier")
        if self.base.count(":") != 1:
            raise MutantError(f"{self.name}: base={self.base!r}: expected package.module:attribute")
        if self.mechanism not in MECHANISMS:
            raise MutantError(
                f"{self.name}: mechanism={self.mechanism!r}: expected one of {', '.join(MECHANISMS)}"
            )
        if bool(self.edits) == bool(self.source):
            raise MutantError(f"{self.name}: expected either edits or a whole source, and not both")
        if not self.shows or not self.story:
            raise MutantError(f"{self.name}: expected a story and at least one rule in shows")
        try:
            case = Case.parse(self.trigger)
        except CaseError as error:
            raise MutantError(f"{self.name}: trigger: {error}") from error
        if self.mechanism == "gradient" and case.option("cotangents") is None:
            raise MutantError(
                f"{self.name}: trigger {self.trigger}: the defect is in a gradient, which only a case with "
                "cotangents=… asks for"
            )

    @property
    def family(self) -> str:
        """The family of the right kernel."""
        return Case.parse(self.trigger).family

    @property
    def backward(self) -> bool:
        """Whether gradients are where it is proved wrong."""
        return Case.parse(self.trigger).option("cotangents") is not None

    @property
    def target(self) -> str:
        """Where a worker finds the mutant."""
        return f"tests.quality.mutants.built:{self.name}"

    @property
    def base_module(self) -> str:
        """Dotted module of the right kernel."""
        return self.base.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Name of the entry point in its module."""
        return self.base.partition(":")[2]

    @property
    def edited_module(self) -> str:
        """Dotted module whose text the edits are made in."""
        return self.module or self.base_module

    def edited(self, text: str) -> str:
        """``text``, the source of :attr:`edited_module`, with the edits made one after the other.

        Raises:
            MutantError: naming the text that does not occur exactly once.
        """
        for old, new in self.edits:
            found = text.count(old)
            if found != 1:
                raise MutantError(
                    f"mutant {self.name}: {old!r} occurs {found} times in {self.edited_module}; each old "
                    "text of an edit must occur exactly once: take in more of the lines around it"
                )
            text = text.replace(old, new)
        return text


def all_mutants() -> tuple[Mutant, ...]:
    """The mutants of every module of this package that has a tuple ``MUTANTS``, in order of their names.

    Raises:
        MutantError: where two have one name.
    """
    package = importlib.import_module(__package__ or "tests.quality.mutants")
    found: dict[str, Mutant] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        if not _defines_mutants(Path(package.__path__[0]) / f"{entry.name}.py"):
            continue
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for mutant in getattr(module, "MUTANTS", ()):
            if mutant.name in found:
                raise MutantError(f"mutant {mutant.name!r} is defined twice, the second time in {entry.name}")
            found[mutant.name] = mutant
    return tuple(found[name] for name in sorted(found))


def _defines_mutants(path: Path) -> bool:
    """Whether a module assigns MUTANTS: the others here import much, and workers ask for mutants alone."""
    return re.search(r"^MUTANTS\b.*=", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def held_out(names: Iterable[str], seed: int = HELD_OUT_SEED) -> frozenset[str]:
    """A third of ``names``, drawn by ``seed``: the mutants that tuning must not see.

    The draw is by a hash of each name, so that a new mutant moves at most one of the others over the line.
    """
    drawn = sorted(set(names), key=lambda name: hashlib.blake2b(f"{seed} {name}".encode()).digest())
    return frozenset(drawn[: round(len(drawn) / 3)])
