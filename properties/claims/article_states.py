"""The second source article, on state space models: H3, Mamba's discretisation, the filter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = ["CLAIMS", "circular", "filtered", "gates", "h3", "linear_attention", "recurrence"]

Numbers = Sequence[Fraction]

_BITS = 128
_SEED = 6
_SUBJECT = "source articles"
_SOURCE = "second source article (linearising attention), {}"


def _drawn(draw: random.Random, count: int) -> list[Fraction]:
    return [Fraction(draw.randint(-9, 9), 5) for _ in range(count)]


def filtered(taps: Numbers, u: Numbers) -> list[Fraction]:
    """Causal convolution y_t = Σ_j f_j u_{t−j}."""
    return [
        sum((taps[j] * u[t - j] for j in range(min(t + 1, len(taps)))), Fraction(0)) for t in range(len(u))
    ]


def circular(taps: Numbers, u: Numbers) -> list[Fraction]:
    """Circular convolution over len(u) positions, what a Fourier transform without padding gives."""
    n = len(u)
    return [sum((taps[j] * u[(t - j) % n] for j in range(min(n, len(taps)))), Fraction(0)) for t in range(n)]


def recurrence(a: Fraction, b: Fraction, c: Fraction, u: Numbers) -> list[Fraction]:
    """y_t = c·s_t with s_t = a·s_{t−1} + b·u_t, s_0 = 0 before the first input."""
    s, y = Fraction(0), []
    for x in u:
        s = a * s + b * x
        y.append(c * s)
    return y


def h3(q: Numbers, k: Numbers, v: Numbers, taps: Numbers, decay: Fraction) -> list[Fraction]:
    """q ⊙ SSM_diag(SSM_shift(k) ⊙ v): the shift SSM is a filter of k, the diagonal one a decayed sum."""
    shifted = filtered(taps, k)
    kept = recurrence(decay, Fraction(1), Fraction(1), [x * y for x, y in zip(shifted, v, strict=True)])
    return [x * y for x, y in zip(q, kept, strict=True)]


def linear_attention(q: Numbers, k: Numbers, v: Numbers, *, normalised: bool = False) -> list[Fraction]:
    """q_t Σ_{s ≤ t} k_s v_s, divided by q_t Σ k_s where asked for; causal, of width 1."""
    found = []
    for t, x in enumerate(q):
        above = sum((a * b for a, b in zip(k[: t + 1], v[: t + 1], strict=True)), Fraction(0))
        found.append(x * above / (x * sum(k[: t + 1], Fraction(0))) if normalised else x * above)
    return found


def imitation(*, special: bool = False, length: int = 8) -> ClaimFinding:
    """Is H3 linear attention? Where its filter is the identity, its decay 1, and nothing is normalised.

    Args:
        special: try that case only.
        length: N.
    """
    draw, one = random.Random(_SEED), Fraction(1)
    q, v = _drawn(draw, length), _drawn(draw, length)
    k = [abs(x) + 1 for x in _drawn(draw, length)]
    plain, divided = linear_attention(q, k, v), linear_attention([x or one for x in q], k, v, normalised=True)
    cases = [("identity filter, no decay", h3(q, k, v, [one], one) == plain)]
    if not special:
        cases += [
            ("a filter of two taps", h3(q, k, v, [one, one / 2], one) == plain),
            ("a shift by one", h3(q, k, v, [one * 0, one], one) == plain),
            ("a decay of 1/2", h3(q, k, v, [one], one / 2) == plain),
            ("normalised linear attention", h3(q, k, v, [one], one) == divided),
        ]
    if not cases[0][1]:
        status = "REFUTED"
    else:
        status = "HOLDS" if all(same for _, same in cases) else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence=f"{length} positions of rationals, H3 against linear attention: "
        + ", ".join(f"{name}: {'equal' if same else 'different'}" for name, same in cases),
        table={"case": [name for name, _ in cases], "equal": [same for _, same in cases]},
        counterexample=""
        if status == "HOLDS"
        else "q = k = v = (1, 1), no decay: H3 with taps (0, 1) shifts k to (0, 1) and gives (0, 1); linear "
        f"attention gives {tuple(map(int, linear_attention([one] * 2, [one] * 2, [one] * 2)))}, or (1, 1) "
        "normalised.",
        seed=_SEED,
    )


def gates(points: Sequence[int], *, held: bool = False) -> ClaimFinding:
    """Is h_t = (1 − g)h + g·x, g = σ(z), what the model computes for A = −1, B = 1, Δ = softplus(z)?

    Args:
        points: z.
        held: discretise B by zero-order hold, 1 − e^(−Δ), and not by Euler's rule as the code has it, Δ.
    """
    rows = []
    with _precision(_BITS):
        for z in points:
            sigma = 1 / (1 + flint.arb(-z).exp())
            delta = (1 + flint.arb(z).exp()).log()
            gain = 1 - (-delta).exp() if held else delta
            rows.append(
                (
                    z,
                    float(sigma.mid()),
                    float(gain.mid()),
                    bool((-delta).exp().overlaps(1 - sigma)),
                    gain.overlaps(sigma),
                )
            )
    good = all(row[3] and row[4] for row in rows)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"z = {', '.join(map(str, points))}: the decay e^(−softplus(z)) is 1 − σ(z) in "
        f"{sum(row[3] for row in rows)}, the input's gain is σ(z) in {sum(row[4] for row in rows)} of "
        f"{len(rows)}; "
        f"gains {', '.join(f'{row[2]:.4g}' for row in rows)} for gates "
        f"{', '.join(f'{row[1]:.4g}' for row in rows)}",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("z", "σ(z)", "gain", "decay is 1 − σ(z)", "gain is σ(z)"))
        },
        counterexample=""
        if good
        else "z = 0, h = 0, x = 1: g = σ(0) = 1/2, so the theorem's h is 1/2. Δ = softplus(0) = log 2, and "
        "Euler's B̄ = "
        "Δ·B gives h = log 2 = 0.693. For z → ∞ the gate stays below 1, softplus(z) does not.",
    )


def convolution(lengths: Sequence[int], *, padded: bool = False) -> ClaimFinding:
    """Is a state space model's output the convolution of its input with F = (cb, cab, ca²b, …)?

    Args:
        lengths: L.
        padded: pad the input with L zeros before a circular convolution; without them it wraps around.
    """
    draw, rows = random.Random(_SEED), []
    for n in lengths:
        a, b, c = (Fraction(draw.randint(1, 9), 10) for _ in range(3))
        u = [x + 1 for x in _drawn(draw, n)]
        taps = [c * a**j * b for j in range(n)]
        wrapped = (
            circular([*taps, *[Fraction(0)] * n], [*u, *[Fraction(0)] * n])[:n]
            if padded
            else circular(taps, u)
        )
        y = recurrence(a, b, c, u)
        rows.append((n, filtered(taps, u) == y, filtered(taps[:-1], u) == y, wrapped == y))
    if not all(row[1] for row in rows):
        status = "REFUTED"
    else:
        status = "HOLDS" if all(row[3] for row in rows) else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence=f"L = {', '.join(map(str, lengths))}: causal convolution with L taps equals the recurrence "
        "in "
        f"{sum(row[1] for row in rows)}, with one tap fewer in {sum(row[2] for row in rows)}, circular "
        "convolution "
        f"{'with' if padded else 'without'} padding in {sum(row[3] for row in rows)} of {len(rows)}",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("L", "causal", "one tap fewer", "circular"))
        },
        counterexample=""
        if status == "HOLDS"
        else "a = b = c = 1, L = 2, u = (0, 1): F = (1, 1), the recurrence gives (0, 1); the product of "
        "Fourier "
        "transforms of length 2 is a circular convolution and gives (1, 1).",
        seed=_SEED,
    )


CLAIMS: Final = (
    Claim(
        id="SEED1-5",
        subject=_SUBJECT,
        title="H3 imitates linear attention",
        statement="H3, q ⊙ SSM_diag(SSM_shift(k) ⊙ v), computes linear attention.",
        source=_SOURCE.format("H3; Fu et al., arXiv 2212.14052"),
        kind="exact",
        check=lambda lab: imitation(length=lab.choose(8, 24)),
        control=lambda _: imitation(special=True),
    ),
    Claim(
        id="SEED1-6",
        subject=_SUBJECT,
        title="Mamba's gate",
        statement="Mamba's selective state space model with A = −1, B = 1 is the gated recurrence "
        "h_t = (1 − g)h_{t−1} + g·x_t with g = σ(z), as its code computes it.",
        source=_SOURCE.format("Mamba; Gu and Dao, arXiv 2312.00752, Theorem 1 and code"),
        kind="enclosure",
        check=lambda lab: gates(lab.choose((-4, 0, 1, 4), tuple(range(-10, 11)))),
        control=lambda _: gates((-4, 0, 1, 4), held=True),
    ),
    Claim(
        id="SEED1-8",
        subject=_SUBJECT,
        title="the filter and its convolution",
        statement="A linear time-invariant state space model is the convolution of its input with a filter F "
        "of length "
        "L, computed by Fourier transforms of length L.",
        source=_SOURCE.format("convolution view; Gu et al., arXiv 2111.00396"),
        kind="exact",
        check=lambda lab: convolution((2, 3, 5, *lab.choose((8,), (8, 16, 32)))),
        control=lambda _: convolution((2, 3, 5), padded=True),
    ),
)
