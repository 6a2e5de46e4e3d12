"""Softmax attention as a kernel smoother on the sphere: bias and variance for every window, exact and drawn.

Points x_i are uniform on the sphere in ℝ^d, y_i = f(x_i) + noise of variance σ², and the prediction at q is
Σ y_i e^(w x_i·q) / Σ e^(w x_i·q). As n grows the squared error is bias²(w) + σ² R(w)/n, and for classes of
functions that are closed under rotations both are functions of w alone (derived; setting of Collins et al.,
arXiv 2402.11639).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

__all__ = [
    "BIASES",
    "affine",
    "best_log_width",
    "cone",
    "mean_direction",
    "optimal_width",
    "rectified",
    "rectified_spectrum",
    "sphere",
    "variance_factor",
    "width_formula",
    "window_curves",
]

Floats = NDArray[np.float64]
Bias = Callable[[int, float], float]

DEGREES = 14000
"""Harmonics of the rectified class: 12 √w of them matter, for w up to 10^6."""


def mean_direction(d: int, w: float) -> float:
    """r = E x·q under weights e^(w x·q): I_(d/2)(w)/I_(d/2−1)(w)."""
    return float(special.ive(d / 2, w) / special.ive(d / 2 - 1, w))


def variance_factor(d: int, w: float) -> float:
    """R = E e^(2 w t)/(E e^(w t))² for t = x·q; n Σ p_i² tends to it."""
    order = d / 2 - 1
    scale = w**order / (4**order * special.gamma(order + 1))
    return float(scale * special.ive(order, 2 * w) / special.ive(order, w) ** 2)


def affine(d: int, w: float) -> float:
    """Mean squared bias of f = a·x, |a| = 1 in a random direction: (1 − r)²/d."""
    return (1 - mean_direction(d, w)) ** 2 / d


@cache
def rectified_spectrum(d: int, degrees: int = DEGREES) -> Floats:
    """Mean squares of ReLU(a·x)'s spherical harmonics of degree 0, 1, …; their sum is 1/(2d).

    Coefficients by λ_(l+2)/λ_l = −(l − 1)/(l + d + 1) (from Rodrigues' formula) and E t₊, E t₊², E t₊³.
    """
    density = special.gamma(d / 2) / (2 * np.sqrt(np.pi))
    coefficient = np.zeros(degrees + 1)
    coefficient[0] = density / special.gamma((d + 1) / 2)
    coefficient[1] = 1 / (2 * d)
    coefficient[2] = (d * density / special.gamma((d + 3) / 2) - coefficient[0]) / (d - 1)
    for even in range(2, degrees - 1, 2):
        coefficient[even + 2] = -coefficient[even] * (even - 1) / (even + d + 1)
    l = np.arange(1, degrees + 1)
    harmonics = np.ones(degrees + 1)
    # Number of harmonics of degree l in ℝ^d; on the circle it is 2, where the formula is 0/0.
    log_count = special.gammaln(l + d - 2) - special.gammaln(l + 1) - special.gammaln(max(d - 2, 1))
    harmonics[1:] = 2 if d == 2 else (2 * l + d - 2) / (d - 2) * np.exp(log_count)
    return coefficient**2 * harmonics


def rectified(d: int, w: float) -> float:
    """Mean squared bias of f = ReLU(a·x): Σ_l power_l (1 − A_l)², A_l = I_(ν+l)(w)/I_ν(w) (Funk–Hecke)."""
    power = rectified_spectrum(d)
    kept = power[: min(DEGREES, int(12 * np.sqrt(w)) + 20) + 1]
    l = np.flatnonzero(kept)
    order = d / 2 - 1
    damped = special.ive(order + l, w) / special.ive(order, w)
    beyond = max(0.0, 1 / (2 * d) - float(kept.sum()))
    return float((kept[l] * (1 - damped) ** 2).sum()) + beyond


def cone(d: int, w: float) -> float:
    """Squared bias of f = |x − q|, which has Lipschitz constant 1 and is the worst at q: (E |x − q|)².

    Gauss–Laguerre in u = w(1 − t) with 60 nodes; w ≥ 200 keeps them all on the sphere.

    Raises:
        ValueError: w < 200.
    """
    if w < 200:
        raise ValueError(f"w={w}: the quadrature reaches beyond the sphere below 200")

    def integral(power: float) -> float:
        nodes, weights = special.roots_genlaguerre(60, power)
        return float(((2 - nodes / w) ** ((d - 3) / 2) * weights).sum())

    # |x − q| = √(2u/w) goes into the weight, as the rule converges slowly for a root.
    return 2 / w * (integral((d - 2) / 2) / integral((d - 3) / 2)) ** 2


BIASES: dict[str, Bias] = {"affine": affine, "rectified": rectified, "cone at the query": cone}


def optimal_width(
    bias: Bias, d: int, samples: float, signal: float = 1.0, between: tuple[float, float] = (5, 2e6)
) -> float:
    """The w that makes signal · bias²(w) + R(w)/samples least.

    Args:
        bias: mean squared, for Lipschitz constant 1.
        d: of the space around the sphere.
        samples: n.
        signal: L²/σ².
        between: least and largest w.
    """

    def loss(x: float) -> float:
        return float(np.log(signal * bias(d, np.exp(x)) + variance_factor(d, np.exp(x)) / samples))

    ends = (float(np.log(between[0])), float(np.log(between[1])))
    found = optimize.minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


def width_formula(d: int, samples: float, signal: float) -> float:
    """[(d − 1) n L²/(d c_d σ²)]^(2/(d+3)), c_d = √π/(2^(d−2) Γ(d/2)): the affine class for large w."""
    c = np.sqrt(np.pi) / (2 ** (d - 2) * special.gamma(d / 2))
    return float(((d - 1) * samples * signal / (d * c)) ** (2 / (d + 3)))


def sphere(rng: np.random.Generator, *shape: int) -> Floats:
    """Uniform points (…, d) on the sphere."""
    x = rng.standard_normal(shape)
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def window_curves(
    rng: np.random.Generator, d: int, samples: int, widths: Floats, prompts: int
) -> tuple[Floats, Floats]:
    """Of random prompts, for every width: |Σ p_i x_i − q|²/d and Σ p_i², (prompts, widths) each.

    L² times the first plus σ² times the second is the mean squared error over noise and over affine functions
    of Lipschitz constant L in a random direction, given the x_i. No limit is taken.
    """
    biases, variances = np.empty((2, prompts, len(widths)))
    for i in range(prompts):
        x = sphere(rng, samples, d)
        p = np.exp(np.outer(widths, x[:, 0] - 1))
        p /= p.sum(axis=1, keepdims=True)
        mean = p @ x
        mean[:, 0] -= 1
        biases[i], variances[i] = (mean**2).sum(axis=1) / d, (p**2).sum(axis=1)
    return biases, variances


def best_log_width(log_widths: Floats, losses: Floats) -> Any:
    """Where a parabola through the least of ``losses`` (…, widths) and its neighbours has its minimum.

    Args:
        log_widths: equally spaced.
        losses: positive.
    """
    middle = np.clip(losses.argmin(axis=-1), 1, len(log_widths) - 2)
    y = [np.log(np.take_along_axis(losses, (middle + k)[..., None], -1)[..., 0]) for k in (-1, 0, 1)]
    step = log_widths[1] - log_widths[0]
    return log_widths[middle] + step * (y[0] - y[2]) / (2 * (y[0] - 2 * y[1] + y[2]))
