"""What PTX documents of approximate instructions, against the emulator's models of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory

__all__ = [
    "CLAIMS",
    "DOCUMENTED",
    "Bound",
    "documented",
    "flushed",
    "samples",
]

_PTX: Final = "PTX ISA 8, floating-point instructions"
Instruction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """A documented bound of an instruction on low ≤ x ≤ high.

    Attributes:
        exact: the function, of float64 tensors.
        kind: "ulp" of the correctly rounded result, "relative" or "absolute".
        special: operands and the results that they must give, bit by bit.
    """

    name: str
    exact: Instruction
    kind: str
    limit: float
    low: float
    high: float
    special: tuple[tuple[float, float], ...] = ()

    def errors(self, x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Errors over the bound, in float64, of results ``found`` at ``x``."""
        due = self.exact(x.double())
        apart = (found.double() - due).abs()
        if self.kind == "absolute":
            return apart / self.limit
        if self.kind == "relative":
            return torch.where(apart == 0, 0.0, apart / due.abs()) / self.limit
        rounded = due.float().double().abs()
        unit = torch.ldexp(torch.ones_like(due), torch.frexp(rounded)[1].clamp(min=-125) - 24)
        return apart / unit / self.limit


_INF: Final = math.inf
_TURN: Final = 2 * math.pi
DOCUMENTED: Final = (
    Bound(
        "ex2.approx.f32",
        torch.exp2,
        "ulp",
        2.5,
        -149.0,
        127.99999,
        ((0.0, 1.0), (-0.0, 1.0), (-_INF, 0.0), (_INF, _INF)),
    ),
    Bound(
        "ex2.approx.ftz.f32",
        torch.exp2,
        "ulp",
        2.5,
        -126.0,
        127.99999,
        ((0.0, 1.0), (-0.0, 1.0), (-_INF, 0.0)),
    ),
    Bound(
        "lg2.approx.f32", torch.log2, "absolute", 2.0**-22, 0.5, 2.0, ((_INF, _INF), (0.0, -_INF), (1.0, 0.0))
    ),
    Bound("lg2.approx.f32", torch.log2, "relative", 2.0**-22, 2.0, 3e38),
    Bound("lg2.approx.f32", torch.log2, "relative", 2.0**-22, 2.0**-126, 0.5),
    Bound(
        "tanh.approx.f32",
        torch.tanh,
        "relative",
        2.0**-11,
        -20.0,
        20.0,
        ((_INF, 1.0), (-_INF, -1.0), (-0.0, -0.0)),
    ),
    Bound("rsqrt.approx.f32", torch.rsqrt, "relative", 2.0**-22.9, 2.0**-126, 3e38, ((_INF, 0.0),)),
    Bound("sin.approx.f32", torch.sin, "absolute", 2.0**-20.5, -_TURN, _TURN),
    Bound("cos.approx.f32", torch.cos, "absolute", 2.0**-20.5, -_TURN, _TURN),
    Bound("sin.approx.f32", torch.sin, "absolute", 2.0**-14.7, -50 * _TURN, 50 * _TURN),
    Bound("cos.approx.f32", torch.cos, "absolute", 2.0**-14.7, -50 * _TURN, 50 * _TURN),
)
"""2 ulp of the correctly rounded result are 2.5 of the exact one."""


def samples(low: float, high: float, count: int) -> torch.Tensor:
    """float32 numbers of [low, high]: even steps, each power of two with its neighbours, and its own ends."""
    even = torch.linspace(low, high, count, dtype=torch.float64).float()
    powers = torch.ldexp(torch.ones(253), torch.arange(-126, 127))
    near = torch.cat([powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, powers * 0)])
    generator = torch.Generator().manual_seed(51)
    mantissas = torch.rand(count, generator=generator) + 1.0
    spread = mantissas * powers[torch.randint(0, len(powers), (count,), generator=generator)]
    x = torch.cat([even, near, -near, spread, -spread])
    return x[(x >= low) & (x <= high)]


def _same(a: torch.Tensor, b: float) -> bool:
    due = torch.tensor(b, dtype=torch.float32)
    return bool((a == due) & (torch.signbit(a) == torch.signbit(due)))


def documented(lab: Laboratory, *, spoilt: float = 0.0, count: int | None = None) -> ClaimFinding:
    """Are the emulator's instructions within their documented bounds? ``spoilt``: a relative error put on
    top.
    """
    count = count or lab.choose(1 << 13, 1 << 17, 1 << 20)
    rows, wrong, missing = [], [], []
    for bound in DOCUMENTED:
        try:
            model = lab.instruction(bound.name)
        except ValueError:
            missing.append(bound.name)
            continue
        x = samples(bound.low, bound.high, count)
        ratio = bound.errors(x, model(x) * (1.0 + spoilt))
        worst = int(ratio.argmax())
        told = [_same(model(torch.tensor([a]))[0], b) for a, b in bound.special]
        rows.append(
            (
                bound.name,
                bound.kind,
                bound.limit,
                bound.low,
                bound.high,
                len(x),
                float(ratio[worst]),
                sum(told),
                len(told),
            )
        )
        if ratio[worst] > 1 or not all(told):
            wrong.append(f"{bound.name}, x = {float(x[worst])!r}: {float(ratio[worst]):.3g} times the bound")
    titles = (
        "instruction",
        "kind",
        "bound",
        "from",
        "to",
        "operands",
        "largest error over the bound",
        "special values",
        "of",
    )
    if not rows:
        return ClaimFinding(status="OPEN", evidence=f"the laboratory models none of {', '.join(missing)}")
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence=f"emulator's models of {len({row[0] for row in rows})} instructions, "
        f"{sum(row[5] for row in rows)} operands (powers of two and neighbours, even steps, random "
        f"mantissas), against float64: at most {max(r[6] for r in rows):.3f} of the bound, special values as "
        f"documented in {sum(r[7] for r in rows)} of {sum(r[8] for r in rows)}"
        + (f"; not modelled: {', '.join(missing)}" if missing else "")
        + ". Of the chip itself only a sweep on a GPU would tell; float16 and bfloat16 variants are not "
        "modelled apart",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="\n".join(wrong),
        seed=51,
    )


def flushed(lab: Laboratory, *, flushes: bool = True) -> ClaimFinding:
    """Is ex2 with .ftz within 2 ulp on the whole range, where subnormal results become 0?

    Args:
        flushes: subnormal results become 0 as documented, where the emulator's model leaves them too; False
            takes the instruction without .ftz, as it is.
    """
    bound = DOCUMENTED[0]
    model = lab.instruction("ex2.approx.ftz.f32" if flushes else "ex2.approx.f32")
    x = samples(-148.0, 127.0, lab.choose(1 << 12, 1 << 16))
    raw = model(x)
    found = torch.where(raw.abs() < 2.0**-126, 0.0, raw) if flushes else raw
    ratio = bound.errors(x, found)
    below = x < -126
    inside, outside = float(ratio[~below].max()), float(ratio[below].max())
    status = "SUPPORTED" if max(inside, outside) <= 1 else "CONDITIONAL" if inside <= 1 else "REFUTED"
    example = float(model(torch.tensor([-127.0]))[0])
    told = (
        "the emulator's model flushes by itself"
        if example == 0
        else f"the emulator's model gives {example:.4g} at −127 and does not flush"
        + ("; the flush is put on here as PTX documents it, and decides the verdict" if flushes else "")
    )
    return ClaimFinding(
        status=status,
        evidence=f"{len(x)} operands: at most {inside:.3f} of the bound for x ≥ −126, {outside:.3g} of it "
        f"below, where the result is subnormal; {told}. No chip was asked",
        counterexample=(
            "ex2.approx.ftz.f32 of −127: the exact result 2⁻¹²⁷ is subnormal and is flushed to 0, 2²² units "
            "of 2⁻¹⁴⁹ off; the condition is x ≥ −126"
            if status == "CONDITIONAL"
            else ""
        ),
        seed=51,
    )


CLAIMS: Final = (
    Claim(
        id="HW-1a",
        subject="hardware",
        title="approximate instructions within their bounds",
        statement="ex2.approx.f32 is within 2 ulp, lg2 within 2⁻²² (absolute on (1/2, 2), relative "
        "elsewhere), tanh within 2⁻¹¹ and rsqrt within 2^−22.9 relative, sin and cos within 2^−20.5 on [−2π, "
        "2π]; special values as documented.",
        source=_PTX,
        kind="search",
        check=documented,
        control=lambda lab: documented(lab, spoilt=2.0**-9, count=1 << 10),
        covers=("HW-1",),
    ),
    Claim(
        id="HW-1b",
        subject="hardware",
        title="2 ulp on the whole range, flushed",
        statement="ex2.approx.ftz.f32 is within 2 ulp of the correctly rounded result on the whole range.",
        source=f"{_PTX}: the bound read together with .ftz",
        kind="search",
        check=flushed,
        control=lambda lab: flushed(lab, flushes=False),
    ),
)
