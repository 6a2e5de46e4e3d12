"""From the errors of a formula to the budget of an output that is stored once."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnproof.properties.budgets.base import ASKED, Budget, broadcast_mask
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import LARGEST, Roundings
from attnproof.properties.contract import Contract

__all__ = ["sampled_budget", "stored_budget", "with_edges", "with_leaks"]

# Slack for the float64 evaluation of the budget itself.
_SLACK = 1.0 + 1e-6


def stored_budget(
    estimate: Estimate, exact: torch.Tensor, contract: Contract, dtype: str, closed: torch.Tensor
) -> Budget:
    """The budget of an estimate that a kernel stores once as an output of ``dtype``.

    Args:
        estimate, exact: the errors before storage, and the reference's value; of the output's shape.
        contract, dtype: what the kernel declares, and the name of the call's dtype.
        closed: bool, the output's shape; elements that are unjudged since they see a non-finite input.
    """
    r = Roundings.of(contract, dtype)
    # The last operations (a division, a scale) round equal results alike, however many terms were averaged.
    variance = estimate.spread + (3.0 * r.elementwise * exact).square() / 3.0
    stored = Propagation(r).store(Estimate(exact, estimate.certain, variance), "output")
    certain = stored.bound * _SLACK
    lost = torch.zeros_like(exact, dtype=torch.bool) if estimate.lost is None else estimate.lost.clone()
    lost = lost | ~certain.isfinite()
    lost = lost & ~closed
    largest = LARGEST[dtype]
    overflow = exact.abs() - certain > largest
    reasons = {
        "the row sees a non-finite input": int(closed.sum()),
        "an intermediate may overflow": int(lost.sum()),
    }
    return Budget(
        certain=certain,
        probable=torch.minimum(stored.spread.sqrt(), certain),
        open=closed | lost,
        overflow=overflow,
        either=(exact.abs() + certain > largest) & ~overflow,
        reasons={reason: count for reason, count in reasons.items() if count},
    )


def sampled_budget(
    estimate: Estimate,
    exact: torch.Tensor,
    contract: Contract,
    dtype: str,
    closed: torch.Tensor,
    unsampled: torch.Tensor,
) -> Budget:
    """The budget of an output of which some positions are not judged.

    Args:
        estimate, exact, contract, dtype, closed: as for :func:`stored_budget`.
        unsampled: bool, broadcastable to the output; elements of which ``exact`` says nothing.
    """
    if not bool(unsampled.any()):
        return stored_budget(estimate, exact, contract, dtype, closed)
    zero = torch.zeros_like(exact)
    known = Estimate(
        torch.where(unsampled, zero, exact),
        torch.where(unsampled, zero, estimate.bound),
        torch.where(unsampled, zero, estimate.spread),
        None if estimate.lost is None else estimate.lost & ~unsampled,
    )
    budget = stored_budget(known, torch.where(unsampled, zero, exact), contract, dtype, closed)
    left = unsampled & ~budget.open
    reasons = {**budget.reasons, "position not sampled": int(left.sum())}
    return replace(budget, open=budget.open | left, reasons={r: n for r, n in reasons.items() if n})


def with_edges(
    budget: Budget, contract: Contract, poisoned: torch.Tensor, tainted: torch.Tensor, keyless: torch.Tensor
) -> Budget:
    """What contract.md's edges leave open or ask literally, put into the budget of an output (B, H, M, E).

    Args:
        poisoned, keyless: bool (B, H, M), rows that see a non-finite input, or no key.
        tainted: bool (B, H), heads that hold a non-finite input, seen or not.
    """
    shape = tuple(budget.certain.shape)
    seen_bad = broadcast_mask(poisoned, shape)
    empty = broadcast_mask(keyless, shape) & ~seen_bad
    leaking = torch.zeros_like(empty)
    if contract.unseen_nonfinite == "may-leak":
        leaking = broadcast_mask(tainted, shape) & ~seen_bad
    asked = contract.empty_row
    undefined = empty & (asked == "undefined")
    reasons = {
        **budget.reasons,
        "an unseen key is non-finite and the kernel declares that it may leak": int(leaking.sum()),
        "the contract leaves rows without keys open": int(undefined.sum()),
    }
    return replace(
        budget,
        open=budget.open | leaking | undefined,
        literal={} if asked == "undefined" else {ASKED[asked]: empty & ~leaking},
        reasons={reason: count for reason, count in reasons.items() if count},
    )


def with_leaks(budget: Budget, contract: Contract, tainted: torch.Tensor) -> Budget:
    """The budget of an output, open where 0·NaN may leak and the contract declares it.

    Args:
        tainted: bool, the output's shape: elements whose sequence and head hold a non-finite key or value.
    """
    if contract.unseen_nonfinite != "may-leak":
        return budget
    leaking = tainted & ~budget.open
    reasons = {"an unseen key is non-finite and the kernel declares that it may leak": int(leaking.sum())}
    return replace(
        budget,
        open=budget.open | leaking,
        reasons={**budget.reasons, **{reason: count for reason, count in reasons.items() if count}},
    )
