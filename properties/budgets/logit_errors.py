"""Errors of logits of which there is one a position, before any maximum or decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnproof.properties.budgets.propagation import coincidence
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth

__all__ = ["LOG2E", "LogitErrors"]

LOG2E = 1.0 / math.log(2.0)
"""What a kernel that works with exp2 multiplies logits by."""


@dataclass(frozen=True, eq=False)
class LogitErrors:
    """Errors of the logits themselves, float64 (B, H, N).

    Attributes:
        certain, variance: of s.
        lost: bool, where an intermediate may overflow.
    """

    certain: torch.Tensor
    variance: torch.Tensor
    lost: torch.Tensor

    @classmethod
    def of_products(cls, q: torch.Tensor, k: torch.Tensor, scale: float, r: Roundings) -> LogitErrors:
        """Of scale · q·k for q (1, H, 1, D) and k (B, H, N, D), as ``budgets.softmax`` has them."""
        q, k, width, factor = q.double(), k.double(), q.shape[-1], abs(scale)
        products = q * k
        size, s = products.abs().sum(-1), products.sum(-1) * scale
        operands = (1.0 + max(r.operand, r.input)) ** 2 - 1.0
        dot = operands + growth(width + 2.0, r.accumulate) * (1.0 + operands)
        tiny = r.operand_tiny * max(1.0, factor if r.input else math.sqrt(factor))
        error = torch.where(size == 0, 0.0, factor * dot * size)
        error = error + tiny * (q.abs().sum(-1) + k.abs().sum(-1))
        error = error + (r.accumulate_tiny * (width + 2.0) + 4.0 * r.scores_tiny) * (1.0 + factor)
        error = error + (4.0 * r.elementwise + 4.0 * r.scores) * s.abs()
        square, u = products.square().sum(-1), max(r.operand, r.input)
        sums = (2.0**-23 * width / 2.0 * size).square()
        if not r.truncated:
            total = products.sum(-1).square()
            sums = r.accumulate**2 * MEAN_SQUARE * width * (square / 2.0 + total / 3.0)
            # Equal products make partial sums whose roundings add up.
            alike = coincidence(products, r.accumulate)[..., 0]
            sums = sums + alike * (r.accumulate * width / 2.0 * products.sum(-1)).square() * MEAN_SQUARE
        variance = scale**2 * (sums + u * u * MEAN_SQUARE * square)
        variance = variance + MEAN_SQUARE * (2.0 * r.scores * s).square()
        high = torch.maximum(size, size * factor * LOG2E) >= r.largest / 2.0
        return cls(error, variance, high | (s.abs() * LOG2E >= r.scores_largest / 2.0))

    @classmethod
    def of_keys(cls, k: torch.Tensor, r: Roundings) -> LogitErrors:
        """Of keys (B, H, N) that are logits themselves."""
        s = k.double()
        lost = s.abs() * LOG2E >= r.scores_largest / 2.0
        return cls(2.0 * r.scores * s.abs(), MEAN_SQUARE * (r.scores * s).square(), lost)
