"""How errors of the forms of a family grow with the length of the sequence, against their budgets.

``python -m attnproof.growth`` judges every kernel of the families with a state on one sequence of each length
up to 4096, in three dtypes, where nothing is forgotten fast (regime slow-decay, where a family has
it). Of the last quarter of the rows it takes the root mean square of the error and of the certain budget, and
of all rows the largest error over budget. A form that steps through the sequence may add an error at every
step, and its budget allows for that; the finding asks that the error does not grow faster than the budget
does, from the shortest length to the longest. ``--long`` judges every form whose work is not quadratic on
sequences of 65,536 positions in its place, of which the reference knows some thousand. ``--write`` stores the
finding that reports show.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from attnproof import processes
from attnproof.properties.case import Case
from attnproof.properties.contract import contract_of
from attnproof.properties.regimes import REGIMES
from attnproof.properties.signatures import SIGNATURES
from attnproof.reports.record import Finding, Series
from attnproof.suite import STATE_FORMS, default_device
from attnproof.targets import Importable, resolve
from attnproof.trials import Subject, judge_call
from attnproof.workers import WorkerPool

__all__ = ["LENGTHS", "LONG", "Growth", "finding", "long_finding", "main", "measure"]

LENGTHS = (64, 256, 1024, 4096)
LONG = 65_536
_DTYPES = ("float32", "float16", "bfloat16")
# Their work grows with the square of the length: 65,536 positions would take hours each.
_QUADRATIC = ("parallel", "convolution")
# With four heads no single draw of decays decides. Every pair of channels is a channel of its own in the
# composed form of H3.
_SIZES = {"B": 1, "G": 1, "D": 16, "E": 16, "T": 4, "P": 8}
_NARROW = {"h3": {"D": 4, "E": 4}}
# By how much an exponent of growth, of few numbers at random, may be above another.
_SLACK = 0.15


@dataclass(frozen=True)
class Growth:
    """One form on one sequence: root mean squares of error and certain budget over the last quarter of the
    rows, and the largest error over budget of all; ``verdict`` is the judge's.
    """

    family: str
    form: str
    dtype: str
    length: int
    error: float
    budget: float
    worst: float
    verdict: str


def measure(
    family: str, form: str, dtype: str, lengths: Sequence[int] = LENGTHS, heads: int = 4
) -> list[Growth]:
    """One form at every length, in this process.

    Raises:
        RuntimeError: the kernel gave no output that could be judged.
    """
    torch.set_num_threads(1)
    target = f"attnproof.kernels.{family}:{form}"
    contract = contract_of(resolve(target))
    assert contract is not None, f"{target} has no contract"
    subject = Subject(target, Importable(target), contract, default_device(), gradients=False)
    found = []
    with WorkerPool(jobs=1, spares=0, timeout=900.0) as pool:
        for length in lengths:
            call = judge_call(subject, _case(family, dtype, length, heads), pool.call, repeat=False)
            if not call.outputs or call.trial is None:
                raise RuntimeError(f"{target} at N = {length}: {[f.reason for f in call.event.failures]}")
            name = next(iter(SIGNATURES[family].outputs))
            budget, exact = call.trial.budgets[name], call.trial.reference.outputs[name].value
            error = (call.outputs[name].double() - exact).abs()
            judged = ~budget.open & ~budget.overflow
            late = judged.clone()
            late[:, :, : 3 * length // 4] = False
            found.append(
                Growth(
                    family,
                    form,
                    dtype,
                    length,
                    float(error[late].square().mean().sqrt()),
                    float(budget.certain[late].square().mean().sqrt()),
                    float((error[judged] / budget.certain[judged]).max()),
                    call.event.verdict,
                )
            )
    return found


def _case(family: str, dtype: str, length: int, heads: int) -> Case:
    sizes = {**_SIZES, **_NARROW.get(family, {}), "N": length, "H": heads}
    shape = {symbol: sizes[symbol] for symbol in SIGNATURES[family].symbols}
    slow = family in REGIMES["slow-decay"].families
    return Case(family, dtype, shape, "slow-decay" if slow else "normal")  # type: ignore[arg-type]


def exponent(first: float, last: float, lengths: Sequence[int] = LENGTHS) -> float:
    """b of a growth as N^b between the shortest and the longest length; 0 where the first is 0."""
    if first <= 0.0 or last <= 0.0:
        return 0.0
    return math.log(last / first) / math.log(lengths[-1] / lengths[0])


def finding(measured: Iterable[Growth]) -> Finding:
    """The finding of what :func:`measure` found of all forms and dtypes."""
    rows = list(measured)
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda g: (g.family, g.form, g.dtype))]
    faster: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for group in groups:
        first, last = group[0], group[-1]
        lengths = [g.length for g in group]
        ours = exponent(first.error, last.error, lengths)
        theirs = exponent(first.budget, last.budget, lengths)
        values = (
            *(first.family, first.form, first.dtype, round(ours, 2), round(theirs, 2)),
            *(
                float(f"{max(g.worst for g in group):.2g}"),
                float(f"{last.budget / (last.error or math.inf):.3g}"),
            ),
        )
        for name, value in zip(_COLUMNS, values, strict=True):
            columns[name].append(value)
        if ours > theirs + _SLACK or any(g.verdict == "FAIL" for g in group):
            faster.append(
                f"{first.family}.{first.form} in {first.dtype}: N^{ours:.2f} against N^{theirs:.2f}"
            )
    worst = max(rows, key=lambda g: g.worst)
    evidence = (
        f"{len(groups)} kernels and dtypes, N from {rows[0].length} to {rows[-1].length}: largest error "
        f"{worst.worst:.2g} certain budgets ({worst.family}.{worst.form}, {worst.dtype}, N = {worst.length})"
    )
    if faster:
        evidence += f"; faster: {'; '.join(faster)}"
    return Finding(
        name="errors against the length",
        verdict="REFUTED" if faster else "SUPPORTED",
        statement="Errors of no form grow faster with the length of the sequence than its certain budget.",
        source="attnproof.growth",
        evidence=evidence,
        series=(*_plots(rows), _table(columns)),
        seed=0,
    )


_COLUMNS = (
    *("family", "form", "dtype", "error grows as N to the", "budget grows as N to the"),
    *("largest error/certain", "budget over error at the longest"),
)


def _table(columns: dict[str, list[Any]]) -> Series:
    return Series("Errors and budgets against N, every form", "table", columns, _COLUMNS[0], _COLUMNS[3])


def _plots(rows: Sequence[Growth]) -> list[Series]:
    """A plot for each family in each dtype: errors of the forms, and the budget of the first."""
    plots = []
    for family, dtype in dict.fromkeys((g.family, g.dtype) for g in rows):
        own = [g for g in rows if (g.family, g.dtype) == (family, dtype)]
        lines = [(g.length, g.error, g.form) for g in own]
        lines += [(g.length, g.budget, "certain budget") for g in own if g.form == own[0].form]
        shown = [(n, float(f"{y:.3g}"), which) for n, y, which in lines if y > 0.0]
        columns: dict[str, list[Any]] = {
            name: list(values)
            for name, values in zip(("N", "root mean square", "form"), zip(*shown, strict=True), strict=True)
        }
        title = f"{family}, {dtype}: error of the last quarter of the rows against N"
        logarithmic = ("N", "root mean square")
        plots.append(Series(title, "scatter", columns, *logarithmic, "form", logarithmic))
    return plots


def long_finding(measured: Iterable[Growth]) -> Finding:
    """The finding of one sequence of :data:`LONG` positions for each form and dtype."""
    rows = list(measured)
    wrong = [f"{g.family}.{g.form} in {g.dtype} ({g.verdict})" for g in rows if g.verdict != "PASS"]
    worst = max(rows, key=lambda g: g.worst)
    columns: dict[str, list[Any]] = {
        "family": [g.family for g in rows],
        "form": [g.form for g in rows],
        "dtype": [g.dtype for g in rows],
        "largest error/certain": [float(f"{g.worst:.2g}") for g in rows],
        "budget over error": [float(f"{g.budget / (g.error or math.inf):.3g}") for g in rows],
    }
    evidence = (
        f"{len(rows)} kernels and dtypes, N = {LONG}, quadratic forms ({', '.join(_QUADRATIC)}) left out: "
        f"largest error {worst.worst:.2g} certain budgets ({worst.family}.{worst.form}, {worst.dtype})"
    )
    return Finding(
        name="long sequences",
        verdict="REFUTED" if wrong else "SUPPORTED",
        statement=f"Every form is within its budgets on a sequence of {LONG} positions.",
        source="attnproof.growth",
        evidence=f"{evidence}; not: {'; '.join(wrong)}" if wrong else evidence,
        series=(
            Series(f"Errors at N = {LONG}, every form", "table", columns, "family", "largest error/certain"),
        ),
        seed=0,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all forms; exit code 1 if one grows faster than its budget."""
    parser = argparse.ArgumentParser(prog="python -m attnproof.growth", description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(STATE_FORMS)}; all if none")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--long", action="store_true", help=f"sequences of {LONG} positions instead")
    parser.add_argument("--write", action="store_true", help="store the finding in verify/data")
    chosen = parser.parse_args(arguments)
    tasks = [
        (family, form, dtype)
        for family in chosen.families or STATE_FORMS
        for dtype in _DTYPES
        for form in STATE_FORMS[family]
        if not (chosen.long and form in _QUADRATIC)
    ]
    lengths, heads = ((LONG,), 1) if chosen.long else (LENGTHS, 4)
    measured: list[Growth] = []
    with processes.pool(chosen.jobs) as pool:
        for found in pool.map(measure, *zip(*((*task, lengths, heads) for task in tasks), strict=True)):
            measured += found
            last = found[-1]
            print(
                f"{last.family}.{last.form} {last.dtype}: {last.worst:.2g} at N = {last.length}", flush=True
            )
    result = long_finding(measured) if chosen.long else finding(measured)
    print(f"{result.verdict}: {result.evidence}")
    if chosen.write:
        path = Path(__file__).parent / "data" / ("long.json" if chosen.long else "growth.json")
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return 0 if result.verdict == "SUPPORTED" else 1


if __name__ == "__main__":
    # Processes of the pool find what they run by its module, and they have no __main__.
    from attnproof import growth

    sys.exit(growth.main())
