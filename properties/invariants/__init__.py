"""Invariants: what ties the results of several calls of a kernel to one another in exact arithmetic.

``attnproof.invariance`` calls a kernel as they say, and judges it. A kernel that does not promise one names
it in its contract's ``without``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.invariants.base import (
    Balance,
    Bounds,
    Call,
    Invariant,
    Merge,
    Plan,
    Relation,
    Select,
    Term,
)
from attnproof.properties.invariants.isolation import ISOLATION
from attnproof.properties.invariants.rows import ROWS
from attnproof.properties.invariants.softmax import SYMMETRIES

__all__ = [
    "INVARIANTS",
    "Balance",
    "Bounds",
    "Call",
    "Invariant",
    "Merge",
    "Plan",
    "Relation",
    "Select",
    "Term",
    "check_names",
    "invariants_for",
]

_STATEMENTS = {
    "key-permutation": "permuting keys with their values changes nothing (theory.md EXA-5c)",
    "query-permutation": "permuting queries permutes the output (theory.md EXA-5c)",
    "score-shift": "a constant added to a row of scores leaves its output and shifts its log-sum-exp "
    "(theory.md EXA-5b)",
    "split-merge": "outputs over two parts of the keys, merged by their log-sum-exp, are the output over all "
    "(theory.md ONL-4)",
    "masked-padding": "keys that no row sees change nothing, whatever they hold (contract.md, The edges)",
    "key-duplication": "every key twice leaves the output and adds log 2 to the log-sum-exp "
    "(theory.md EXA-5f)",
    "batch-independence": "a batch entry alone gives what it gives in its batch "
    "(contract.md, batch_invariant)",
    "head-independence": "a head alone gives what it gives among the others (contract.md, Calls)",
    "row-independence": "rows alone give what they give among the others (contract.md, row_invariant)",
    "grouped-heads": "a key head shared by a group is that head repeated (contract.md, Calls)",
    "value-linearity": "the output is linear in v: that of v⁺ less that of v⁻ (theory.md EXA-5d)",
    "convex-hull": "an output lies between the smallest and the largest value seen (theory.md EXA-5a, LSE-1)",
    "ones": "with every value 1 the output is 1 (theory.md EXA-4)",
    "determinism": "the same tensors give the same bits, whatever was called in between "
    "(contract.md, deterministic)",
    "inputs-unmodified": "inputs in one storage are left as they are and give the same "
    "(contract.md, The edges)",
    "strides": "the same values in another memory layout give the same (contract.md, The edges)",
    "causal-future": "values after a position change nothing before it (contract.md, causality)",
    "length-padding": "lengths padded by keys and queries that nobody sees change nothing, "
    "whole tiles or not (contract.md, The edges)",
}

INVARIANTS: Mapping[str, Invariant] = {
    name: Invariant(
        name,
        statement,
        {
            family: recipes[name]
            for family, recipes in (
                ("softmax", {**SYMMETRIES, **ISOLATION}),
                ("logsumexp", ROWS),
                ("softmax_rows", ROWS),
            )
            if name in recipes
        },
    )
    for name, statement in _STATEMENTS.items()
}
"""All invariants by name."""


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names of a contract's ``without``, as a tuple.

    Raises:
        ContractError: for a name that no invariant has; the message lists those that there are.
    """
    given = tuple(names)
    for name in given:
        if name not in INVARIANTS:
            raise ContractError(f"without={name!r}: no such invariant; there are {', '.join(INVARIANTS)}")
    return given


def invariants_for(family: str, contract: Contract) -> tuple[Invariant, ...]:
    """The invariants of ``family`` that ``contract`` does not leave out.

    Raises:
        ContractError: where the contract leaves out what is no invariant.
    """
    without = check_names(contract.without)
    return tuple(
        invariant
        for name, invariant in INVARIANTS.items()
        if name not in without and family in invariant.recipes
    )
