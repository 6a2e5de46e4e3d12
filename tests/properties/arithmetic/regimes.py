"""Regimes of random float64 numbers, and the operations of an arithmetic as one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnproof.properties.arithmetic import Arithmetic

Draw = Callable[[torch.Generator, tuple[int, ...]], torch.Tensor]

FLOAT64 = torch.float64


def _normal(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=random, dtype=FLOAT64)


def _powers_of_two(random: torch.Generator, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
    exponents = torch.randint(low, high, shape, generator=random)
    return torch.ldexp(_normal(random, shape), exponents)


def _huge(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return _powers_of_two(random, shape, 960, 1021)


def _tiny(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return _powers_of_two(random, shape, -1020, -960)


def _subnormal(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-(2**20), 2**20, shape, generator=random).to(FLOAT64) * 2.0**-1074


def _wide(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return _powers_of_two(random, shape, -1040, 1018)


def _cancellation(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Neighbours along the last axis sum to a few units in the last place."""
    numbers = _normal(random, shape)
    half = shape[-1] // 2
    ulps = torch.randint(-3, 4, (*shape[:-1], half), generator=random).to(FLOAT64)
    numbers[..., half : 2 * half] = -numbers[..., :half] * (1 + ulps * 2.0**-52)
    return numbers


def _one_hot(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    hot = torch.randint(0, shape[-1], (*shape[:-1], 1), generator=random)
    return torch.zeros(shape, dtype=FLOAT64).scatter(-1, hot, 30.0 * _normal(random, (*shape[:-1], 1)))


def _ties(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Few distinct values with an odd last bit: equal maxima, and halfway cases of sums."""
    return torch.randint(-3, 4, shape, generator=random).to(FLOAT64) * (1 + 2.0**-52)


REGIMES: dict[str, Draw] = {
    "normal": _normal,
    "huge": _huge,
    "tiny": _tiny,
    "subnormal": _subnormal,
    "cancellation": _cancellation,
    "one-hot": _one_hot,
    "wide": _wide,
    "ties": _ties,
}

# Regimes in which attention's scores and their exponentials stay within float64.
MODERATE = ("normal", "tiny", "subnormal", "cancellation", "one-hot", "ties")

SCALE = -0.1234567890123456789


# Operations whose result is exact for exact arguments.
EXACT_OPERATIONS = ("relu", "step", "reshape", "permute")


def _matmul(arithmetic: Arithmetic[Any], a: Any, b: Any) -> Any:
    return arithmetic.matmul(a, arithmetic.transpose(b))


# name: (number of arguments, the operation); two-argument operations take (…, R, C) twice.
OPERATIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, lambda arithmetic, a, b: arithmetic.add(a, b)),
    "sub": (2, lambda arithmetic, a, b: arithmetic.sub(a, b)),
    "mul": (2, lambda arithmetic, a, b: arithmetic.mul(a, b)),
    "div": (2, lambda arithmetic, a, b: arithmetic.div(a, b)),
    "matmul": (2, _matmul),
    "scaled": (1, lambda arithmetic, a: arithmetic.scaled(a, SCALE)),
    "sum": (1, lambda arithmetic, a: arithmetic.sum(a)),
    "exp": (1, lambda arithmetic, a: arithmetic.exp(a)),
    "log": (1, lambda arithmetic, a: arithmetic.log(a)),
    "tanh": (1, lambda arithmetic, a: arithmetic.tanh(a)),
    "sigmoid": (1, lambda arithmetic, a: arithmetic.sigmoid(a)),
    "sigmoid_slope": (1, lambda arithmetic, a: arithmetic.sigmoid_slope(a)),
    "sqrt": (1, lambda arithmetic, a: arithmetic.sqrt(a)),
    "relu": (1, lambda arithmetic, a: arithmetic.relu(a)),
    "step": (1, lambda arithmetic, a: arithmetic.step(a)),
    "reshape": (1, lambda arithmetic, a: arithmetic.reshape(a, (-1, 2))),
    "permute": (1, lambda arithmetic, a: arithmetic.permute(a, (1, 0))),
}


def arguments(operation: str, regime: str, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Random arguments of one operation; a logarithm's and a square root's are positive."""
    random = torch.Generator().manual_seed(seed)
    drawn = [REGIMES[regime](random, shape) for _ in range(OPERATIONS[operation][0])]
    if operation in ("log", "sqrt"):
        return [a.abs().clamp(min=2.0**-1074) for a in drawn]
    return drawn


def softmax_attention(
    arithmetic: Arithmetic[Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[Any, Any]:
    """softmax(scale·q·kᵀ)·v and its log-sum-exp over the interface, each as a value of ``arithmetic``."""
    a = arithmetic
    scores = a.scaled(a.matmul(a.exact(q), a.transpose(a.exact(k))), scale)
    shift = a.exact(a.midpoint(scores).amax(-1, keepdim=True))
    weights = a.exp(a.sub(scores, shift))
    total = a.sum(weights)
    return a.div(a.matmul(weights, a.exact(v)), total), a.add(shift, a.log(total))
