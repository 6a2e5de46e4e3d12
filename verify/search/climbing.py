"""Random structure, and the climb from it: Hypothesis draws cases and moves them towards the budget's edge.

``target()`` is told how near each case came to failing; Hypothesis draws at random for the first half of a
round and climbs from the best case of that round in the second. Rounds of different seeds follow one another
until the search ends, so that no single summit keeps it. Hypothesis neither shrinks nor stores here:
shrinking goes on in :mod:`attnproof.search.shrinking` down to single tensor entries, which a strategy of
cases does not hold, and failures of planned cases, which no strategy drew, are stored beside its own
(:mod:`attnproof.search.known`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings, target

from attnproof.properties.case import Case
from attnproof.properties.strategies import cases
from attnproof.reports.record import CaseJudged
from attnproof.trials import Subject

__all__ = ["Stopped", "climb", "nearness"]

# Examples of a round: half at random, then the climb.
_ROUND = 60


class Stopped(BaseException):
    """The search ended while Hypothesis was at work.

    Not an Exception, which Hypothesis would take for a failure of the test.
    """


def nearness(event: CaseJudged) -> float:
    """How near a case came to failing: its largest error over a budget or statistic over a threshold."""
    ratios = [max(n.worst_certain, n.worst_threshold) for n in event.outputs.values()]
    return max(ratios, default=0.0)


def climb(subject: Subject, first_seed: int, judge: Callable[[Case], CaseJudged]) -> None:
    """Draw cases for a kernel and climb, until ``judge`` raises :class:`Stopped`.

    ``judge`` judges one case and is called from this thread only.
    """
    contract = subject.contract
    strategy = cases(
        contract.family,
        dtypes=contract.dtypes,
        options=subject.options,
        supports=contract.supports,
        causal_alignment=contract.causal_alignment,
    )
    for number in itertools.count():
        chosen = settings(
            max_examples=_ROUND,
            phases=(Phase.generate, Phase.target),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

        @seed(first_seed + number)
        @chosen
        @given(strategy)
        def step(case: Case) -> None:
            near = nearness(judge(case))
            # Ratios grow over many magnitudes and 0 is common: climb their logarithm, from a floor.
            target(math.log10(min(max(near, 1e-6), 1e6)), label="error over budget")

        run: Callable[[], Any] = step
        run()
