r"""Causal softmax with one logit a position that decays with age: what ``prefix_scan`` and ``rwkv4`` share.

    D_tj = s_j + (t − 1 − j) w for j < t,   D_tt = s_t + c,   o_t = Σ_{j≤t} e^{D_tj} v_j / Σ_{j≤t} e^{D_tj},

with one log decay w ≤ 0 and one bonus c a head (both 0 for ``prefix_scan``). An initial state (m₀, u₀, w₀)
adds e^{m₀ + tw} u₀ to the denominator and e^{m₀ + tw} w₀ to the numerator of row t = 0, 1, …; the state after
N positions is m = max(m₀ + Nw, max_j D_j), u = e^{m₀ + Nw − m} u₀ + Σ_j e^{D_j − m} and likewise w, with
D_j = s_j + (N − 1 − j) w: no bonus. Sources: theory.md AAR-1, AAR-2, RWK-1.

Rows are evaluated in blocks over all columns, each after its own maximum is subtracted, so that no exponent
is positive and nothing is lost by a decay of −1000. Gradients: ``decayed_softmax_gradients``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import broadcast_mask
from attnproof.properties.budgets.decayed_softmax import DROWNED, output_budget
from attnproof.properties.budgets.decayed_softmax_states import state_budgets
from attnproof.properties.budgets.logit_errors import LogitErrors
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.contract import Contract
from attnproof.properties.families.base import Budget, Problem
from attnproof.properties.families.decayed_softmax_gradients import gradients, state_cotangents
from attnproof.properties.families.scan_states import Initial, largest
from attnproof.properties.families.sequences import state_dtype
from attnproof.properties.families.state_layout import scattered, unknown, unsampled

__all__ = ["DecayedSoftmax", "Rows"]

# Pairs of a block of rows by all columns, over batch and heads: a tensor of them takes 8 MB.
_PAIRS = 2**20
# Sums of more columns than this are taken in parts of COLUMNS, so that radii do not grow with their number.
_MANY, COLUMNS = 512, 64


@dataclass(frozen=True, eq=False)
class Rows(Generic[V]):
    """Weights e^{D − shift} of the rows ``places`` (int64; N for the final state) by all columns.

    Attributes:
        e: (B, H, R, C), 0 where a column is not seen.
        start: (B, H, R, 1), of the initial state, or None; 0 too where a state without mass is ``DROWNED``
            above the shift.
        shift: float64 (B, H, R, 1), the largest D up to its rounding; any shift gives the same o.
    """

    places: torch.Tensor
    e: V
    start: V | None
    shift: torch.Tensor


@dataclass(frozen=True, eq=False)
class DecayedSoftmax(Problem):
    """Finite inputs of one call; a family adds its logits.

    Attributes:
        v: (B, H, N, E); decay: (H,) ≤ 0, or None; bonus: (H,), or None; non-finite entries are 0.
        initial: an initial state, or None.
        poisoned: bool (B, H, N), rows that see a non-finite input; tainted: bool (B, H), heads that hold one;
            spoilt: bool (B, H), final states that see one.
        with_state: whether the call returns the final state.
        sample: int64, the positions of long calls that are judged; None where all are.
    """

    v: torch.Tensor
    decay: torch.Tensor | None
    bonus: torch.Tensor | None
    initial: Initial | None
    poisoned: torch.Tensor
    tainted: torch.Tensor
    spoilt: torch.Tensor
    with_state: bool
    sample: torch.Tensor | None

    row_shape = (1,)
    family = ""
    # What the call names m, u and w of its states, and the order in which it returns them.
    state_names = ("m", "u", "w")
    state_order = ("m", "u", "w")
    # The inputs that have a gradient, in the order of the call.
    parameters: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def logits(self, arithmetic: Arithmetic[V], width: int) -> V:
        """s, (B, H, 1, width), with any numbers after the first N."""

    @abstractmethod
    def logit_gradients(self, arithmetic: Arithmetic[V], ds: V) -> dict[str, V]:
        """Gradients by what the logits are made of, by its name, from that by the logits (B, H, N, 1)."""

    @abstractmethod
    def logit_errors(self, r: Roundings) -> LogitErrors:
        """Errors of s in a kernel with roundings ``r``."""

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """("o",), and the final state where it is returned."""
        return ("o", *self.state_order) if self.with_state else ("o",)

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """All inputs, an initial state's level apart; none of a long call."""
        if self.sample is not None:
            return ()
        level = self.state_names[0]
        states = () if self.initial is None else self.state_order
        return (*self.parameters, *(f"initial_{name}" for name in states if name != level))

    def input_shape(self, name: str) -> tuple[int, ...]:
        """That of the state for an initial one; a family adds its parameters."""
        return self.shape(name.removeprefix("initial_"))

    def input_dtype(self, name: str) -> torch.dtype:
        """The dtype of the call, or of its states."""
        return state_dtype(self.dtype) if name.startswith("initial_") else self.dtype

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.v.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, N, E."""
        batch, heads, length, width = self.v.shape
        return batch, heads, length, width

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, an initial m of −inf apart."""
        return bool(self.tainted.any() | self.poisoned.any() | self.spoilt.any())

    def row_axes(self, output: str) -> int:
        """All axes but the last."""
        return len(self.shape(output)) - 1

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N, E) of o (without the axis E where values are numbers), (B, H) of m and u."""
        batch, heads, length, width = self.sizes
        m, u, w = self.state_names
        return {
            "o": (batch, heads, length, width),
            m: (batch, heads),
            u: (batch, heads),
            w: (batch, heads, width),
        }[output]

    @property
    def columns(self) -> int:
        """How many columns a block has: N, raised to full parts where there are many."""
        length = self.sizes[2]
        return length if length <= _MANY else -(-length // COLUMNS) * COLUMNS

    def runs(self) -> Iterator[torch.Tensor]:
        """The rows that are judged, block by block, int64."""
        batch, heads, length, _ = self.sizes
        places = torch.arange(length) if self.sample is None else self.sample
        size = max(_PAIRS // max(batch * heads * self.columns, 1), 1)
        for start in range(0, len(places), size):
            yield places[start : start + size]

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, H, N, X) with rows of 0 after the last, (B, H, C, X)."""
        return torch.nn.functional.pad(tensor, (0, 0, 0, self.columns - tensor.shape[2]))

    def log_weights(self, a: Arithmetic[V], places: torch.Tensor) -> tuple[V, torch.Tensor, torch.Tensor]:
        """D of rows, which columns they see, bool (R, C), and t − 1 − j, 0 where that is negative.

        Without decay and bonus D is (B, H, 1, C), one row for all.
        """
        j, t = torch.arange(self.columns), places[:, None]
        seen = (j <= t) & (j < self.sizes[2])
        age = (t - 1 - j).clamp(min=0).double() * seen
        d = self.logits(a, self.columns)
        if self.decay is not None:
            d = a.add(d, a.mul(a.exact(age), a.exact(self.decay.reshape(1, -1, 1, 1))))
        if self.bonus is not None:
            own = (j == t).double()
            d = a.add(d, a.mul(a.exact(own), a.exact(self.bonus.reshape(1, -1, 1, 1))))
        return d, seen, age

    def first_weight(self, a: Arithmetic[V], places: torch.Tensor) -> V | None:
        """m₀ + t w of the initial state, (B, H, R, 1)."""
        if self.initial is None:
            return None
        batch, heads = self.sizes[:2]
        m = a.exact(self.initial.m.reshape(batch, heads, 1, 1).expand(batch, heads, len(places), 1))
        if self.decay is None:
            return m
        steps = a.exact(places.double().reshape(-1, 1))
        return a.add(m, a.mul(steps, a.exact(self.decay.reshape(1, -1, 1, 1))))

    def rows(self, a: Arithmetic[V], places: torch.Tensor) -> Rows[V]:
        """The weights of some rows."""
        d, seen, _ = self.log_weights(a, places)
        shift = a.midpoint(d).masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
        first, kept = self.first_weight(a, places), None
        if first is not None and self.initial is not None:
            x = a.midpoint(first)
            massive = (self.initial.u > 0)[..., None, None].expand(shift.shape)
            present = self.initial.present[..., None, None].expand(shift.shape)
            shift = torch.maximum(shift, x.masked_fill(~(present & massive), -torch.inf))
            kept = present & (massive | (x - shift <= DROWNED))
        m = a.exact(shift)
        e = a.masked(a.exp(a.masked(a.sub(d, m), seen)), seen)
        start = None
        if first is not None and kept is not None:
            start = a.masked(a.exp(a.masked(a.sub(first, m), kept)), kept)
        return Rows(places, e, start, shift)

    def sums(self, a: Arithmetic[V], rows: Rows[V], *, absolute: bool = False) -> tuple[V, V]:
        """Σ e v (B, H, R, E), of |v| if ``absolute``, and Σ e (B, H, R, 1), the initial state included."""
        batch, heads, _, width = self.sizes
        v = self.padded(self.v)
        num = _product(a, rows.e, a.exact(v.abs() if absolute else v))
        den = _product(a, rows.e, a.exact(torch.ones(*v.shape[:3], 1, dtype=torch.float64)))
        if rows.start is not None and self.initial is not None:
            w = self.initial.w.reshape(batch, heads, 1, width)
            num = a.add(num, a.mul(rows.start, a.exact(w.abs() if absolute else w)))
            den = a.add(den, a.mul(rows.start, a.exact(self.initial.u.reshape(batch, heads, 1, 1))))
        return num, den

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o, and the final state; with ``gauges`` Σ p|v| and the like for the state."""
        a, (batch, heads, length, width), done = arithmetic, self.sizes, 0
        count = length if self.sample is None else len(self.sample)
        names = ("o", "gauge:o") if gauges else ("o",)
        zero = a.exact(torch.zeros(batch, heads, count, width, dtype=torch.float64))
        result = dict.fromkeys(names, zero)
        for places in self.runs():
            rows = self.rows(a, places)
            for name in names:
                found = a.div(*self.sums(a, rows, absolute=name != "o"))
                result[name] = a.add(result[name], _placed(a, found, done, count))
            done += len(places)
        for name, x in result.items():
            result[name] = unknown(a, scattered(a, x, self.sample, length), self.sample)
        if self.with_state:
            result |= self.final_state(a)
            if gauges:
                result |= {f"gauge:{name}": x for name, x in self.final_state(a, absolute=True).items()}
        return result

    def final_state(self, a: Arithmetic[V], *, absolute: bool = False) -> dict[str, V]:
        """m (B, H), u (B, H) and w (B, H, E); with ``absolute`` Σ e|v| in place of w."""
        batch, heads, _, width = self.sizes
        rows, m = self.final_rows(a)
        w, u = self.sums(a, rows, absolute=absolute)
        found = (
            a.reshape(m, (batch, heads)),
            a.reshape(u, (batch, heads)),
            a.reshape(w, (batch, heads, width)),
        )
        return {name: a.reshape(x, self.shape(name)) for name, x in zip(self.state_names, found, strict=True)}

    def final_rows(self, a: Arithmetic[V]) -> tuple[Rows[V], V]:
        """The weights e^{D − m} of the final state, a row at N, and m (B, H, 1, 1)."""
        batch, heads, length, _ = self.sizes
        last = torch.tensor([length])
        d, seen, _ = self.log_weights(a, last)
        parts = [(d, seen.expand(batch, heads, 1, self.columns))] if length else []
        first = self.first_weight(a, last)
        if first is not None and self.initial is not None:
            parts.append((first, self.initial.present[..., None, None]))
        m = largest(a, parts, (batch, heads, 1, 1))
        held = [a.masked(a.exp(a.masked(a.sub(x, m), kept)), kept) for x, kept in parts]
        if not length:
            held.insert(0, a.exact(torch.zeros(batch, heads, 1, 0, dtype=torch.float64)))
        return Rows(last, held[0], held[1] if len(held) > 1 else None, a.midpoint(m)), m

    def state_cotangents(
        self, cotangents: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :func:`attnproof.properties.families.decayed_softmax_gradients.state_cotangents`."""
        return state_cotangents(self, cotangents)

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """See :func:`attnproof.properties.families.decayed_softmax_gradients.gradients`."""
        return gradients(self, arithmetic, cotangents)

    @property
    def per_head(self) -> dict[str, str]:
        """Names of the call's decay and bonus, by "w" and "c"."""
        return {}

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which is one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """The largest logit of none is −∞."""
        if output != self.state_names[0] or self.sizes[2]:
            return {}
        return {-torch.inf: self.empty}

    @property
    def empty(self) -> torch.Tensor:
        """Final states that nothing was written to, bool (B, H)."""
        if self.sizes[2]:
            return torch.zeros(self.sizes[:2], dtype=torch.bool)
        return torch.ones(self.sizes[:2], dtype=torch.bool) if self.initial is None else ~self.initial.present

    def undetermined(self) -> torch.Tensor:
        """No unit; what sees a non-finite input is closed element by element in :meth:`budgets`."""
        return torch.tensor([False])

    def closed(self, output: str) -> torch.Tensor:
        """Elements that see a non-finite input, bool of the output's shape."""
        return broadcast_mask(self.poisoned if output == "o" else self.spoilt, self.shape(output))

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ p|v|, 1 + |m|, u and Σ e|v|; ∞ in rows that are not judged."""
        if output == self.state_names[0]:
            return reference[output].value.abs().nan_to_num(posinf=0.0) + 1.0
        bound = reference.get(f"gauge:{output}", reference[output])
        gauge = (bound.value.abs() - bound.radius).clamp(min=0.0)
        if output != "o" or self.sample is None:
            return gauge
        left = self.unjudged
        return torch.where(left if gauge.dim() == 4 else left[:, 0], torch.inf, gauge)

    @property
    def unjudged(self) -> torch.Tensor:
        """Positions that are not in the sample, bool (N, 1)."""
        return unsampled(self.sample, self.sizes[2])

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """See ``attnproof.properties.budgets.decayed_softmax`` and ``decayed_softmax_states``."""
        states = state_budgets(self, reference, contract) if self.with_state else {}
        return {"o": output_budget(self, reference, contract), **states}

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or the mean of the values so far."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        count = torch.arange(1, self.sizes[2] + 1, dtype=torch.float64)[:, None]
        mean = (self.v.double().cumsum(2) / count).reshape(o.shape)
        return [
            f"accuracy: {what} is within the budget of every row"
            for other, what in ((torch.zeros_like(o), "zero"), (mean, "the mean of the values so far"))
            if bool((((o - other).abs() <= budget.certain) | ~judged).all())
        ]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """The positions of the largest weights."""
        length = self.sizes[2]
        if output != "o":
            return f"row ({', '.join(map(str, row))}) of the final {output} after {length} positions"
        b, h = row[:2]
        # An output (B, H, N) has its positions on the axis that is no row's.
        place = row[2] if len(row) > 2 else length - 1
        found = self.rows(EnclosureArithmetic(), torch.tensor([place]))
        e, start = found.e.value[b, h, 0], None if found.start is None else float(found.start.value[b, h])
        p = e / e.sum()
        listed = ", ".join(f"{j} (p = {float(p[j]):.3g})" for j in p.topk(min(3, place + 1)).indices.tolist())
        initial = "" if start is None else f"; the initial state enters with e^(m₀ − m) = {start:.3g}"
        where = f"row (batch {b}, head {h}, position {place})"
        return f"{where} sees {place + 1} positions; most weight among them: {listed}{initial}"


def _product(a: Arithmetic[V], left: V, right: V) -> V:
    """(…, R, C) × (…, C, X); many columns in parts, so that the radius does not grow with their number."""
    batch, heads, rows, columns = a.shape(left)
    if columns <= _MANY:
        return a.matmul(left, right)
    count, width = columns // COLUMNS, a.shape(right)[-1]
    left = a.permute(a.reshape(left, (batch, heads, rows, count, COLUMNS)), (0, 1, 3, 2, 4))
    terms = a.matmul(left, a.reshape(right, (batch, heads, count, COLUMNS, width)))
    return a.reshape(a.sum(a.permute(terms, (0, 1, 3, 4, 2))), (batch, heads, rows, width))


def _placed(a: Arithmetic[V], x: V, first: int, length: int) -> V:
    """Rows (…, r, X) at the positions ``first`` onwards of ``length`` rows that are otherwise 0."""
    rows = a.shape(x)[-2]
    if rows == length:
        return x
    select = (torch.arange(length)[:, None] == torch.arange(first, first + rows)[None, :]).double()
    return a.matmul(a.exact(select), x)
