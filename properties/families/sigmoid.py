"""Sigmoid attention: o_i = Σ_j σ(scale · q_i·k_j + b) v_j, b = −log N unless it is given.

N counts all keys of the call, whatever a causal mask hides: a Python float cannot follow the rows. −log N is
the real number; a kernel holds it, as it holds a given b, in the precision in which it adds (theory SIG-3).
Source: contract.md, "Calls"; Ramapuram et al., arXiv 2409.04431. dS = σ'(S) ∘ dP with σ' = σ(1 − σ), which
loses its digits where σ rounds to 1 (bugs B63).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.families.arguments import number
from attnproof.properties.families.pointwise import PointwiseFamily, PointwiseProblem

__all__ = ["SIGMOID", "SigmoidProblem"]


@dataclass(frozen=True, eq=False)
class SigmoidProblem(PointwiseProblem):
    """One call of sigmoid attention.

    Attributes:
        bias: added to every scaled score, or None for −log ``length``.
        length: N, the number of keys of the call, also where a part of it holds fewer.
    """

    bias: float | None
    length: int

    def shifted(self, a: Arithmetic[V], s: V) -> V:
        """S + b. The minus sign is a factor: budgets take factors for constants that a kernel rounds."""
        if self.bias is not None:
            b = a.exact(torch.tensor(-self.bias, dtype=torch.float64))
        else:
            b = a.log(a.exact(torch.tensor(float(max(self.length, 1)), dtype=torch.float64)))
        return a.add(s, a.scaled(b, -1.0))

    def weights(self, a: Arithmetic[V], s: V) -> V:
        """σ(s)."""
        return a.sigmoid(s)

    def slopes(self, a: Arithmetic[V], s: V) -> V:
        """σ'(s) = σ(s)(1 − σ(s))."""
        return a.sigmoid_slope(s)


class SigmoidFamily(PointwiseFamily):
    """``sigmoid`` of the contract."""

    name = "sigmoid"
    options = ("bias", "causal")

    def problem(self, *tensors: torch.Tensor, **options: Any) -> SigmoidProblem:
        """Check the call and build the masks; q, k, v in layout bhnd."""
        fields = self.checked(tensors, options)
        bias = options.get("bias")
        return SigmoidProblem(
            **fields, bias=None if bias is None else number("bias", bias), length=fields["k"].shape[2]
        )


SIGMOID = SigmoidFamily()
