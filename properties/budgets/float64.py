"""Formulas of the abstract arithmetic in plain float64, for budgets, which need no proof of their digits."""

from __future__ import annotations

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure

__all__ = ["Float64"]


class Float64(Arithmetic[torch.Tensor]):
    """float64 tensors, each operation rounded as torch rounds it."""

    name = "plain float64"

    def exact(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double()

    def shape(self, a: torch.Tensor) -> tuple[int, ...]:
        return tuple(a.shape)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def div(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a / b

    def scaled(self, a: torch.Tensor, factor: float) -> torch.Tensor:
        return a * factor

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def transpose(self, a: torch.Tensor) -> torch.Tensor:
        return a.mT

    def sum(self, a: torch.Tensor) -> torch.Tensor:
        return a.sum(-1, keepdim=True)

    def exp(self, a: torch.Tensor) -> torch.Tensor:
        return torch.exp(a)

    def log(self, a: torch.Tensor) -> torch.Tensor:
        return torch.log(a)

    def log1p(self, a: torch.Tensor) -> torch.Tensor:
        return torch.log1p(a)

    def tanh(self, a: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a)

    def sigmoid(self, a: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(a)

    def sigmoid_slope(self, a: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(a) * torch.sigmoid(-a)

    def sqrt(self, a: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(a)

    def relu(self, a: torch.Tensor) -> torch.Tensor:
        return a.clamp(min=0.0)

    def step(self, a: torch.Tensor) -> torch.Tensor:
        return (a > 0).double()

    def reshape(self, a: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return a.reshape(shape)

    def permute(self, a: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return a.permute(axes)

    def masked(self, a: torch.Tensor, keep: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        return torch.where(keep, a, fill)

    def midpoint(self, a: torch.Tensor) -> torch.Tensor:
        return a

    def enclosure(self, a: torch.Tensor) -> Enclosure:
        """The value as if it were exact."""
        return Enclosure(a, torch.zeros_like(a))
