"""Why tests of attention need fudge factors for dQ: the measurements behind docs/dq.md.

``python -m attnproof.dq`` (nox session ``dq``) measures, and writes the tables of docs/dq.md between their
markers, and the page's two plots beside it. ``--check`` writes nothing; it exits with 1 if a figure on the
page is not the one measured. Draws have fixed seeds. Figures have two digits, and another processor's float32
sums may flip single roundings: the check allows for 10 %.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnproof.dq_page import Table, compared, plots, written
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.claims.dq_budget import SOURCES, split, whole_variance
from attnproof.properties.claims.dq_replay import (
    COTANGENTS,
    VARIANTS,
    Call,
    Certified,
    Means,
    certify_call,
    draw,
    draw_uniform,
    eager,
    fudge_factor,
    once_rounded,
    replay,
)

__all__ = ["budgets", "closed_form", "main", "peers", "search", "shares", "sweep", "torch_gradient"]

DTYPES = (torch.float16, torch.bfloat16)
SIZES = (2, 64, 512, 64)
"""H, M, N and D = E of all measurements that do not say otherwise."""

MEANS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Means of K, in its standard deviations."""

VALUE_MEANS = (0.0, 4.0, 16.0)
UNIFORM = math.sqrt(3.0)
"""Mean over standard deviation of uniform [0, 1) numbers."""


def torch_gradient(call: Call, backend: SDPBackend) -> torch.Tensor:
    """dQ of torch's own attention by one of its backends."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v))
    with sdpa_kernel(backend):
        o = scaled_dot_product_attention(q, k, v, scale=call.scale)
    (dq,) = torch.autograd.grad(o, (q,), call.do)
    return dq


def peers(lengths: Sequence[int] = (127, 579, 2048), queries: Sequence[int] = (4, 143)) -> Table:
    """The largest factor that PyTorch's rule needs under PyTorch's inputs, by dtype and N.

    Baselines are torch's math backend, which rounds once, and eager operations, each of which rounds.
    """
    columns = ("dtype", "N", "3√N", "torch CPU flash", *VARIANTS, "stored O, eager baseline")
    rows: list[tuple[str | float, ...]] = []
    for dtype, n in product(DTYPES, lengths):
        worst = dict.fromkeys(columns[3:], 0.0)
        for m, d, flat in product(queries, (8, 64, 203), (False, True)):
            call = draw_uniform(dtype, (4, m, n, d), 1.0 / d if flat else d**-0.5, seed=0)
            certified = certify_call(call)
            math_backend = torch_gradient(call, SDPBackend.MATH)
            results = {
                "torch CPU flash": torch_gradient(call, SDPBackend.FLASH_ATTENTION),
                **replay(certified),
            }
            found = {name: fudge_factor(certified, dq, math_backend) for name, dq in results.items()}
            found[columns[-1]] = fudge_factor(certified, results["stored O"], eager(call))
            worst = {name: max(worst[name], found[name]) for name in worst}
        rows.append((dtype_name(dtype), n, 3.0 * math.sqrt(n), *worst.values()))
    return Table("peers", columns, tuple(rows))


@dataclass(frozen=True, eq=False)
class Point:
    """One call of the sweep with its certified results and its replays."""

    means: Means
    cotangents: str
    certified: Certified
    replays: dict[str, torch.Tensor]

    @property
    def place(self) -> tuple[str | float, ...]:
        """The first columns of its row."""
        dtype = dtype_name(self.certified.call.dtype)
        return (dtype, self.cotangents, self.means.values, self.means.keys)

    def factors(self) -> tuple[float, ...]:
        """The fudge factor of each variant, against a baseline that rounds once."""
        baseline = once_rounded(self.certified)
        return tuple(fudge_factor(self.certified, self.replays[name], baseline) for name in VARIANTS)


def _points(
    dtypes: Iterable[torch.dtype],
    cotangents: Iterable[str],
    value_means: Iterable[float],
    key_means: Iterable[float],
) -> Iterator[Point]:
    for dtype, kind, values, keys in product(dtypes, cotangents, value_means, key_means):
        means = Means(keys=keys, values=values)
        certified = certify_call(draw(dtype, SIZES, means, kind, seed=0))
        yield Point(means, kind, certified, replay(certified))


PLACE = ("dtype", "cotangents", "mean V", "mean K")


def sweep(
    dtypes: Iterable[torch.dtype] = DTYPES,
    cotangents: Iterable[str] = COTANGENTS,
    value_means: Iterable[float] = VALUE_MEANS,
    key_means: Iterable[float] = MEANS,
) -> Table:
    """Fudge factors against the means of K and V."""
    points = _points(dtypes, cotangents, value_means, key_means)
    rows = tuple((*point.place, *point.factors()) for point in points)
    return Table("sweep", (*PLACE, *VARIANTS), rows)


def budgets(
    dtypes: Iterable[torch.dtype] = DTYPES,
    cotangents: Iterable[str] = ("normal",),
    value_means: Iterable[float] = (0.0, 4.0),
    key_means: Iterable[float] = (0.0, 4.0, 16.0),
) -> Table:
    """Root mean square of error/probable, and worst error/certain, of a kernel that declares nothing."""
    shown = ("stored O", "Σ p dP", "stored O, row sum undone")
    columns = (*PLACE, *(f"{name}: rms error/probable" for name in shown), "stored O: worst error/certain")
    rows: list[tuple[str | float, ...]] = []
    for point in _points(dtypes, cotangents, value_means, key_means):
        budget = point.certified.budget()
        errors = [point.certified.error(point.replays[name]) for name in shown]
        probable = [float((error / budget.probable).square().mean().sqrt()) for error in errors]
        certain = float((errors[0].abs() / budget.certain).max())
        rows.append((*point.place, *probable, certain))
    return Table("budgets", columns, tuple(rows))


def shares(
    dtypes: Iterable[torch.dtype] = (torch.float16,),
    cotangents: Iterable[str] = ("normal", "ones"),
    value_means: Iterable[float] = (0.0, 4.0),
    key_means: Iterable[float] = MEANS,
) -> Table:
    """Each source's mean share of dQ's probable variance, in per cent, and their sum."""
    rows: list[tuple[str | float, ...]] = []
    for point in _points(dtypes, cotangents, value_means, key_means):
        whole = whole_variance(point.certified)
        parts = [float((x / whole).mean()) * 100.0 for x in split(point.certified).values()]
        rows.append((*point.place, *parts, sum(parts)))
    return Table("shares", (*PLACE, *SOURCES, "sum"), tuple(rows))


def closed_form(
    lengths: Sequence[int] = (128, 512, 2048), means: Sequence[float] = (UNIFORM, 4.0, 16.0)
) -> Table:
    """δ's part of dQ in units of one rounding of dQ: measured, from the budget, and by the closed form."""
    heads, m, _, d = SIZES
    columns = ("dtype", "N", "mean K = mean V", "√N·κ·ν", "closed form", "budget", "measured", "error / dQ")
    rows: list[tuple[str | float, ...]] = []
    for dtype, mean, n in product(DTYPES, means, lengths):
        certified = certify_call(draw(dtype, (heads, m, n, d), Means(mean, mean), "normal", seed=0))
        results = replay(certified)
        measured = certified.measured_amplification(results["stored O"], results["exact O"])
        effect = certified.delta_effect()
        predicted = certified.measured_amplification(certified.dq.value + effect, certified.dq.value)
        relative = float((results["stored O"].double() - results["exact O"].double()).square().mean().sqrt())
        relative /= float(certified.dq.value.square().mean().sqrt())
        rows.append(
            (
                dtype_name(dtype),
                n,
                mean,
                math.sqrt(n) * mean * mean,
                certified.amplification(),
                predicted,
                measured,
                relative,
            )
        )
    return Table("closed", columns, tuple(rows))


def search(
    lengths: Sequence[int] = (64, 512), temperatures: Sequence[float] = (0.01, 1.0, 4.0, 16.0), shown: int = 6
) -> Table:
    """The calls of a grid in which δ's part of dQ is largest, in units of one rounding of dQ."""
    columns = ("N", "temperature", "cotangents", "mean V", "mean K", "closed form", "measured", "stored O")
    rows: list[tuple[str | float, ...]] = []
    for n, temperature, kind, values, keys in product(
        lengths, temperatures, COTANGENTS, VALUE_MEANS, (0.0, 4.0, 16.0)
    ):
        call = draw(torch.float16, (1, 32, n, 32), Means(keys, values, temperature), kind, seed=0)
        certified = certify_call(call)
        results = replay(certified)
        measured = certified.measured_amplification(results["stored O"], results["exact O"])
        factor = fudge_factor(certified, results["stored O"], once_rounded(certified))
        place = (n, temperature, kind, values, keys)
        rows.append((*place, certified.amplification(), measured, factor))
    ordered = sorted(rows, key=lambda row: -float(row[6]))
    centred = [row for row in ordered if row[3] == 0.0 and row[4] == 0.0]
    return Table("search", columns, (*ordered[:shown], *centred[:2]))


def measure() -> dict[str, Table]:
    """All tables, by name."""
    made = (peers(), sweep(), budgets(), shares(), closed_form(), search())
    return {table.name: table for table in made}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m attnproof.dq", description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/dq.md"), help="the page to write or check")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a figure differs")
    given = parser.parse_args(arguments)
    if not given.page.is_file():
        parser.error(f"--page {given.page}: no such file; run this in the repository's root")
    text = given.page.read_text()
    tables = measure()
    if given.check:
        differences = compared(text, tables)
        print("\n".join(differences) or f"{given.page}: every figure is the one measured")
        return 1 if differences else 0
    given.page.write_text(written(text, tables))
    for name, svg in plots(tables).items():
        given.page.with_name(name).write_text(svg)
    print(f"wrote {given.page} and its plots")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
