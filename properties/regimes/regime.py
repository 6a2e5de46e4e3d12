"""What a regime of inputs is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnproof.properties.case import OPTIONS
from attnproof.properties.contract import DTYPES
from attnproof.properties.draw import Draw
from attnproof.properties.signatures import SIGNATURES

__all__ = ["ATTENTION_FAMILIES", "STATE_FAMILIES", "Builder", "Regime", "RegimeClass", "merged"]

ATTENTION_FAMILIES = tuple(name for name, form in SIGNATURES.items() if form.attention)
"""Families in which queries meet keys; their regimes are the same, but for options that some lack."""

STATE_FAMILIES = ("linear", "gated_linear", "retention", "rwkv6", "mlstm", "delta")
"""Families with queries, keys and values that carry a matrix along the sequence."""

RegimeClass = Literal["plain", "tied", "extreme", "exact", "nonfinite", "real"]

Builder = Callable[[Draw], dict[str, Any]]
"""From a draw to float64 arrays by tensor name (``bias`` and ``sinks`` included where the regime sets them)
and, optionally, the float ``scale``."""


@dataclass(frozen=True, slots=True)
class Regime:
    """A named kind of input, with the reason for which it is tried.

    Attributes:
        name: lower-case words joined by hyphens.
        reason: what such inputs bring out, with the source of any threshold.
        regime_class: the class by which thresholds of the probable budget are fitted.
        builders: by family, the function that makes the values.
        needs: the case must have at least one of these options, where its family has any of them.
        excludes: the case must have none of these options, which would undo the regime.
        dtypes: dtypes in which the values are representable.
        vacuous: rows come out so nearly uniform, or the values so nearly equal, that few defects could show.
        requires: whether what it needs is installed, and how to install it; None if it needs nothing.
    """

    name: str
    reason: str
    regime_class: RegimeClass
    builders: Mapping[str, Builder]
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    vacuous: bool = False
    requires: tuple[Callable[[], bool], str] | None = None

    @property
    def families(self) -> tuple[str, ...]:
        """The families that have such inputs."""
        return tuple(self.builders)

    @property
    def available(self) -> bool:
        """Whether all that the regime needs is installed."""
        return self.requires is None or self.requires[0]()

    def build(self, draw: Draw) -> dict[str, Any]:
        """The values for ``draw``: float64 arrays by tensor name, and ``scale`` where the regime sets it."""
        return self.builders[draw.family](draw)

    def served(self, family: str, options: Iterable[str]) -> bool:
        """Whether ``options`` have one that the regime needs in ``family``, or it needs none there."""
        needed = set(self.needs).intersection(OPTIONS[family])
        return not needed or not needed.isdisjoint(options)

    def declines(self, family: str, dtype: str, options: Iterable[str]) -> str | None:
        """Why the regime has no inputs for such a case, as a clause for a message; None if it has."""
        given = set(options)
        if family not in self.builders:
            return f"family {family!r} has no such inputs (it is for {', '.join(self.families)})"
        if dtype not in self.dtypes:
            return f"its values are not representable in {dtype} (use {', '.join(self.dtypes)})"
        if not self.served(family, given):
            return f"it needs one of the options {', '.join(self.needs)}"
        clash = [option for option in self.excludes if option in given]
        if clash:
            return f"the option {clash[0]} would undo it"
        if self.requires is not None and not self.requires[0]():
            return self.requires[1]
        return None


def merged(*tables: Iterable[Regime]) -> dict[str, Regime]:
    """All regimes by name; those of one name become one, with the text and limits of the first.

    Raises:
        ValueError: if two regimes of one name differ in class, or both build one family.
    """
    regimes: dict[str, Regime] = {}
    for regime in (regime for table in tables for regime in table):
        known = regimes.get(regime.name)
        if known is None:
            regimes[regime.name] = regime
            continue
        twice = set(known.builders) & set(regime.builders)
        if twice or known.regime_class != regime.regime_class:
            raise ValueError(
                f"regime {regime.name!r} is defined twice: same families {sorted(twice)} or another class"
            )
        builders = {**known.builders, **regime.builders}
        regimes[regime.name] = dataclasses.replace(known, builders=builders)
    return regimes
