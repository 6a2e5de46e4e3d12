"""Gradients of the mLSTM's quadratic form over any arithmetic, block of rows by block of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.families.mlstm_rows import Rows, placed, summed
from attnproof.properties.families.mlstm_weights import BLOCK, after, blocks

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem

__all__ = ["gradients"]


def gradients(a: Arithmetic[V], problem: MLSTMProblem, cotangent: torch.Tensor) -> dict[str, V]:
    """dq, dk, dv, di, df by the formulas of :mod:`attnproof.properties.families.mlstm`."""
    batch, heads, length, width, value_width = problem.sizes
    widths = {"dq": width, "dk": width, "dv": value_width, "di": 1, "df": 1}
    total = {
        name: a.exact(torch.zeros(batch, heads, length, size, dtype=torch.float64))
        for name, size in widths.items()
    }
    for first, stop in blocks(length):
        for name, start, x in _of_rows(a, Rows.of(a, problem, first, stop), cotangent[:, :, first:stop]):
            total[name] = a.add(total[name], placed(a, x, start, length))
    # The derivative of log σ(f) is σ(−f), and 0 for f = −∞.
    slope = a.sigmoid(a.exact(-problem.gates.f.double()[..., None]))
    total["df"] = a.masked(a.mul(total["df"], slope), ~problem.gates.cut[..., None])
    return {name: a.reshape(x, problem.input_shape(name.removeprefix("d"))) for name, x in total.items()}


def _of_rows(a: Arithmetic[V], rows: Rows[V], cotangent: torch.Tensor) -> list[tuple[str, int, V]]:
    """What a block of rows adds: (gradient, first position, rows of it); df still by log σ(f)."""
    problem = rows.problem
    q = a.exact(problem.q[:, :, rows.first : rows.stop])
    dvalues, dtotal = _numerator_and_denominator(a, rows, a.exact(cotangent))
    found, dq, dd = [], [], []
    for tile in rows.tiles:
        g = a.add(a.matmul(dvalues, a.transpose(rows.values(a, tile))), dtotal)
        ds = a.scaled(a.mul(tile.e, g), problem.scale)
        weighted = a.mul(tile.p, g)
        dq.append(a.matmul(ds, a.exact(problem.k[:, :, tile.start : tile.stop])))
        found += [
            ("dk", tile.start, a.matmul(a.transpose(ds), q)),
            ("dv", tile.start, a.matmul(a.transpose(tile.p), dvalues)),
            ("di", tile.start, a.sum(a.transpose(weighted))),
        ]
        dd.append(weighted)
    found += [("dq", rows.first, summed(a, dq)), ("df", rows.first, _own_gates(a, dd))]
    if rows.first:
        found.append(("df", 0, _earlier_gates(a, dd[0])))
    return found


def _numerator_and_denominator(a: Arithmetic[V], rows: Rows[V], do: V) -> tuple[V, V]:
    """dO/N (B, H, rows, E) and δ (B, H, rows, 1), for the stabilised sums Σ P v and Σ P."""
    values, total = rows.sums(a)
    denominator, excess = rows.denominator(a, total)
    factor = a.div(rows.bound(a)[0], denominator)
    o = a.mul(values, factor)
    # 1/2 at a tie: step is 0 there from either side
    share = a.scaled(a.add(a.step(excess), a.sub(_ones(a, excess), a.step(a.scaled(excess, -1.0)))), 0.5)
    sign = a.sub(a.step(total), a.step(a.scaled(total, -1.0)))
    lost = a.mul(a.mul(a.sum(a.mul(do, o)), factor), a.mul(share, sign))
    return a.mul(do, factor), a.scaled(lost, -1.0)


def _ones(a: Arithmetic[V], like: V) -> V:
    return a.exact(torch.ones(a.shape(like), dtype=torch.float64))


def _own_gates(a: Arithmetic[V], dd: list[V]) -> V:
    """Σ_{i ≥ t} Σ_{j < t} dD_ij for the gates t of the rows' own block, (B, H, rows, 1)."""
    batch, heads, rows, columns = a.shape(dd[-1])
    places = torch.arange(rows)
    across = (places[:, None, None] >= places) & (places[None, :, None] < places)
    flat = a.reshape(dd[-1], (batch, heads, 1, rows * columns))
    own = a.matmul(flat, a.exact(across.double().reshape(rows * columns, rows)))
    found = a.reshape(own, (batch, heads, rows, 1))
    if len(dd) == 1:
        return found
    from_before = a.sum(dd[0])
    later = (places[None, :] >= places[:, None]).double()
    return a.add(found, a.matmul(a.exact(later), from_before))


def _earlier_gates(a: Arithmetic[V], dd: V) -> V:
    """Σ_i Σ_{j < t} dD_ij for the gates t before the rows' block, (B, H, first, 1)."""
    batch, heads, _, first = a.shape(dd)
    count = first // BLOCK
    columns = a.reshape(a.sum(a.transpose(dd)), (batch, heads, count, BLOCK))
    within = a.matmul(columns, a.exact(after(BLOCK).mT))
    totals = a.reshape(a.sum(columns), (batch, heads, 1, count))
    beyond = a.reshape(a.matmul(totals, a.exact(after(count).mT)), (batch, heads, count, 1))
    return a.reshape(a.add(within, beyond), (batch, heads, first, 1))
