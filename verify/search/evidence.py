"""A failure in hand: the judged call, and what is needed to make it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from attnproof.properties.case import Case, Inputs, make_inputs
from attnproof.trials import JudgedCall

__all__ = ["Evidence", "Probe", "kinds_of"]

_KINDS = {
    "certain": "numeric",
    "probable-row": "numeric",
    "probable-output": "numeric",
    "bias": "numeric",
    "exception": "exception",
    "memory-fault": "exception",
    "crash": "crash",
    "timeout": "crash",
    "memory": "crash",
    "output-flood": "crash",
}


def kinds_of(rules: Iterable[str]) -> tuple[str, ...]:
    """The kind of each rule, in order, each once.

    "numeric", "exception" and "crash" gather several rules; any other rule is a kind of its own.
    """
    return tuple(dict.fromkeys(_KINDS.get(rule, rule) for rule in rules))


@dataclass(frozen=True, eq=False)
class Evidence:
    """A judged call that failed, with what is needed to make it again.

    Attributes:
        judged: the call, its verdict, and what it was judged by.
        invariant: name of the invariant that failed, "" for a plain call.
        history: calls that a fresh worker must make first for the failure to show.
    """

    judged: JudgedCall
    invariant: str = ""
    history: tuple[Case, ...] = ()

    @property
    def case(self) -> Case:
        """The case that was called; of its values only where :attr:`judged` has no inputs of its own."""
        return self.judged.case

    @property
    def inputs(self) -> Inputs:
        """The values that were handed over: those given, else the case's own."""
        return self.judged.inputs or make_inputs(self.judged.case)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that were broken, in the judge's order."""
        return tuple(failure.rule for failure in self.judged.event.failures)

    @property
    def kind(self) -> str:
        """What sort of failure this is.

        The invariant's name, else "numeric", "nonfinite", "empty-row", "shape", "exception", "crash",
        "mutation", "aliasing" or "determinism", by the first rule broken; "" where none was.
        """
        return self.invariant or next(iter(kinds_of(self.rules)), "")


class Probe(Protocol):
    """Judges one call of the kernel under search."""

    def __call__(
        self,
        case: Case,
        inputs: Inputs | None = None,
        *,
        history: Sequence[Case] = (),
        fresh: bool = False,
        repeat: bool | None = None,
    ) -> JudgedCall:
        """The verdict on ``case``, with ``inputs`` in place of its own values.

        With ``fresh`` or a ``history``, in a new worker process that has made the history's calls before.
        """
        ...
