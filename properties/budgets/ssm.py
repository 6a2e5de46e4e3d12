"""Budgets of ``ssm`` and ``h3``: every output and gradient is a sum of terms c aⁱ b u, each with its errors.

Let |·| be moduli, u the unit roundoff of the accumulation. Of a term that crosses i positions a kernel makes
(1 + δ) times itself, where |δ| is at most, whatever its form (Higham 2002, lemmas 3.1 and 3.5):

* recurrent: for each position √8·u for the complex product a·x (2u real), u for the sum with b u, and the
  rounding of a stored state; a tree of a scan makes no more of them;
* with an explicit kernel by repeated products, the same; by exp(i log a), i·(2 + 4|log a|₁)·u, of which 2u
  are those of |a|², since log|a| near 1 has an absolute error, and the rest those of log, atan2 (1.5 ulp
  each) and the product i·log a; |log a|₁ = |log|a|| + |arg a|. Sines and cosines whose error grows with
  their argument, as hardware approximations have them, are not covered;
* once, in all: rounded operands (K, or the state, and u), γ_n for sums over modes and over up to 128
  positions in one go, and over such blocks one after another.

So Σ|terms| with every |a| raised by the larger of the first two errors, less Σ|terms|, bounds the error. In
quadrature: a tree, and repeated squaring, err alike in every power of a mode: i·0.25u (0.5u complex, and
0.4u|log a|₁ for logarithms), which multiplies ∂y/∂ log a. A recurrence does not, so that it stays further
below: the units are those of the least accurate healthy form. Terms that agree err alike, as in
:mod:`attnproof.properties.budgets.additive_state`; of complex modes also where only Re c aⁱ b passes 0.

FFT (only with ``causality="budget"``; theory S4-1). With η = u + γ_4(√2 + u), n = 2^⌈log₂ 2N⌉, L = log₂ n, a
transform errs by at most Lη/(1 − Lη) =: ε in the 2-norm relative to its result (Higham 2002, theorem 24.2,
weights correct to u; other radices and the symmetric transform of real data make fewer roundings). Let k̂, û
be those of the padded K and u, ‖k̂‖ = √n‖K‖. The products k̂û err by at most (2ε + ε² + γ_4)|k̂||û| summed by
Cauchy–Schwarz: in each element of y, 1/n Σ|Δ(k̂û)| ≤ (2ε + ε² + γ_4)‖K‖₂‖u‖₂. The inverse transform errs by
ε‖k̂û‖/√n = ε‖K*u‖₂ in norm, and so in each element, ‖K*u‖₂ that of the whole linear convolution. In
quadrature each transform errs by 0.6u√L relative to its norm, evenly over its n elements (Schatzman 1996).

How loose certain budgets are: certain/|error| at its smallest, and in brackets the root mean square of errors
in probable units, float32, D = 4 complex modes of |a| up to 0.6, and up to 1, d = 0, standard normal u; to
measure again, `python -m tests.properties.test_ssm`:

    N       recurrent            scan                 direct               by exp(i log a)      FFT
    64      90 (.23), 120 (.07)  70 (.28), 120 (.06)  170 (.18), 180 (.07) 100 (.27), 40 (.61)  260, 480
    512     90 (.26), 120 (.05)  110 (.29), 120 (.05) 160 (.24), 230 (.05) 90 (.30), 60 (.44)   620, 910
    4096    100 (.27), 220 (.02) 80 (.32), 220 (.02)  130 (.26), 170 (.02) 80 (.39), 40 (.38)   1600, 2300

A worst case of a transform adds up n errors that never point one way: the FFT's bound is √n looser than what
happens, and cannot be 50 times looser at most while it stays a proof. Judgements of FFT forms rest on
probable units (.44 to .70, and .08 to .17).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from attnproof.properties.budgets.additive_state import CHUNK, Runs, StepErrors
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings, growth

if TYPE_CHECKING:
    from attnproof.properties.families.state_kernel import Modes

__all__ = [
    "FLUSHED",
    "KINDS",
    "LOWER",
    "NUDGE",
    "Kind",
    "ModeErrors",
    "agreeing_kernel",
    "changed",
    "changed_modes",
    "fourier_error",
    "fourier_sizes",
    "largest_powers",
    "moduli",
    "runs_of",
    "with_fourier",
]

Kind = Literal["actual", "turned", "absolute", "raised", "squares", "crossed"]
KINDS: tuple[Kind, ...] = ("actual", "turned", "absolute", "raised", "squares", "crossed")
NUDGE = 1e-7
"""A relative increase of squared decays from whose effect the number of positions crossed is read off."""

# A mode that decays by more a position is gone before its exponent matters.
_LARGEST_LOG = 40.0
# Root mean square relative error for each position crossed that all terms of a mode share, in u: powers by
# squaring, of which the k-th has made 2^k·(Σ 4^−j)^½ of one rounding of 0.42u (0.8u complex).
_SHARED, _SHARED_COMPLEX, _SHARED_LOG = 0.25, 0.5, 0.4
# Hardware exponentials flush results below the smallest normal number of float32.
FLUSHED = 2.0**-126
# Outweighs the roundings of sums of up to 2²⁰ numbers ≥ 0 in float64.
LOWER = 1.0 - 2.0**-30
# Root mean square error of a transform of n elements relative to its norm, in u√log₂ n.
_TRANSFORM = 0.6


def moduli(x: torch.Tensor, modes: Modes) -> torch.Tensor:
    """|x| of numbers of the modes' kind, without their last axis if they are pairs; float64."""
    return x.double().square().sum(-1).sqrt() if modes.complex else x.double().abs()


@dataclass(frozen=True, eq=False)
class ModeErrors:
    """Errors of the terms of each mode.

    Attributes:
        terms: what is common to all modes.
        step: (H, D), largest relative error for each position crossed.
        weight: (H, D), what the modes' terms share of each position, relative to ``terms.shared``.
    """

    terms: StepErrors
    step: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(
        cls, modes: Modes, r: Roundings, length: int, *, backward: bool, rounded: int = 2, terms: int = 0
    ) -> ModeErrors:
        """Of a kernel with roundings ``r``.

        Args:
            modes, r, length: the parameters, the roundings and N.
            backward: whether gradients are meant.
            rounded: how many factors of a term are rounded operands.
            terms: how many are summed beyond modes and positions.
        """
        u, width = max(r.elementwise, r.accumulate), modes.a.shape[1]
        size = moduli(modes.a, modes)
        log = size.clamp(min=1e-300).log().abs()
        angle = torch.zeros_like(log)
        if modes.complex:
            angle = torch.atan2(modes.a[..., 1].double(), modes.a[..., 0].double()).abs()
        held = r.storage("state")[0]
        state = held if held > r.accumulate else 0.0
        walked = (math.sqrt(8.0) + 1.0 if modes.complex else 2.0) * u + state
        log_one = log.clamp(max=_LARGEST_LOG) + angle
        step = torch.maximum(torch.full_like(log, walked), u * (2.0 + 4.0 * log_one))
        own = _SHARED_COMPLEX if modes.complex else _SHARED
        weight = (own**2 + (_SHARED_LOG * log_one).square()).sqrt() / _SHARED
        stored = max(r.probabilities, r.storage("dscores")[0]) if backward else r.probabilities
        summed = min(length, CHUNK) + -(-length // CHUNK) + 2 * width + 16 + terms
        common = StepErrors.of(
            r, gated=False, rounded=rounded + int(backward), stored=stored, feature=0.0, terms=summed
        )
        return cls(replace(common, shared=_SHARED * r.elementwise), step, weight)


def changed_modes(modes: Modes, kind: Kind, errors: ModeErrors | None) -> Modes:
    """The parameters of a kind of evaluation."""
    if kind == "actual":
        return modes
    if kind == "turned":
        turned = modes.c.double()
        if modes.complex:
            turned = torch.stack((-turned[..., 1], turned[..., 0]), -1)
        return replace(modes, c=turned)
    a, b, c = (moduli(x, modes) for x in (modes.a, modes.b, modes.c))
    if kind in ("squares", "crossed"):
        a, b, c = a.square(), b.square(), c.square()
    if kind == "crossed":
        assert errors is not None
        a = a * (1.0 + NUDGE * errors.weight)
    if kind == "raised":
        assert errors is not None
        a = a * (1.0 + errors.step)
    return type(modes)(a, b, c)


def changed(x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """A real tensor for a kind of evaluation."""
    x = x.double()
    if kind in ("actual", "turned"):
        return x
    return x.square() if kind in ("squares", "crossed") else x.abs()


def largest_powers(modes: Modes, length: int) -> torch.Tensor:
    """The largest |a|ᵗ⁺¹ of all modes at each position, at least 1, (H, N)."""
    size = moduli(modes.a, modes).clamp(min=1.0)
    most = size.amax(-1, keepdim=True) if size.shape[-1] else size.new_ones(len(size), 1)
    return most ** torch.arange(1, length + 1, dtype=torch.float64)


def agreeing_kernel(actual: torch.Tensor, kernel: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Σ_s|c aⁱ b|², with the kernel's own square where modes agree: of one kind of squares.

    Args:
        actual: K_i; kernel: Σ_s|c aⁱ b|² of the kind; squares: the same without a nudge.
    """
    return kernel * (1.0 + actual.square() / squares.clamp(min=1e-300))


def runs_of(found: Mapping[Kind, torch.Tensor]) -> Runs:
    """The evaluations that :func:`estimate` combines; "turned" is the other part of a complex result."""
    actual = found["actual"]
    if "turned" in found:
        actual = torch.hypot(actual, found["turned"])
    return Runs(
        actual=actual,
        absolute=found["absolute"],
        raised=found["raised"],
        squares=found["squares"],
        crossed=((found["crossed"] - found["squares"]) / NUDGE).clamp(min=0.0),
        cancelled=torch.zeros_like(actual),
    )


def with_fourier(
    known: Estimate, sizes: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], r: Roundings
) -> Estimate:
    """The larger errors of a kernel that may convolve by Fourier transforms, (B, H, N).

    Args:
        known: its other errors; sizes: of :func:`fourier_sizes`; r: the roundings.
    """
    certain, variance = fourier_error(sizes, r)
    shape = known.value.shape
    return replace(
        known,
        certain=known.bound + certain[..., None].expand(shape),
        variance=known.spread + variance[..., None].expand(shape),
    )


def fourier_sizes(
    kernel: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """‖K‖₂ and ‖u‖₂ and ‖K*u‖₂, broadcastable to (B, H), and the transforms' length n.

    Args:
        kernel: (…, N) float64; u: (…, N) float64, of shapes that broadcast.
    """
    count = 2 ** max(math.ceil(math.log2(max(2 * u.shape[-1], 2))), 1)
    sizes = kernel.square().sum(-1).sqrt(), u.square().sum(-1).sqrt()
    if not (kernel.numel() and u.numel()):  # there is no transform of nothing
        return *sizes, sizes[0] * sizes[1], count
    product = torch.fft.rfft(kernel, count) * torch.fft.rfft(u, count)
    return *sizes, torch.fft.irfft(product, count).square().sum(-1).sqrt(), count


def fourier_error(
    sizes: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], r: Roundings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The certain error and the variance of each element of a convolution by FFT; see the module."""
    kernel, u, whole, count = sizes
    unit, levels = r.elementwise, math.log2(count)
    product = float(growth(4.0, unit))
    each = unit + product * (math.sqrt(2.0) + unit)
    transform = levels * each / (1.0 - levels * each)
    both = 2.0 * transform + transform**2 + product
    certain = both * (1.0 + transform) * kernel * u + transform * whole
    square = (_TRANSFORM * unit) ** 2 * levels / count
    return certain, square * (2.0 * (kernel * u).square() + whole.square())
