"""What a budget is, whatever the family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from attnproof.properties.contract import ContractError

__all__ = ["ASKED", "EXP_OVERFLOW", "EXP_UNDERFLOW", "Budget", "broadcast_mask", "dtype_name"]

# exp overflows float32 above the first, and is below its smallest subnormal number under the second
# (theory.md, Formats).
EXP_OVERFLOW, EXP_UNDERFLOW = 88.73, -103.98

ASKED = {"zero": 0.0, "nan": math.nan, "-inf": -math.inf, "+inf": math.inf}
"""What a row without keys must give, by the contract's names; "undefined" asks nothing."""

_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


def dtype_name(dtype: torch.dtype, argument: str = "dtype") -> str:
    """The contract's name of a torch dtype.

    Raises:
        ContractError: for a dtype that no family takes.
    """
    if dtype not in _NAMES:
        raise ContractError(
            f"{argument} has dtype {dtype}; the contract asks for one of {', '.join(_NAMES.values())}"
        )
    return _NAMES[dtype]


@dataclass(frozen=True, eq=False)
class Budget:
    """How far a correct kernel of a declared precision may be from the exact output, element by element.

    Attributes:
        certain: float64, the output's shape; no algorithm whose roundings are among the declared ones errs by
            more.
        probable: float64, the output's shape; estimated standard deviation of a healthy kernel's error.
        open: bool, the output's shape; elements that the contract leaves unjudged, whatever is returned.
        overflow: bool, elements where ±inf of the reference's sign is expected.
        either: bool, elements so near the largest number that both it and ±inf are right.
        literal: elements of which one value (0, nan, ±inf) is asked, whatever the formula: value → bool mask.
        reasons: number of open elements by reason.
    """

    certain: torch.Tensor
    probable: torch.Tensor
    open: torch.Tensor
    overflow: torch.Tensor
    either: torch.Tensor
    literal: Mapping[float, torch.Tensor] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)


def broadcast_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``mask`` over rows, expanded along the trailing axes of ``shape``."""
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)
