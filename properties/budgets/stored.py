"""From the errors of a formula to the budget of an output that is stored once."""

from __future__ import annotations

import torch

from attnproof.properties.budgets.base import Budget
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import LARGEST, Roundings
from attnproof.properties.contract import Contract

__all__ = ["stored_budget"]

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
