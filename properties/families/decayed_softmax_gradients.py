r"""Gradients of ``prefix_scan`` and ``rwkv4``, the largest exponents of their states held constant.

o and any later use of a final state depend on an initial one only through e^{m₀} u₀ and e^{m₀} w₀. With every
level m held constant as it is made, and no gradient by an initial level, the two terms that are left out
cancel, and gradients through a hand-over are those of the whole sequence. Every row asks its weights alike:

    g_tj = G_t·v_j + γ_t,   dS_tj = p_tj g_tj,   ds_j = Σ_t dS_tj,   dv_j = Σ_t p_tj G_t,
    dc = Σ_t dS_tt,   dw = Σ_t Σ_{j<t} (t − 1 − j) dS_tj + Σ_t t σ_t (G_t·w₀ + γ_t u₀),
    dw₀ = Σ_t σ_t G_t,   du₀ = Σ_t σ_t γ_t,

with p_tj = e^{D_tj − L_t}, σ_t = e^{m₀ + tw − L_t}, G_t = dO_t and γ_t = −dO_t·o_t in the rows t < N of o, L
the log of their denominator; and one row t = N of the final state, with L = m_N and its cotangents dW and dU
for G and γ. After no positions the final state is the initial one, and so are their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.contract import ContractError
from attnproof.properties.families.gradients import reduced

if TYPE_CHECKING:
    from attnproof.properties.families.decayed_softmax import DecayedSoftmax

__all__ = ["gradients", "state_cotangents"]


def state_cotangents(
    problem: DecayedSoftmax, cotangents: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """dU (B, H, 1, 1) and dW (B, H, 1, E) of the final state, float64; None where no entry differs from 0.

    Raises:
        ContractError: a cotangent of the level, which has no gradient.
    """
    batch, heads, _, width = problem.sizes
    level, mass, sums = problem.state_names
    given = {name: x for name, x in cotangents.items() if name != "o" and bool((x != 0).any())}
    if level in given:
        raise ContractError(
            f"{problem.family}: a cotangent of the final state's {level} holds entries other than 0; {level} "
            f"is held constant: give cotangents of {mass} and {sums}, and of {level} none"
        )
    if not given:
        return None
    zero = torch.zeros(batch, heads, width, dtype=torch.float64)
    du = given.get(mass, zero[..., :1]).double().reshape(batch, heads, 1, 1)
    return du, given.get(sums, zero).double().reshape(batch, heads, 1, width)


def gradients(
    problem: DecayedSoftmax, a: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
) -> dict[str, V]:
    """Gradients of Σ outputs·cotangents by every differentiated input, "d" + its name, in its shape.

    Raises:
        ContractError: a cotangent of the level.
    """
    batch, heads, length, width = problem.sizes
    final, total = state_cotangents(problem, cotangents), _Sums(problem, a)
    do = cotangents.get("o", torch.zeros(problem.shape("o"))).reshape(batch, heads, length, width)
    for places in problem.runs():
        rows, given = problem.rows(a, places), a.exact(do[:, :, places])
        num, den = problem.sums(a, rows)
        delta = a.sum(a.mul(given, a.div(num, den)))
        start = None if rows.start is None else a.div(rows.start, den)
        total.add(places, (a.div(rows.e, den), start), (given, a.scaled(delta, -1.0)))
    if final is not None and length:
        rows, _ = problem.final_rows(a)
        total.add(rows.places, (rows.e, rows.start), (a.exact(final[1]), a.exact(final[0])))
    elif final is not None:
        total.sums |= {"u0": a.exact(final[0]), "w0": a.exact(final[1])}
    sums = total.sums
    if length != problem.columns:
        short = a.exact(torch.eye(length, problem.columns, dtype=torch.float64))
        sums |= {name: a.matmul(short, sums[name]) for name in ("v", "s")}
    found = {"v": sums["v"], **problem.logit_gradients(a, sums["s"])}
    found |= {name: sums[kind] for kind, name in problem.per_head.items()}
    _, mass, weighted = problem.state_names
    found |= {f"initial_{mass}": sums["u0"], f"initial_{weighted}": sums["w0"]}
    return {f"d{name}": a.reshape(found[name], problem.input_shape(name)) for name in problem.differentiated}


class _Sums(Generic[V]):
    """Sums over rows, block by block.

    Attributes:
        sums: "v" (B, H, C, E), "s" (B, H, C, 1), "w" and "c" (1, H, 1, 1) where the family has them, "u0"
            (B, H, 1, 1) and "w0" (B, H, 1, E).
    """

    def __init__(self, problem: DecayedSoftmax, a: Arithmetic[V]) -> None:
        batch, heads, _, width = problem.sizes
        self.problem, self.a = problem, a
        self.v = a.exact(problem.padded(problem.v))
        shapes = {"v": (batch, heads, problem.columns, width), "s": (batch, heads, problem.columns, 1)}
        shapes |= dict.fromkeys(problem.per_head, (1, heads, 1, 1))
        shapes |= {"u0": (batch, heads, 1, 1), "w0": (batch, heads, 1, width)}
        self.sums = {name: a.exact(torch.zeros(shape).double()) for name, shape in shapes.items()}

    def add(self, places: torch.Tensor, weights: tuple[V, V | None], asked: tuple[V, V]) -> None:
        """What the rows ``places`` add, of weights p (B, H, R, C) and σ (B, H, R, 1), with G and γ."""
        a, (p, start), (given, level) = self.a, weights, asked
        ds = a.mul(p, a.add(a.matmul(given, a.transpose(self.v)), level))
        ones = a.exact(torch.ones(len(places), 1, dtype=torch.float64))
        self._add("v", a.matmul(a.transpose(p), given))
        self._add("s", a.matmul(a.transpose(ds), ones))
        columns = torch.arange(self.problem.columns)
        age = (places[:, None] - 1 - columns).clamp(min=0).double()
        self._add_per_head("w", ds, age)
        self._add_per_head("c", ds, (places[:, None] == columns).double())
        initial = self.problem.initial
        if start is None or initial is None:
            return
        batch, heads, _, width = self.problem.sizes
        self._add("w0", a.matmul(a.transpose(start), given))
        self._add("u0", a.matmul(a.transpose(start), level))
        w, u = (a.exact(x.reshape(batch, heads, 1, size)) for x, size in ((initial.w, width), (initial.u, 1)))
        moved = a.mul(start, a.add(a.sum(a.mul(given, w)), a.mul(level, u)))
        self._add_per_head("w", moved, places[:, None].double())

    def _add(self, name: str, term: V) -> None:
        self.sums[name] = self.a.add(self.sums[name], term)

    def _add_per_head(self, name: str, ds: V, factor: torch.Tensor) -> None:
        """Σ of ds (B, H, R, X) times ``factor`` (R, X), over all but heads."""
        if name not in self.sums:
            return
        a, (batch, heads, rows, _) = self.a, self.a.shape(ds)
        term = a.sum(a.reshape(a.sum(a.mul(ds, a.exact(factor))), (batch, heads, 1, rows)))
        self._add(name, reduced(a, term, (1, heads, 1, 1)))
