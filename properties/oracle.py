"""Certified references: the cheapest arithmetic whose radius is small enough, row by row.

Float64 enclosures come first; the rows whose radius exceeds what is asked, and only they, are evaluated again
in Arb with rising precision until every element is certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.arithmetic.base import Arithmetic, Enclosure
from attnproof.properties.contract import ContractError
from attnproof.properties.families import family_of
from attnproof.properties.families.base import Problem, Reference, broadcast_mask

__all__ = ["PRECISIONS", "CertificationError", "certify", "evaluate", "reference"]

Targets = Callable[[Mapping[str, Enclosure]], Mapping[str, torch.Tensor]]

# Bits of the Arb stages. 128 covers sums of float32 numbers of any ordinary size; float32 logits near 1e38
# lose 127 bits to their size before the exponential, and float64 inputs up to 1024 + 1074.
PRECISIONS = (128, 256, 512, 1280, 2560, 5120)
_SMALLEST = 2.0**-149
_DEFAULT_RELATIVE = 2.0**-40
_NAMES = ("auto", "mpmath", "arb", "float64")


class CertificationError(RuntimeError):
    """No precision up to the largest certified the result to the accuracy asked."""


def evaluate(problem: Problem, arithmetic: Arithmetic[Any], gauges: bool = False) -> dict[str, Enclosure]:
    """All outputs of a problem (and gauges) as enclosures of the outputs' shapes, limits put in."""
    result = {}
    for name, value in problem.evaluate(arithmetic, gauges).items():
        output = name.removeprefix("gauge:")
        shape = problem.shape(output)
        found = arithmetic.enclosure(value)
        centre, radius = found.value.reshape(shape), found.radius.reshape(shape)
        known = centre.isfinite() & ~radius.isnan()
        # Contiguous, since rows that escalate are written in place.
        centre = torch.where(known, centre, 0.0).contiguous()
        radius = torch.where(known, radius, torch.inf).contiguous()
        if name == output:
            for limit, where in problem.fixed(output).items():
                centre, radius = centre.masked_fill(where, limit), radius.masked_fill(where, 0.0)
        result[name] = Enclosure(centre, radius)
    return result


def certify(problem: Problem, targets: Targets) -> Reference:
    """Enclosures of every output whose radius is at most what ``targets`` asks of each element.

    Args:
        problem: rows that see non-finite inputs are left as the float64 stage gives them.
        targets: from the reference so far (gauges included) to the largest allowed radius of each output's
            elements.

    Raises:
        CertificationError: if the largest precision did not suffice.
    """
    found = evaluate(problem, EnclosureArithmetic(), gauges=True)
    stages = {"float64": 0}
    pending = _uncertified(problem, found, targets(found))
    stages["float64"] = int((~pending).sum())
    for bits in PRECISIONS:
        if not pending.any():
            break
        arithmetic = ArbArithmetic(bits)
        for part, index in problem.split(pending):
            _put(problem, found, evaluate(part, arithmetic, gauges=True), index)
        before = int(pending.sum())
        pending = pending & _uncertified(problem, found, targets(found))
        stages[f"arb-{bits}"] = before - int(pending.sum())
    if pending.any():
        row = tuple(pending.nonzero()[0].tolist())
        raise CertificationError(f"row {row} could not be certified with {PRECISIONS[-1]} bits")
    return Reference(found, {name: count for name, count in stages.items() if count})


def _uncertified(
    problem: Problem, found: Mapping[str, Enclosure], targets: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Rows with an element whose radius is above its target, bool (row_shape)."""
    rows = torch.zeros(problem.row_shape, dtype=torch.bool)
    for output in problem.outputs:
        bad = ~(found[output].radius <= targets[output])
        if bad.numel():
            rows |= bad.reshape(*problem.row_shape, -1).any(-1)
    return rows & ~problem.undetermined()


def _put(
    problem: Problem, found: dict[str, Enclosure], part: Mapping[str, Enclosure], index: torch.Tensor
) -> None:
    """Write the rows of ``part`` at the flat row positions ``index`` of ``found``, in place."""
    rows, count = len(index), math.prod(problem.row_shape)
    for name, enclosure in part.items():
        into = found[name]
        into.value.view(count, -1)[index] = enclosure.value.reshape(rows, -1)
        into.radius.view(count, -1)[index] = enclosure.radius.reshape(rows, -1)


def reference(
    family: str,
    *tensors: torch.Tensor,
    arithmetic: str = "auto",
    tolerance: float | Mapping[str, float] | None = None,
    **options: Any,
) -> Enclosure | tuple[Enclosure, ...]:
    """The exact outputs of a family as enclosures: |exact − value| ≤ radius for every element.

    Args:
        family: a name of the contract, such as "softmax".
        tensors: the positional tensors of the call in layout bhnd, float16 to float64; taken exactly.
        arithmetic: "auto" certifies each element to 2⁻⁴⁰ of its gauge (Σ p|v| for attention, |y| + 1 for a
            log-sum-exp) or 2⁻¹⁴⁹, whichever is larger, by the cheapest means; "float64", "arb" (128 bits) and
            "mpmath" (50 digits, whose radius is an estimate) evaluate once and give the radius that comes
            out.
        tolerance: with "auto", a relative accuracy (of the value) that is also asked, or a table with
            "relative" and "absolute" of which the larger counts. Below 2⁻⁵², what float64 can carry, it
            cannot be met.
        options: keywords of the call, and ``causal_alignment``.

    Returns:
        One enclosure, or a tuple where the call returns several outputs (o and lse).

    Raises:
        ContractError: a wrong family, shape, dtype or option; the message names it.
        CertificationError: the accuracy asked could not be reached.
    """
    if arithmetic not in _NAMES:
        raise ContractError(f"arithmetic={arithmetic!r}: expected one of {', '.join(_NAMES)}")
    problem = family_of(family).problem(*tensors, **options)
    if arithmetic == "auto":
        outputs: Mapping[str, Enclosure] = certify(problem, _targets(problem, tolerance)).outputs
    else:
        if tolerance is not None:
            raise ContractError(
                f"tolerance={tolerance!r} is met by arithmetic='auto' only, not {arithmetic!r}"
            )
        chosen: dict[str, Arithmetic[Any]] = {
            "mpmath": MpmathArithmetic(),
            "arb": ArbArithmetic(PRECISIONS[0]),
            "float64": EnclosureArithmetic(),
        }
        outputs = evaluate(problem, chosen[arithmetic])
    unknown = problem.undetermined()
    result = tuple(_without(outputs[name], unknown) for name in problem.outputs)
    return result if len(result) > 1 else result[0]


def _without(enclosure: Enclosure, unknown: torch.Tensor) -> Enclosure:
    """NaN of infinite radius in rows that see a non-finite input."""
    where = broadcast_mask(unknown, tuple(enclosure.value.shape))
    return Enclosure(
        enclosure.value.masked_fill(where, torch.nan), enclosure.radius.masked_fill(where, torch.inf)
    )


def _targets(problem: Problem, tolerance: float | Mapping[str, float] | None) -> Targets:
    if tolerance is None:
        table: dict[str, float] = {}
    elif isinstance(tolerance, Mapping):
        table = dict(tolerance)
    else:
        table = {"relative": tolerance}
    for key, value in table.items():
        if (
            key not in ("relative", "absolute")
            or not isinstance(value, (int, float))
            or not 0 < value < float("inf")
        ):
            raise ContractError(
                f"tolerance {key}={value!r}: expected positive 'relative' and 'absolute' numbers"
            )
    if 0 < table.get("relative", 1.0) < 2.0**-52 and "absolute" not in table:
        raise ContractError(
            f"tolerance={tolerance!r} is below 2**-52, finer than the float64 value that carries it"
        )

    def asked(found: Mapping[str, Enclosure]) -> dict[str, torch.Tensor]:
        targets = {}
        for output in problem.outputs:
            size = found[output].value.abs().nan_to_num(posinf=0.0)
            target = (_DEFAULT_RELATIVE * problem.gauge(output, found)).clamp(min=_SMALLEST)
            if table:
                finer = torch.maximum(
                    size * table.get("relative", 0.0), torch.tensor(table.get("absolute", 0.0))
                )
                target = torch.minimum(target, finer.clamp(min=_SMALLEST))
            targets[output] = target
        return targets

    return asked
