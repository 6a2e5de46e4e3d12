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
    Recipe,
    Relation,
    Select,
    Term,
)
from attnproof.properties.invariants.easy import EASY
from attnproof.properties.invariants.gradients import EASY_GRADIENTS, GRADIENTS
from attnproof.properties.invariants.isolation import ISOLATION
from attnproof.properties.invariants.rows import ROWS
from attnproof.properties.invariants.scores import OWN
from attnproof.properties.invariants.softmax import SYMMETRIES
from attnproof.properties.invariants.states import STATES

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
    "gradient-linearity": "gradients are linear in the cotangent: g(a) + g(b) = g(a + b)",
    "score-shift-gradient": "rows of dS sum to 0, since a shift of a row changes nothing (theory.md EXA-5b)",
    "unseen-gradient": "keys that no query sees, and queries that see no key, have gradients of exactly 0 "
    "(contract.md, The edges)",
    "one-hot-value-gradient": "a row with all weight on one key gives its dO to that key's dv, and "
    "nothing to q and k",
    "block-additivity": "outputs over two parts of the keys, dealt in any order, add up (theory.md SIG-9)",
    "saturated-slope": "where σ rounds to 1 its slope is still e^−x/(1 + e^−x)², not 0 (bugs B63)",
    "bias-norm": "at scores of 0 the output is n/(n + 1) times the mean value with bias −log n, n/2 times it "
    "with bias 0 (theory.md SIG-3)",
    "positive-homogeneity": "q times 2 gives the output times 2^power",
    "score-linearity": "the output is linear in the learned scores (theory.md EASY-2)",
    "common-shift": "one vector added to all queries and keys changes nothing (theory.md PD-2)",
    "constant-windows": "windows of equal keys are windows of one key (theory.md PD-3)",
    "equal-halves": "two equal attentions with λ = 1 cancel (Ye et al. 2024)",
    "lambda-linearity": "the output is affine in λ (Ye et al. 2024)",
    "packed-sequences": "a packed sequence gives what it gives alone (contract.md, Calls)",
    "zero-state": "an initial state of 0 is none (contract.md, Calls)",
    "closed-gate": "after a gate of 0 nothing earlier is remembered (theory.md GLA-1)",
}

_LEFT_ALONE = ("determinism", "inputs-unmodified", "strides")
_ATTENTION = (
    *("key-permutation", "query-permutation", "value-linearity", *_LEFT_ALONE),
    *("batch-independence", "head-independence", "row-independence", "grouped-heads", "length-padding"),
    *("gradient-linearity",),
)
_MASKED = ("masked-padding", "causal-future", "unseen-gradient")
# Weights that are positive and add up to 1, of scores that may be shifted.
_SOFTMAX_LIKE = ("score-shift", "convex-hull", "ones", "score-shift-gradient")
_GENERIC: Mapping[str, tuple[str, ...]] = {
    "softmax": (*SYMMETRIES, *ISOLATION, *GRADIENTS),
    "sigmoid": (*_ATTENTION, *_MASKED),
    "relu": (*_ATTENTION, *_MASKED),
    "batch_normalised": (*_ATTENTION, *_SOFTMAX_LIKE, "key-duplication"),
    # Its keys have places; permuted within windows in a way of its own.
    "scaled_head": tuple(name for name in (*_ATTENTION, *_SOFTMAX_LIKE) if name != "key-permutation"),
    # Not in the hull of its values: weights may be negative.
    "differential": (
        *(*_ATTENTION, *_MASKED, "key-duplication"),
        *(name for name in _SOFTMAX_LIKE if name != "convex-hull"),
    ),
    "easy": _LEFT_ALONE,
}
_ALONG = ("batch-independence", "causal-future", "value-linearity", "length-padding", "determinism")
_CARRIED = (*_ALONG, "packed-sequences", "zero-state")
# Retention's decay is another for each head, so that no head can be alone.
_OF_STATES: Mapping[str, tuple[str, ...]] = {
    "linear": (*_CARRIED, "head-independence"),
    "gated_linear": (*_CARRIED, "head-independence", "closed-gate"),
    "retention": _CARRIED,
    "rwkv6": (*_CARRIED, "head-independence", "closed-gate"),
    "mlstm": (*_CARRIED, "head-independence", "closed-gate"),
    "delta": (*_CARRIED, "head-independence", "closed-gate"),
    "ssm": (*_CARRIED, "head-independence"),
    "selective_scan": (*_CARRIED, "head-independence"),
    # Heads of a group read one key.
    "ssd": _CARRIED,
    "h3": (*_ALONG, "head-independence"),
    "prefix_scan": (*_ALONG, "head-independence", "zero-state"),
    "rwkv4": (*_ALONG, "head-independence", "zero-state"),
}
_ALL = {**SYMMETRIES, **ISOLATION, **GRADIENTS}
_RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "logsumexp": ROWS,
    "softmax_rows": ROWS,
    **{
        family: {
            **{name: _ALL[name] for name in names},
            **OWN.get(family, {}),
            **({**EASY, **EASY_GRADIENTS} if family == "easy" else {}),
        }
        for family, names in _GENERIC.items()
    },
    **{
        family: {
            **{name: SYMMETRIES[name] for name in ("inputs-unmodified", "strides")},
            **{name: STATES[name] for name in names},
            "gradient-linearity": GRADIENTS["gradient-linearity"],
        }
        for family, names in _OF_STATES.items()
    },
}

INVARIANTS: Mapping[str, Invariant] = {
    name: Invariant(
        name,
        statement,
        {family: recipes[name] for family, recipes in _RECIPES.items() if name in recipes},
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
