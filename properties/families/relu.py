"""ReLU attention: o_i = Σ_j relu(scale · q_i·k_j)^power v_j / normalizer, power 1 or 2.

The derivative of relu at 0 is 0, as in PyTorch. Source: contract.md, "Calls"; Wortsman et al., arXiv
2309.08586, where the normaliser is the sequence length; squared ReLU after So et al., arXiv 2109.08668.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.contract import ContractError
from attnproof.properties.families.arguments import number
from attnproof.properties.families.pointwise import PointwiseFamily, PointwiseProblem

__all__ = ["RELU", "ReluProblem"]


@dataclass(frozen=True, eq=False)
class ReluProblem(PointwiseProblem):
    """One call of ReLU attention.

    Attributes:
        normalizer: divides the sum over keys.
        power: 1 or 2.
    """

    normalizer: float
    power: int

    @property
    def divisor(self) -> float:
        """The normaliser."""
        return self.normalizer

    def shifted(self, a: Arithmetic[V], s: V) -> V:
        """S; where all products of a score are 0, exactly 0, so that no radius hides the kink."""
        terms = (self.q != 0).double() @ (self.keys() != 0).double().mT
        return a.masked(s, terms > 0)

    def weights(self, a: Arithmetic[V], s: V) -> V:
        """relu(s)^power."""
        positive = a.relu(s)
        return a.mul(positive, positive) if self.power == 2 else positive

    def slopes(self, a: Arithmetic[V], s: V) -> V:
        """power · relu(s)^(power − 1); at 0 that is 0 for power 1 as well."""
        return a.scaled(a.relu(s), 2.0) if self.power == 2 else a.step(s)


class ReluFamily(PointwiseFamily):
    """``relu`` of the contract."""

    name = "relu"
    options = ("causal", "normalizer", "power")

    def problem(self, *tensors: torch.Tensor, **options: Any) -> ReluProblem:
        """Check the call and build the masks; q, k, v in layout bhnd."""
        fields = self.checked(tensors, options)
        normalizer = options.get("normalizer")
        divisor = 1.0 if normalizer is None else number("normalizer", normalizer)
        if divisor <= 0:
            raise ContractError(f"normalizer={normalizer!r}; the contract asks for a positive float, or None")
        power = options.get("power", 1)
        if isinstance(power, bool) or power not in (1, 2):
            raise ContractError(f"power={power!r}; the contract asks for 1 or 2")
        return ReluProblem(**fields, normalizer=divisor, power=int(power))


RELU = ReluFamily()
