"""attnproof: proves an attention kernel right, or shows the smallest input on which it is wrong.

Public names, handed on lazily so that importing one does not import everything:

* :func:`reference` – exact outputs of a family as enclosures (value and proved radius);
* :func:`check` – one case through one kernel; :func:`verify` – a kernel through a planned set of cases;
* :func:`fuzz` – a search for the smallest input on which a kernel is wrong;
* :func:`emulate` – a context in which Triton kernels run on CPU tensors as they would on a GPU;
* :func:`cases` – a Hypothesis strategy of cases; :class:`Case`, :func:`make_inputs`;
* :class:`Contract`, :class:`Precision`, :class:`Supports`, :func:`promises` – what a kernel declares;
* :class:`Enclosure`, :class:`ContractError`, :class:`CaseError`, :class:`TargetError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnproof.emulator import EmulationError, MemoryFault, emulate
    from attnproof.interface import CheckResult, FuzzResult, VerifyResult, check, fuzz, verify
    from attnproof.properties.arithmetic.base import Enclosure
    from attnproof.properties.case import Case, CaseError, make_inputs
    from attnproof.properties.contract import Contract, ContractError, Precision, Supports, promises
    from attnproof.properties.oracle import CertificationError, reference
    from attnproof.properties.strategies import cases
    from attnproof.targets import TargetError

_HOME = {
    "EmulationError": "attnproof.emulator",
    "MemoryFault": "attnproof.emulator",
    "emulate": "attnproof.emulator",
    "CheckResult": "attnproof.interface",
    "VerifyResult": "attnproof.interface",
    "FuzzResult": "attnproof.interface",
    "check": "attnproof.interface",
    "fuzz": "attnproof.interface",
    "verify": "attnproof.interface",
    "Enclosure": "attnproof.properties.arithmetic.base",
    "Case": "attnproof.properties.case",
    "CaseError": "attnproof.properties.case",
    "make_inputs": "attnproof.properties.case",
    "Contract": "attnproof.properties.contract",
    "ContractError": "attnproof.properties.contract",
    "Precision": "attnproof.properties.contract",
    "Supports": "attnproof.properties.contract",
    "promises": "attnproof.properties.contract",
    "CertificationError": "attnproof.properties.oracle",
    "reference": "attnproof.properties.oracle",
    "cases": "attnproof.properties.strategies",
    "TargetError": "attnproof.targets",
}

__all__ = [
    "Case",
    "CaseError",
    "CertificationError",
    "CheckResult",
    "Contract",
    "ContractError",
    "EmulationError",
    "Enclosure",
    "FuzzResult",
    "MemoryFault",
    "Precision",
    "Supports",
    "TargetError",
    "VerifyResult",
    "cases",
    "check",
    "emulate",
    "fuzz",
    "make_inputs",
    "promises",
    "reference",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnproof' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
