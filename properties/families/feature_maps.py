"""Feature maps of linear attention over the abstract arithmetic, and their derivatives.

Sources: elu+1, Katharopoulos et al., arXiv 2006.16236 (theory LIN-1); 'taylor', Based, Arora et al.,
arXiv 2402.18668; 'squared', ReBased, Aksenov et al., arXiv 2402.10644 (theory LIN-6).
"""

from __future__ import annotations

import math

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.contract import ContractError

__all__ = ["FEATURE_MAPS", "feature_error", "feature_width", "mapped", "pulled"]

FEATURE_MAPS = ("elu1", "relu", "exp", "identity", "taylor", "squared")
_POLYNOMIAL = ("taylor", "squared")


def feature_width(name: str, width: int) -> int:
    """F for D = ``width``.

    Raises:
        ContractError: no such feature map.
    """
    if name not in FEATURE_MAPS:
        raise ContractError(
            f"feature_map={name!r}; the contract asks for one of {', '.join(map(repr, FEATURE_MAPS))}"
        )
    return {"taylor": 1 + width + width * width, "squared": width * width}.get(name, width)


def mapped(a: Arithmetic[V], name: str, x: V) -> V:
    """φ(x), (…, D) to (…, F).

    elu1: x + 1 for x > 0, else e^x; relu; exp; identity; taylor: (1, x D^(−1/4), vec(x xᵀ) (2D)^(−1/2)), so
    that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√D; squared: vec(x xᵀ).
    """
    if name == "identity":
        return x
    if name == "relu":
        return a.relu(x)
    if name == "exp":
        return a.exp(x)
    if name == "elu1":
        # e^x where x ≤ 0, and 1 + x elsewhere: the exponential of min(x, 0), whose value is 1 at 0.
        return a.add(a.exp(_negative(a, x)), a.relu(x))
    return _polynomial(a, name, x)


def pulled(a: Arithmetic[V], name: str, x: V, gradient: V, power: int) -> V:
    """The gradient by x of a gradient by φ(x), (…, F) to (…, D).

    Args:
        a: the arithmetic.
        name: of the feature map.
        x: (…, D).
        gradient: (…, F).
        power: 0; or 1 or 2 where ``gradient`` holds sums of absolute values or squares, as the result does.
    """
    if name == "identity":
        return gradient
    if name in _POLYNOMIAL:
        return _pulled_polynomial(a, name, x, gradient, power)
    if name == "relu":
        slope = a.step(x)
    elif name == "exp":
        slope = a.exp(x)
    else:
        slope = a.exp(_negative(a, x))
    return a.mul(gradient, a.mul(slope, slope) if power == 2 else slope)


def _negative(a: Arithmetic[V], x: V) -> V:
    """The smaller of x and 0."""
    return a.scaled(a.relu(a.scaled(x, -1.0)), -1.0)


def _constants(a: Arithmetic[V], name: str, width: int) -> tuple[V, V]:
    """Factors of the linear and the quadratic features, shape (1,)."""
    if name == "squared":
        return a.exact(torch.zeros(1)), a.exact(torch.ones(1))
    size = a.exact(torch.tensor([float(width)], dtype=torch.float64))
    one = a.exact(torch.ones(1))
    return a.div(one, a.sqrt(a.sqrt(size))), a.div(one, a.sqrt(a.scaled(size, 2.0)))


def _places(name: str, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """0/1 matrices that put 1, x and vec(x xᵀ) where φ has them: (1, F), (D, F), (D², F)."""
    full = feature_width(name, width)
    first = 1 + width if name == "taylor" else 0
    one, linear = torch.zeros(1, full), torch.zeros(width, full)
    if name == "taylor":
        one[0, 0] = 1.0
        linear[:, 1:first] = torch.eye(width)
    quadratic = torch.zeros(width * width, full)
    quadratic[:, first:] = torch.eye(width * width)
    return one, linear, quadratic


def _polynomial(a: Arithmetic[V], name: str, x: V) -> V:
    shape = a.shape(x)
    lead, width = shape[:-1], shape[-1]
    square = a.mul(a.reshape(x, (*lead, width, 1)), a.reshape(x, (*lead, 1, width)))
    square = a.reshape(square, (*lead, width * width))
    if name == "squared":
        return square
    by_x, by_square = _constants(a, name, width)
    one, linear, quadratic = (a.exact(place) for place in _places(name, width))
    result = a.add(a.matmul(a.mul(x, by_x), linear), a.matmul(a.mul(square, by_square), quadratic))
    return a.add(result, a.reshape(one, (1,) * len(lead) + (feature_width(name, width),)))


def _pulled_polynomial(a: Arithmetic[V], name: str, x: V, gradient: V, power: int) -> V:
    """Σ_b (G_ab + G_ba) x_b times the constant, and the linear part."""
    shape = a.shape(x)
    lead, width = shape[:-1], shape[-1]
    if power:
        x = a.exact(a.midpoint(x).abs() ** power)
    by_x, by_square = _constants(a, name, width)
    if power == 2:
        by_x, by_square = a.mul(by_x, by_x), a.mul(by_square, by_square)
    linear, square = None, gradient
    if name == "taylor":
        _, to_x, to_square = (a.exact(place.mT) for place in _places(name, width))
        linear = a.mul(a.matmul(gradient, to_x), by_x)
        square = a.mul(a.matmul(gradient, to_square), by_square)
    square = a.reshape(square, (*lead, width, width))
    both = a.add(square, a.transpose(square))
    found = a.reshape(a.matmul(both, a.reshape(x, (*lead, width, 1))), (*lead, width))
    return found if linear is None else a.add(found, linear)


def feature_error(name: str, size: float, exp: float, unit: float) -> float:
    """Relative error of one feature as a kernel computes it.

    Args:
        name: of the feature map.
        size: the largest |x|.
        exp: relative error of one exponential; unit: unit roundoff of elementwise operations.
    """
    if name in ("identity", "relu"):
        return 0.0
    if name in _POLYNOMIAL:
        return 4.0 * unit
    return exp + 2.0 * unit * min(size, math.log(3.5e38)) + 2.0 * unit
