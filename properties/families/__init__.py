"""The families of the contract.

One module each, with the exact definition written once over an abstract arithmetic.
"""

from __future__ import annotations

from attnproof.properties.contract import ContractError
from attnproof.properties.families.base import Budget, Family, Problem, Reference
from attnproof.properties.families.batch_normalised import BATCH_NORMALISED
from attnproof.properties.families.delta import DELTA
from attnproof.properties.families.differential import DIFFERENTIAL
from attnproof.properties.families.easy import EASY
from attnproof.properties.families.gated_linear import GATED_LINEAR
from attnproof.properties.families.h3 import H3
from attnproof.properties.families.linear import LINEAR
from attnproof.properties.families.logsumexp import LOGSUMEXP
from attnproof.properties.families.mlstm import MLSTM
from attnproof.properties.families.prefix_scan import PREFIX_SCAN
from attnproof.properties.families.relu import RELU
from attnproof.properties.families.retention import RETENTION
from attnproof.properties.families.rwkv4 import RWKV4
from attnproof.properties.families.rwkv6 import RWKV6
from attnproof.properties.families.scaled_head import SCALED_HEAD
from attnproof.properties.families.selective_scan import SELECTIVE_SCAN
from attnproof.properties.families.sigmoid import SIGMOID
from attnproof.properties.families.softmax import SOFTMAX
from attnproof.properties.families.softmax_rows import SOFTMAX_ROWS
from attnproof.properties.families.ssd import SSD
from attnproof.properties.families.ssm import SSM

__all__ = ["FAMILIES", "Budget", "Family", "Problem", "Reference", "family_of"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LOGSUMEXP,
        SOFTMAX_ROWS,
        SOFTMAX,
        SIGMOID,
        RELU,
        BATCH_NORMALISED,
        SCALED_HEAD,
        DIFFERENTIAL,
        EASY,
        LINEAR,
        GATED_LINEAR,
        RETENTION,
        RWKV6,
        MLSTM,
        DELTA,
        SSM,
        H3,
        SELECTIVE_SCAN,
        SSD,
        PREFIX_SCAN,
        RWKV4,
    )
}


def family_of(name: str) -> Family:
    """The family called ``name``.

    Raises:
        ContractError: if there is none; the message lists the names.
    """
    if name not in FAMILIES:
        raise ContractError(f"family={name!r}: no such family; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
