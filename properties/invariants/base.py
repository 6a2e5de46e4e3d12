"""What an invariant is: further calls of a kernel whose exact results stand in a known relation to the first.

Every transformation is exact in the inputs' dtype, so the relation between exact results holds exactly, and
results of a kernel may miss it by no more than their budgets allow together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.views import VIEWS, lay_out, unit_last_stride

__all__ = [
    "LOG_2",
    "Balance",
    "Bounds",
    "Call",
    "Invariant",
    "Merge",
    "Plan",
    "Recipe",
    "Relation",
    "Select",
    "Term",
    "anything",
    "far_values",
    "generator",
    "grid_step",
    "other_view",
    "relaid",
    "rows_from",
    "same",
]

Select = Callable[[torch.Tensor], torch.Tensor]
"""Which elements of an output take part: from a tensor of the output's shape to one of the relation's."""

LOG_2 = (math.log(2.0), 2.0**-53)
"""log 2 and how far float64 is from it."""

# On a grid of 2⁻⁶ of the largest magnitude, a sum of two numbers takes at most 8 bits: what bfloat16 holds.
_GRID_BITS = 6


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the kernel.

    Attributes:
        words: in what it differs from the case, for messages.
        case, inputs: what is called; ``case`` has the shape and the options of ``inputs``.
        familiar: whether the values are of the kind on which thresholds of the probable budget were fitted;
            of other values only certain budgets judge.
        repeat: whether the call is made twice on the same tensors, to compare the bits.
    """

    words: str
    case: Case
    inputs: Inputs
    familiar: bool = True
    repeat: bool = False


@dataclass(frozen=True, eq=False)
class Term:
    """``factor`` times the selected elements of an output of the call with index ``call`` in the plan.

    Attributes:
        output: an output's name, or "d" + an input's for a gradient, which a kernel need not have.
        select: keeps the last axis where the output has one within its rows.
        summed: Σ over the last axis of what is selected, which goes.
    """

    call: int
    output: str
    factor: float = 1.0
    select: Select | None = None
    summed: bool = False


@dataclass(frozen=True, eq=False)
class Balance:
    """Σ factor · output = constant, element by element, in exact arithmetic.

    Attributes:
        terms: all of one shape once selected; no element of an output is selected twice by one term.
        constant: float64, broadcast to that shape, or a number; radius: how far it may be from the exact one.
        bitwise: the two terms, of factors 1 and −1, must be equal by value; or the one, of factor 1, to
            ``constant``.
    """

    terms: tuple[Term, ...]
    constant: torch.Tensor | float = 0.0
    radius: torch.Tensor | float = 0.0
    bitwise: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what is tied."""
        return tuple(term.output for term in self.terms)


@dataclass(frozen=True, eq=False)
class Merge:
    """The calls ``parts``, over disjoint sets of keys, merged by log-sum-exp give the call ``whole``."""

    whole: int
    parts: tuple[int, int]
    outputs = ("o", "lse")


@dataclass(frozen=True, eq=False)
class Bounds:
    """lower ≤ output ≤ upper in exact arithmetic; float64 tensors of the output's shape.

    With ``strict`` the kernel's own result must lie between them, whatever its budget allows.
    """

    call: int
    output: str
    lower: torch.Tensor
    upper: torch.Tensor
    strict: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """The name of what is bounded."""
        return (self.output,)


Relation = Balance | Merge | Bounds


@dataclass(frozen=True, eq=False)
class Plan:
    """Calls, the first of which the others are related to, and the relations."""

    calls: tuple[Call, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Recipe:
    """How an invariant is tried in one family.

    Attributes:
        fits: whether it applies, by the case and the contract alone (an estimate: ``build`` has the last
            word).
        build: the plan, or None where it does not apply.
    """

    fits: Callable[[Case, Contract], bool]
    build: Callable[[Case, Inputs, Contract], Plan | None]


@dataclass(frozen=True)
class Invariant:
    """A property of exact results that ties calls of a kernel to one another.

    Attributes:
        name: lower-case words joined by hyphens, as ``Contract.without`` names it.
        statement: what must hold, with its source.
        recipes: by family.
    """

    name: str
    statement: str
    recipes: Mapping[str, Recipe]

    @property
    def families(self) -> tuple[str, ...]:
        """The families that have it."""
        return tuple(self.recipes)

    def applicable(self, case: Case, contract: Contract) -> bool:
        """Whether it is worth trying on ``case``; makes no inputs."""
        recipe = self.recipes.get(case.family)
        if recipe is None or self.name in contract.without or not all(case.sizes.values()):
            return False
        return recipe.fits(case, contract)

    def variants(self, case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
        """The calls and their relations; None where it does not apply.

        Args:
            case, inputs: a call of the family, and its values in layout bhnd.
            contract: what the kernel promises and supports.
        """
        if not self.applicable(case, contract):
            return None
        return self.recipes[case.family].build(case, inputs, contract)


def anything(case: Case, contract: Contract) -> bool:
    """Fits every case."""
    return True


def generator(case: Case, name: str) -> torch.Generator:
    """Random choices of the invariant ``name`` on ``case``, the same each time."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {case.id}".encode()))


def relaid(values: torch.Tensor, view: str, name: str) -> torch.Tensor:
    """``values`` in fresh memory laid out by ``view``; contiguous where "broadcast" would lose values."""
    if view == "broadcast" and name in ("k", "v", "x") and values.numel():
        kept = 1 if values.dim() == 2 else 2
        first = values[(slice(0, 1),) * (values.dim() - kept)].expand(values.shape)
        if not bool(((values == first) | (values.isnan() & first.isnan())).all()):
            view = "contiguous"
    return lay_out(values, view, name)


def other_view(case: Case, inputs: Inputs, contract: Contract) -> str:
    """A memory layout that differs from the case's and that the contract accepts."""
    axes = max(tensor.dim() for tensor in inputs.tensors.values())
    usable = [
        view
        for view in VIEWS
        if view not in (case.view, "broadcast")
        and (not contract.supports.last_stride_one or unit_last_stride(view, axes))
    ]
    return usable[case.seed % len(usable)]


def grid_step(values: torch.Tensor) -> float | None:
    """The step of a grid on which the finite ``values`` and their sums with numbers of their size are exact.

    Of these numbers, none is larger than 2⁶ steps. None where twice the largest may overflow the dtype.
    """
    finite = values[values.isfinite()].double().abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    info = torch.finfo(values.dtype)
    if 4.0 * largest > info.max:
        return None
    exponent = math.ceil(math.log2(largest)) if largest else 0
    return max(2.0 ** (exponent - _GRID_BITS), info.smallest_normal)


def far_values(values: torch.Tensor) -> torch.Tensor:
    """Other values of the same size: of opposite sign and four times as large, or a quarter at the top."""
    grown = -4.0 * values
    return torch.where(grown.isfinite(), grown, values / -4.0)


def rows_from(start: int, stop: int, axis: int) -> Select:
    """Select the slice start…stop of an axis."""
    return lambda tensor: tensor.narrow(axis, start, stop - start)


def same(
    output: str,
    base: Select | None = None,
    variant: Select | None = None,
    *,
    call: int = 1,
    constant: torch.Tensor | float = 0.0,
    radius: torch.Tensor | float = 0.0,
    bitwise: bool = False,
) -> Balance:
    """The variant's selected elements are the base's, plus ``constant``."""
    terms = (Term(call, output, 1.0, variant), Term(0, output, -1.0, base))
    return Balance(terms, constant, radius, bitwise)
