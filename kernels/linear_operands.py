"""Linear attention as one sum, and what stands in its places: o and every gradient are rows of one table.

    out_i = Σ_j (x_i·y_j) v_j + x_i S,   S the state before the first of these j

| result | x_i | y_j | v_j | S | order |
|---|---|---|---|---|---|
| o_i, over d_i | φ(q_i) | φ(k_j) | v_j | Σ φ(k) vᵀ | forward |
| dφ(q_i) | dO_i / d_i, r_i | v_j, 1 | φ(k_j) | the same, transposed | forward |
| dφ(k_i) | v_i, 1 | dO_j / d_j, r_j | φ(q_j) | Σ φ(q) (dO / d)ᵀ, transposed | reverse |
| dv_i | φ(k_i) | φ(q_j) / d_j | dO_j | the same | reverse |

d_i = φ(q_i)·z_i is the normaliser, which is what a further value of 1 beside v_j gives: its cotangent
r_i = −dO_i·o_i / d_i stands beside dO_i / d_i. Without a normaliser d is 1 and r is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attnproof.kernels.feature_maps import identity

__all__ = ["COLUMN", "NONE", "ROW", "Operand", "Output", "States"]

# Which side of a weight the normaliser and its cotangent belong to.
NONE, ROW, COLUMN = 0, 1, 2


class Operand(NamedTuple):
    """A tensor (B,H,N,W) of any strides, and the map that a kernel applies to its entries."""

    tensor: torch.Tensor
    map: Any = identity


class States(NamedTuple):
    """S (…,H,K,V) and z (…,H,K), float32 and contiguous; z is None without a normaliser."""

    state: torch.Tensor | None
    z: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Output:
    """What is special about one row of the table.

    Attributes:
        reverse: a row takes from itself and what follows it, where ``causal`` is set at all.
        side: ROW or COLUMN, where d and r stand; NONE in the forward pass.
        transposed: states are read with their axes exchanged, and z beside the values.
        normaliser: (B,H,N) float32, to divide by and to fill; None for no normaliser.
        d, r: (B,H,N) float32, contiguous, or None.
        gate: the tensor whose slope multiplies the output, and that slope; None for no slope.
    """

    reverse: bool = False
    side: int = NONE
    transposed: bool = False
    normaliser: torch.Tensor | None = None
    d: torch.Tensor | None = None
    r: torch.Tensor | None = None
    gate: Operand | None = None
