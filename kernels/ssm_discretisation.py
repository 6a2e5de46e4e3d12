"""From a continuous diagonal state space x' = A x + B u to the recurrence that the kernels compute.

Two rules (theory S4-1; Gu et al., arXiv 2206.11893), on the host and in float64: parameters are few, and a
decay's relative error comes back in the state as many times as the state is long-lived.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnproof.properties.contract import ContractError

__all__ = ["discretize_bilinear", "discretize_zoh"]

# Terms of Σ z^n/(n+1)! for abs(z) ≤ 1/2: the next is below 2^-17/18!, less than 2^-69.
SERIES = 17


def relative_growth(z: torch.Tensor) -> torch.Tensor:
    """(e^z − 1)/z of float64 or complex128 z, 1 at 0: a series where z is small, without cancellation.

    Elsewhere e^z − 1 = (e^x − 1) cos y − 2 sin²(y/2) + i e^x sin y for z = x + iy.
    """
    small = z.abs() <= 0.5
    near, far = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    series = torch.ones_like(z)
    for n in range(SERIES, 0, -1):
        series = 1 + near * series / (n + 1)
    if not z.is_complex():
        return torch.where(small, series, torch.expm1(far) / far)
    x, y = far.real, far.imag
    growth = torch.complex(
        torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2) ** 2, torch.exp(x) * torch.sin(y)
    )
    return torch.where(small, series, growth / far)


def discretized(
    A: torch.Tensor,
    B: torch.Tensor,
    delta: torch.Tensor,
    rule: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, delta·f·B) with (a, f) = rule(delta·A), in float64 or complex128, rounded once to A's dtype."""
    pairs = A.ndim == 3
    if A.ndim not in (2, 3) or (pairs and A.shape[2] != 2) or B.shape != A.shape:
        raise ContractError(
            f"{name}: A has shape {tuple(A.shape)}, B {tuple(B.shape)}: expected both (H, D), or both "
            "(H, D, 2) pairs of real and imaginary part"
        )
    if tuple(delta.shape) not in ((A.shape[0],), tuple(A.shape[:2])):
        raise ContractError(
            f"{name}: delta has shape {tuple(delta.shape)}: expected one a head, ({A.shape[0]},), or one a "
            f"state, {tuple(A.shape[:2])}"
        )
    steps = delta.double()
    steps = steps[:, None] if delta.ndim == 1 else steps
    wide, weights = (torch.view_as_complex(x.double().contiguous()) if pairs else x.double() for x in (A, B))
    a, factor = rule(steps * wide)
    b = factor * steps * weights
    if pairs:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return a.to(A.dtype), b.to(B.dtype)


def discretize_zoh(
    A: torch.Tensor,
    B: torch.Tensor,
    delta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-order hold: a = e^(δA), b = (e^(δA) − 1)/A · B, which is δB where A is 0 (theory S4-1).

    Args:
        A, B: (H,D), or (H,D,2) pairs; any floating dtype.
        delta: step widths (H) or (H,D).

    Returns:
        a and b as the calls of :mod:`attnproof.kernels.ssm` take them, of A's and B's shape and dtype.

    Raises:
        ContractError: for shapes that do not fit.
    """
    return discretized(A, B, delta, lambda z: (torch.exp(z), relative_growth(z)), "discretize_zoh")


def discretize_bilinear(
    A: torch.Tensor,
    B: torch.Tensor,
    delta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bilinear rule: a = (1 + δA/2)/(1 − δA/2), b = δB/(1 − δA/2) (theory S4-1).

    Args:
        A, B, delta: as for :func:`discretize_zoh`; δA is not 2.

    Returns:
        a and b, as there.

    Raises:
        ContractError: for shapes that do not fit.
    """
    return discretized(
        A, B, delta, lambda z: ((1 + z / 2) / (1 - z / 2), 1 / (1 - z / 2)), "discretize_bilinear"
    )
