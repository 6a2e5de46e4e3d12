"""Claims about the norm of sigmoid attention at initialisation, and the bias −log n that is to keep it.

With weights w = e^z everything at the bias −log n is rational, σ(z − log n) = w/(w + n): what can be is shown
in exact rationals, and the oracle's enclosures of the family are held against them. What stays transcendental
is proved in Arb. SIG-3; Ramapuram et al., arXiv 2409.04431.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

import flint
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory
from attnproof.properties.contract import Contract
from attnproof.properties.families import family_of
from attnproof.properties.oracle import reference

__all__ = [
    "CLAIMS",
    "FORMATS",
    "LENGTHS",
    "PAPER",
    "SUBJECT",
    "Weight",
    "biases_in_formats",
    "contains",
    "held",
    "kernel_norms",
    "mean_mass",
    "norm_at_zero_logits",
    "random_logits",
    "truncated",
    "weight",
    "zero_logits",
]

SUBJECT: Final = "sigmoid attention"
PAPER: Final = "Ramapuram et al., arXiv 2409.04431"

Weight = Callable[[Fraction | int, int], Fraction]
"""The weight of a key, a function of e^z for its logit z and of the number of keys."""

Rounding = Callable[[Fraction, int, int], Fraction]
"""From a number, the digits of a format and the exponent of its smallest number to a number of the format."""

LENGTHS = tuple(2**power for power in range(4, 17))
"""N = 16 … 65536."""

FORMATS = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}
"""Digits of the significand, and the exponent of the smallest number."""

_BITS = 128
# What counts as a mass near 1: the norm of softmax attention to a tenth.
_NEAR_ONE = 0.1
# Normal deviates beyond this are bounded by their probability, below 1e-56, and not integrated.
_TAIL = 16


def weight(w: Fraction | int, n: int) -> Fraction:
    """σ(log w − log n) = w/(w + n)."""
    return Fraction(w) / (Fraction(w) + n)


def contains(enclosure: Enclosure, exact: Sequence[Fraction]) -> bool:
    """Whether every element's enclosure holds the exact number, decided in rationals."""
    pairs = zip(enclosure.value.flatten().tolist(), enclosure.radius.flatten().tolist(), exact, strict=True)
    return all(abs(Fraction(value) - number) <= Fraction(radius) for value, radius, number in pairs)


def zero_logits(n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q of zeros, one query, and values 1, 2, 3, 1, 2, 3, … of width 1, with keys that have no say."""
    v = (torch.arange(n) % 3 + 1).to(dtype).reshape(1, 1, n, 1)
    return torch.zeros(1, 1, 1, 1, dtype=dtype), v, v


def norm_at_zero_logits(lengths: Sequence[int] = LENGTHS, weigh: Weight = weight) -> ClaimFinding:
    """Are the norms at zero logits n/2 and n/(n + 1) times softmax's? By the oracle's enclosures.

    Args:
        lengths: n; weigh: what is taken for the weight of a key at the bias −log n.
    """
    wrong, widest = [], 0.0
    for n in lengths:
        tensors = zero_logits(n)
        mean = Fraction(int(tensors[2].sum()), n)
        factors = {None: n * weigh(1, n), 0.0: Fraction(n, 2)}
        for bias, factor in factors.items():
            found = reference("sigmoid", *tensors, scale=1.0, bias=bias, arithmetic="float64")
            assert isinstance(found, Enclosure)
            if not contains(found, [factor * mean]):
                wrong.append(n)
            widest = max(widest, float(found.radius / found.value))
        softmax = reference("softmax", *tensors, scale=1.0, arithmetic="float64")
        assert isinstance(softmax, Enclosure)
        if not contains(softmax, [mean]):
            wrong.append(n)
    evidence = (
        f"σ(−log n) = 1/(n + 1) in rationals. At n = {lengths[-1]} the norm is {lengths[-1] / 2:g} times "
        f"softmax's without a bias and {1 - 1 / (lengths[-1] + 1):.6f} times with −log n. "
        + (f"The oracle contradicts it at n = {sorted(set(wrong))}" if wrong else "The oracle's enclosures")
        + ("" if wrong else f" hold these factors at {len(lengths)} lengths, relative radius ≤ {widest:.1g}")
    )
    first = min(wrong, default=0)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=evidence,
        counterexample=f"n = {first}, all logits 0, values 1, 2, 3, 1, …: the oracle's output is not "
        f"{first * weigh(1, first)} of the mean"
        if wrong
        else "",
        table={
            "n": list(lengths),
            "norm over softmax's, b = 0": [n / 2 for n in lengths],
            "norm over softmax's, b = −log n": [float(n * weigh(1, n)) for n in lengths],
        },
    )


def _round(x: Fraction, digits: int, smallest: int) -> Fraction:
    """x to the nearest number of a format, ties to even."""
    if not x:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    spacing = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(x / spacing) * spacing


def truncated(x: Fraction, digits: int, smallest: int) -> Fraction:
    """x cut off to ``digits`` binary digits, whatever is lost: no rounding to nearest."""
    mantissa, exponent = math.frexp(float(x))
    return Fraction(math.ldexp(math.trunc(mantissa * 2**digits), exponent - digits))


def held(x: flint.arb, name: str, rounding: Rounding = _round) -> Fraction:
    """The real number in ball ``x`` as a format of :data:`FORMATS` holds it.

    Raises:
        ArithmeticError: the ball's ends round to different numbers.
    """
    low, high = (
        rounding(Fraction(int(end.p), int(end.q)), *FORMATS[name])
        for end in (x.lower().fmpq(), x.upper().fmpq())
    )
    if low != high:
        raise ArithmeticError(f"x={x} lies across a rounding boundary of {name}; give a narrower ball")
    return low


def _logistic(x: Fraction) -> flint.arb:
    return 1 / (1 + (-flint.arb(flint.fmpq(x.numerator, x.denominator))).exp())


def _worst_for_bfloat16() -> list[int]:
    """Lengths whose logarithm is next to a midpoint of two bfloat16 numbers, in [8, log 65536)."""
    near = (math.exp(8.0 + (2 * j + 1) / 32) for j in range(49))
    return [n for x in near for n in (math.floor(x), math.ceil(x)) if n <= LENGTHS[-1]]


def biases_in_formats(lengths: Sequence[int] | None = None, rounding: Rounding = _round) -> ClaimFinding:
    """What a bias −log n rounded to a format does to the norm at zero logits, and P stored in it.

    |rounding of log n| ≤ u·2^⌊log₂ log n⌋ and 0 < σ'/σ < 1, hence the bound.

    Args:
        lengths: by default :data:`LENGTHS` and those that bfloat16 holds worst; all of
            range(16, 65537) takes most of a minute.
        rounding: how a format rounds.
    """
    tried = sorted({*LENGTHS, *_worst_for_bfloat16()}) if lengths is None else list(lengths)
    rows: list[tuple[int, str, float, float, float, float]] = []
    beyond: list[tuple[str, int, float, float]] = []
    worst = dict.fromkeys(FORMATS, (0.0, 0, 0.0))
    for name, (digits, _) in FORMATS.items():
        for n in tried:
            with _precision(_BITS):
                exact = -flint.arb(n).log()
                bias = held(exact, name, rounding)
                p = _logistic(bias)
                mass = float((n * p).mid())
                change = p * (n + 1) - 1
                step = 2.0 ** (math.floor(math.log2(math.log(n))) - digits)
                bound = flint.arb(step).exp() - 1
                stored = float(n * held(p, name, rounding))
                off, most = float(change.mid()), float(bound.mid())
                if not abs(change) <= bound:
                    beyond.append((name, n, off, most))
            worst[name] = max(worst[name], (abs(off), n, most))
            if n in LENGTHS:
                rows.append((n, name, mass, off, most, stored))
    words = "; ".join(
        f"{name} {off:.2g} (n = {n}, bound {most:.2g})" for name, (off, n, most) in worst.items()
    )
    titles = ("n", "format", "mass", "relative change", "bound", "mass with P in the format too")
    return ClaimFinding(
        status="REFUTED" if beyond else "HOLDS",
        counterexample="; ".join(
            f"n = {n}, {name}: the norm changes by {off:.3g}, above {most:.3g}"
            for name, n, off, most in sorted(beyond, key=lambda case: case[1])[:1]
        ),
        evidence=f"largest relative change over {len(tried)} lengths from {tried[0]} to {tried[-1]}: {words}"
        + (f"; above the bound in {len(beyond)} cases" if beyond else ""),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def mean_mass(deviation: float, n: float) -> flint.arb:
    """n·E σ(z − log n) for z normal of mean 0 and the given deviation s, proved.

    n·E σ(z − log n) = e^(s²/2)·E 1/(1 + e^(s² + s·x)/n), x standard normal: the factor e^z tilts the law.
    """
    with _precision(_BITS):
        s = flint.arb(deviation)
        shift = s * s - flint.arb(n).log()

        def density(x: flint.acb, _: bool) -> flint.acb:
            return (-x * x / 2).exp() / (1 + (flint.acb(shift) + s * x).exp())

        inside = flint.acb.integral(density, -_TAIL, _TAIL, rel_tol=2.0**-70, abs_tol=2.0**-70).real
        root = (2 * flint.arb.pi()).sqrt()
        # The integrand's second factor is at most 1: both tails together add erfc(16/√2) at most.
        outside = (flint.arb(_TAIL) / flint.arb(2).sqrt()).erfc()
        mean = (inside / root).union(inside / root + outside)
        return (s * s / 2).exp() * mean


def _large_mass(rows: Sequence[tuple[float, int, float, float]]) -> str:
    """The first row whose mass is not near 1, if any, and one of two logits to be redone by hand."""
    s, n, mass, most = next((row for row in rows if not abs(row[2] - 1) < _NEAR_ONE), rows[0])
    hand = Fraction(64, 2) * (weight(4, 64) + weight(Fraction(1, 4), 64))
    return (
        f"normal logits of deviation s = {s:g}, n = {n}: mean mass {mass:.6f}, e^(s²/2) = {most:.6f}\n"
        "by hand: n = 64, half of the logits log 4, half −log 4 (deviation 1.386): 32·(4/68 + 1/257) = "
        f"{hand} = {float(hand):.4f}"
    )


def random_logits(
    deviations: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0), lengths: Sequence[int] = (16, 1024, 65536)
) -> ClaimFinding:
    """Is the mean mass of a row near 1 at the bias −log n for normal logits?"""
    rows: list[tuple[float, int, float, float]] = []
    kept: dict[float, bool] = {}
    broken = []
    for s in deviations:
        for n in lengths:
            mass = mean_mass(s, n)
            with _precision(_BITS):
                most = (flint.arb(s) ** 2 / 2).exp()
                # t − t² ≤ σ(log t) ≤ t, of which the ends are means of lognormal numbers.
                if not (
                    mass > most - (2 * flint.arb(s) ** 2).exp() / n - 2.0**-30 and mass < most + 2.0**-30
                ):
                    broken.append((s, n))
                near = bool(abs(mass - 1) < _NEAR_ONE)
            kept[s] = kept.get(s, True) and near
            rows.append((s, n, float(mass.mid()), float(most.mid())))
    good, bad = [s for s in kept if kept[s]], [s for s in kept if not kept[s]]
    status = "REFUTED" if broken or not good else ("CONDITIONAL" if bad else "HOLDS")
    words = "; ".join(
        f"s = {s:g}, n = {n}: {mass:.4f}, e^(s²/2) = {most:.4f}"
        for s, n, mass, most in rows[-1 :: -len(lengths)]
    )
    return ClaimFinding(
        status=status,
        counterexample=_large_mass(rows) if bad or broken else "",
        evidence=f"near 1 at the tried n for s in {good}, not for s in {bad}. n·E σ(z − log n) is at most "
        "e^(s²/2), within e^(3s²/2)/n of it relatively, and half of it at n = e^(s²): "
        + words
        + (f"; outside these bounds: {broken}" if broken else ""),
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("deviation of logits", "n", "mean mass", "e^(s²/2)"))
        },
    )


def kernel_norms(
    attend: Callable[..., torch.Tensor],
    lengths: Sequence[int] = LENGTHS,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    contract: Contract | None = None,
) -> ClaimFinding:
    """Does a kernel give the norms at zero logits, n/2 and n/(n + 1), within its budget in every dtype?

    Args:
        attend: called as the contract's ``sigmoid`` with q (1, 1, 1, 16), k (1, 1, n, 16), v (1, 1, n, 16)
            and scale, once without and once with bias = 0.
        contract: what the kernel declares; the defaults of the family where it is None.
    """
    declared = contract or Contract("sigmoid")
    rows: list[tuple[str, int, str, float, float, float]] = []
    for dtype in dtypes:
        for n in lengths:
            q, k, v = torch.zeros(1, 1, 1, 16), torch.ones(1, 1, n, 16), torch.ones(1, 1, n, 16)
            tensors = [x.to(dtype) for x in (q, k, v)]
            for words, options, exact in (
                ("−log n", {}, n * weight(1, n)),
                ("0", {"bias": 0.0}, Fraction(n, 2)),
            ):
                problem = family_of("sigmoid").problem(*tensors, scale=0.25, **options)
                truth = torch.full(problem.shape("o"), float(exact), dtype=torch.float64)
                known = Enclosure(truth, truth * 2.0**-53)
                allowed = problem.budgets({"o": known, "gauge:o": known}, declared)["o"].certain
                got = attend(*tensors, scale=0.25, **options)
                ratio = ((got.double() - truth).abs() / allowed).max()
                rows.append(
                    (dtype_name(dtype), n, words, float(exact), float(got.double().mean()), float(ratio))
                )
    # A NaN is no ratio of at most 1.
    bad = [row for row in rows if not row[-1] <= 1.0]
    worst = max(rows, key=lambda row: abs(row[4] / row[3] - 1))
    titles = ("dtype", "n", "bias", "exact", "the kernel's mean", "error over budget")
    return ClaimFinding(
        status="REFUTED" if bad else "SUPPORTED",
        counterexample="\n".join(
            f"q = 0, k = v = 1 of width 16, {row[0]}, n = {row[1]}, bias {row[2]}: {row[4]!r}, exactly "
            f"{row[3]!r}: {row[5]:.3g} times the budget"
            for row in sorted(bad, key=lambda row: row[1])[:1]
        ),
        evidence=f"{len(rows)} calls, n = {lengths[0]} to {lengths[-1]}: farthest from the exact norm by "
        f"{worst[4] / worst[3] - 1:.2g} ({worst[0]}, n = {worst[1]}, bias {worst[2]})"
        + "".join(
            f"; {row[0]}, n = {row[1]}, bias {row[2]}: {row[4]:.6g} for {row[3]:.6g}" for row in bad[:3]
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def _kernel(lab: Laboratory, target: str) -> ClaimFinding:
    """The norms of a kernel that the laboratory runs on its emulator."""
    return kernel_norms(
        lambda *tensors, **options: lab.run(target, *tensors, **options)[0],
        lab.choose((1024,), (16, 300, 4096), (16, 300, 4096, 65536)),
        lab.choose((torch.float32,), (torch.float32, torch.float16, torch.bfloat16)),
    )


CLAIMS: Final = (
    Claim(
        id="SIG-3a",
        subject=SUBJECT,
        title="norm at initialisation",
        statement="At zero logits the output of sigmoid attention is n/2 times that of softmax attention "
        "without a bias, and n/(n + 1) times with the bias b = −log n.",
        source=f"{PAPER}, on the bias; factors derived",
        kind="enclosure",
        check=lambda lab: norm_at_zero_logits(lab.choose(LENGTHS[:9], LENGTHS)),
        control=lambda lab: norm_at_zero_logits(LENGTHS[:4], lambda w, n: Fraction(w, n + 2)),
        covers=("SIG-3",),
    ),
    Claim(
        id="SIG-3b",
        subject=SUBJECT,
        title="mass of a row of random logits",
        statement="With the bias b = −log n a row of sigmoid attention has a mass near 1 (to a tenth), as "
        "softmax has 1, where logits are normal of mean 0 and deviation s.",
        source=f"{PAPER}, on the bias −log n",
        kind="enclosure",
        check=lambda lab: random_logits(),
        control=lambda lab: random_logits((0.0, 0.1), (1024, 65536)),
    ),
    Claim(
        id="SIG-3c",
        subject=SUBJECT,
        title="bias −log n in a narrow format",
        statement="A bias −log n rounded to a format of unit roundoff u changes the norm at zero logits by "
        "a factor of at most e^(u·2^⌊log₂ log n⌋) either way.",
        source=f"derived, for the bias of {PAPER}",
        kind="enclosure",
        check=lambda lab: biases_in_formats(),
        control=lambda lab: biases_in_formats((4096, 65536), truncated),
    ),
    Claim(
        id="SIG-3d",
        subject=SUBJECT,
        title="norm of a kernel at initialisation",
        statement="The kernel's output at zero logits is n/(n + 1) times the mean of V with the bias −log "
        "n, and n/2 times without, within the budget of its arithmetic.",
        source=f"derived, for the bias of {PAPER}",
        kind="measurement",
        check=lambda lab: _kernel(lab, "attnproof.kernels.sigmoid:attention"),
        # σ by tanh.approx, which has lost most digits of 1/(n + 1).
        control=lambda lab: _kernel(lab, "attnproof.kernels.examples.sigmoid_tanh:tanh_sigmoid_attention"),
    ),
)
