"""Regimes of inputs, and the plan of cases that a run goes through.

``REGIMES`` has every regime by name; ``plan`` chooses cases for a kernel.
"""

from attnproof.properties.regimes.attention import ATTENTION
from attnproof.properties.regimes.edges import EDGES
from attnproof.properties.regimes.levels import LEVELS
from attnproof.properties.regimes.real import REAL
from attnproof.properties.regimes.regime import Builder, Regime, RegimeClass, merged
from attnproof.properties.regimes.rows import ROWS
from attnproof.properties.regimes.scans import SCANS
from attnproof.properties.regimes.scores import SCORES
from attnproof.properties.regimes.states import STATES

REGIMES: dict[str, Regime] = merged(ATTENTION, EDGES, ROWS, REAL, SCORES, STATES, SCANS, LEVELS)

from attnproof.properties.regimes.planning import SIZES, plan  # noqa: E402  (the planner is written in terms of REGIMES)

__all__ = ["REGIMES", "SIZES", "Builder", "Regime", "RegimeClass", "plan"]
