"""Gradients of the mLSTM's quadratic form over any arithmetic, block of rows by block of rows.

The final state is D rows more, with cotangents dC' of Σ P v and dn' of Σ P and no denominator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.families.mlstm_rows import Rows, placed, summed
from attnproof.properties.families.mlstm_states import joined
from attnproof.properties.families.mlstm_weights import BLOCK, after, blocks

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem

__all__ = ["gradients"]


def gradients(
    a: Arithmetic[V], problem: MLSTMProblem, cotangents: Mapping[str, torch.Tensor]
) -> dict[str, V]:
    """dq, dk, dv, di, df and those of an initial state; see :mod:`attnproof.properties.families.mlstm`.

    ``cotangents`` has finite tensors for some or all of o, state and n.
    """
    batch, heads, length = problem.sizes[:3]
    whole = {name: zeros(a, (batch, heads, length, size)) for name, size in problem.widths.items()}
    initial: dict[str, list[V]] = {"dinitial_state": [], "dinitial_n": []}
    for s, (start, part) in enumerate(problem.parts()):
        asked = problem.part_cotangents(s, cotangents)
        found = _of_sequence(a, part, asked)
        for name, rows in initial.items():
            rows.append(found.pop(name))
        for name, x in found.items():
            whole[name] = a.add(whole[name], placed(a, x, start, length))
    # The derivative of log σ(f) is σ(−f), and 0 for f = −∞.
    slope = a.sigmoid(a.exact(-problem.gates.f.double()[..., None]))
    whole["df"] = a.masked(a.mul(whole["df"], slope), ~problem.gates.cut[..., None])
    if problem.initial is not None:
        whole |= {name: joined(a, rows) for name, rows in initial.items()}
    return {name: a.reshape(x, problem.input_shape(name.removeprefix("d"))) for name, x in whole.items()}


def zeros(a: Arithmetic[V], shape: tuple[int, ...]) -> V:
    """Zeros of a shape."""
    return a.exact(torch.zeros(shape, dtype=torch.float64))


def _of_sequence(
    a: Arithmetic[V], problem: MLSTMProblem, cotangents: Mapping[str, torch.Tensor]
) -> dict[str, V]:
    """Gradients of one part of a call, df still by log σ(f); of its initial state (B, H, D, E or 1)."""
    batch, heads, length, width, value_width = problem.sizes
    total = {name: zeros(a, (batch, heads, length, size)) for name, size in problem.widths.items()}
    final = (cotangents["state"], cotangents["n"][..., None])
    if not length:
        # The final state is the initial one.
        return {**total, "dinitial_state": a.exact(final[0]), "dinitial_n": a.exact(final[1])}
    total["dinitial_state"] = zeros(a, (batch, heads, width, value_width))
    total["dinitial_n"] = zeros(a, (batch, heads, width, 1))

    def add(terms: list[tuple[str, int, V]]) -> None:
        for name, start, x in terms:
            x = x if name.startswith("dinitial") else placed(a, x, start, length)
            total[name] = a.add(total[name], x)

    for first, stop in blocks(length):
        rows = Rows.of(a, problem, first, stop)
        do = a.exact(cotangents["o"][:, :, first:stop])
        add(_of_rows(a, rows, *_numerator_and_denominator(a, rows, do)))
    if any(bool(x.any()) for x in final):
        add(_of_rows(a, Rows.final(a, problem)[0], a.exact(final[0]), a.exact(final[1])))
    return total


def _of_rows(a: Arithmetic[V], rows: Rows[V], dvalues: V, dtotal: V) -> list[tuple[str, int, V]]:
    """What some rows add, of cotangents of Σ P v and Σ P: (gradient, first position, rows of it)."""
    problem, n = rows.problem, rows.normaliser(a)
    found, dq, own, before = [], [], None, []
    for tile in rows.tiles:
        g = a.matmul(dvalues, a.transpose(rows.values(a, tile)))
        total = a.matmul(dtotal, a.transpose(n)) if tile.initial and n is not None else dtotal
        g = a.add(g, total)
        ds = a.scaled(a.mul(tile.e, g), rows.scale)
        weighted = a.mul(tile.p, g)
        dv = a.matmul(a.transpose(tile.p), dvalues)
        if tile.initial:
            dq.append(ds)
            found += [("dinitial_state", 0, dv), ("dinitial_n", 0, a.matmul(a.transpose(tile.p), dtotal))]
        else:
            dk = a.transpose(ds) if rows.q is None else a.matmul(a.transpose(ds), rows.q)
            if rows.q is not None:
                dq.append(a.matmul(ds, a.exact(problem.k[:, :, tile.start : tile.stop])))
            di = a.sum(a.transpose(weighted))
            found += [("dk", tile.start, dk), ("dv", tile.start, dv), ("di", tile.start, di)]
        if not tile.initial and tile.stop == rows.stop:
            own = (tile.start, weighted)
        else:
            before.append(weighted)
    assert own is not None
    start, inside = own
    found.append(("df", start, _own_gates(a, rows, inside, before)))
    if start:
        found.append(("df", 0, _earlier_gates(a, before)))
    if rows.q is not None:
        found.append(("dq", rows.first, summed(a, dq)))
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


def _own_gates(a: Arithmetic[V], rows: Rows[V], inside: V, before: list[V]) -> V:
    """Σ_{i ≥ t} Σ_{j < t} dD_ij for the gates t of the rows' own block, (B, H, columns, 1).

    ``inside`` is dD of the block's columns, ``before`` of columns before it and of the initial state.
    """
    if rows.q is None:
        # All are rows of the last position.
        inside, before = (_column_sums(a, inside), [_column_sums(a, x) for x in before])
    batch, heads, count, columns = a.shape(inside)
    gates = torch.arange(columns)
    places = gates[columns - count :]
    across = (places[:, None, None] >= gates) & (gates[None, :, None] < gates)
    flat = a.reshape(inside, (batch, heads, 1, count * columns))
    own = a.matmul(flat, a.exact(across.double().reshape(count * columns, columns)))
    found = a.reshape(own, (batch, heads, columns, 1))
    later = a.exact((places[None, :] >= gates[:, None]).double())
    for x in before:
        found = a.add(found, a.matmul(later, a.sum(x)))
    return found


def _column_sums(a: Arithmetic[V], x: V) -> V:
    """Sums over the rows of (…, R, C), (…, 1, C)."""
    return a.transpose(a.sum(a.transpose(x)))


def _earlier_gates(a: Arithmetic[V], before: list[V]) -> V:
    """Σ_i Σ_{j < t} dD_ij for the gates t before the rows' block, (B, H, first, 1).

    ``before`` is dD of the columns before it, and of the initial state, which is before all gates.
    """
    batch, heads, _, first = a.shape(before[0])
    count = first // BLOCK
    columns = a.reshape(a.sum(a.transpose(before[0])), (batch, heads, count, BLOCK))
    within = a.matmul(columns, a.exact(after(BLOCK).mT))
    totals = a.reshape(a.sum(columns), (batch, heads, 1, count))
    beyond = a.reshape(a.matmul(totals, a.exact(after(count).mT)), (batch, heads, count, 1))
    found = a.reshape(a.add(within, beyond), (batch, heads, first, 1))
    for x in before[1:]:
        found = a.add(found, a.sum(_column_sums(a, x)))
    return found
