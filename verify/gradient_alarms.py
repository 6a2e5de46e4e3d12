"""False alarms on gradients, counted: thousands of cases of every family on torch autograd, which is right.

``python -m attnproof.gradient_alarms`` (nox session ``gradients``) judges ``--cases`` cases for each family,
half of them on autograd with float32 internals and one rounding at the boundary, half on the same with P, dP,
dS and computed operands in the inputs' dtype (with a state: by a recurrence, and by chunks with operands in
the inputs' dtype). Every case has cotangents and is small, so that many fit into
an hour; rows of hundreds of keys are in the calibration. ``--write`` stores the finding that reports show.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from attnproof import healthy_gradients, healthy_prefix_scans, healthy_scans, healthy_states
from attnproof.campaign import Campaign
from attnproof.properties.case import APART, Case
from attnproof.properties.contract import Contract, contract_of
from attnproof.properties.regimes import plan
from attnproof.properties.signatures import COTANGENTS, SIGNATURES
from attnproof.reports.record import CaseJudged, Finding, Series
from attnproof.targets import Importable, resolve
from attnproof.trials import Subject

__all__ = ["FAMILIES", "gradient_cases", "main"]

FAMILIES = tuple(name for name, form in SIGNATURES.items() if form.outputs)
"""Families with gradients."""

# B·H·M·N·(D + E): a case is judged in some 20 ms.
_MOST_WORK = 2**16
_RECORD = "gradient_alarms.json"


def gradient_cases(contract: Contract, seed: int, most_work: int = _MOST_WORK) -> Iterator[Case]:
    """Cases with cotangents and B·H·M·N·(D + E) ≤ ``most_work`` for a kernel, without end."""
    stream = plan(
        contract.family,
        dtypes=contract.dtypes,
        options=(*contract.options, *(name for name in APART if name != "causal_alignment")),
        supports=contract.supports,
        causal_alignment=contract.causal_alignment,
        budget=150,
        seed=seed,
        thorough=True,
    )
    kinds = itertools.cycle(COTANGENTS)
    for case in stream:
        sizes = case.sizes
        rows = sizes.get("M", sizes["N"]) * sizes["N"] * sizes.get("B", 1) * sizes["H"]
        if rows * (sizes.get("D", 0) + sizes.get("E", 1)) <= most_work:
            kind = case.option("cotangents") or next(kinds)
            yield replace(case, options=(*dict(case.options, cotangents=kind).items(),))


def subjects(family: str) -> list[Subject]:
    """The implementations of a family: two, of mLSTM one."""
    name = "attention" if family == "softmax" else family
    found = []
    for module, function in _functions():
        if function.partition("_")[2] == name and not (family == "softmax" and function == "flash_attention"):
            target = f"{module.__name__}:{function}"
            contract = contract_of(resolve(target))
            assert contract is not None
            found.append(Subject(function, Importable(target), contract, "cpu", gradients=True))
    return found


def _functions() -> Iterator[tuple[ModuleType, str]]:
    for module in (healthy_gradients, healthy_states, healthy_scans, healthy_prefix_scans):
        for function in module.__all__:
            yield module, function


def main(arguments: Sequence[str] | None = None) -> int:
    """Count; exit code 1 where a right implementation was accused or a case could not be judged."""
    parser = argparse.ArgumentParser(prog="python -m attnproof.gradient_alarms", description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all if none")
    parser.add_argument("--cases", type=int, default=10_000, help="for each family")
    parser.add_argument("--seed", type=int, default=7000, help="apart from those of calibration")
    parser.add_argument("--jobs", type=int, default=2, help="judge processes")
    parser.add_argument("--write", action="store_true", help=f"store these families in verify/data/{_RECORD}")
    chosen = parser.parse_args(arguments)
    path = Path(__file__).parent / "data" / _RECORD
    rows = {family: _counted(family, chosen) for family in chosen.families or FAMILIES}
    finding = _finding(rows, chosen.seed)
    print(f"{finding.verdict}: {finding.evidence}")
    if chosen.write:
        merged = _finding({**_stored(path), **rows}, chosen.seed)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(merged)) + b"\n")
    return 0 if finding.verdict == "SUPPORTED" else 1


def _counted(family: str, chosen: argparse.Namespace) -> Counter[str]:
    """How the cases of a family ended, by verdict and in all."""
    found = subjects(family)
    each = math.ceil(chosen.cases / len(found))
    planned = []
    for number, subject in enumerate(found):
        stream = gradient_cases(subject.contract, chosen.seed + number)
        planned.append((subject, list(itertools.islice(stream, each))))
    counts: Counter[str] = Counter()
    command = f"attnproof.gradient_alarms {family}"
    for event in Campaign(planned, command, seed=chosen.seed, jobs=chosen.jobs).run():
        if isinstance(event, CaseJudged):
            counts[event.verdict] += 1
            if event.verdict in ("FAIL", "UNVERIFIED"):
                print(event.kernel, event.case.id, event.failures[0].reason, sep="\n  ")
    counts["cases"] = sum(counts.values())
    print(f"{family}: {counts['cases']} cases, {counts['FAIL']} alarms", flush=True)
    return counts


# The stored finding's columns, and what each counts.
_COLUMNS = {"cases": "cases", "false alarms": "FAIL", "unverified": "UNVERIFIED"}


def _stored(path: Path) -> dict[str, Counter[str]]:
    """Counts of families in the stored finding, so that one family can be counted again."""
    if not path.is_file():
        return {}
    columns = msgspec.json.decode(path.read_bytes(), type=Finding).series[0].columns
    return {
        family: Counter({kind: columns[column][place] for column, kind in _COLUMNS.items()})
        for place, family in enumerate(columns["family"])
    }


def _finding(rows: Mapping[str, Counter[str]], seed: int) -> Finding:
    names = [family for family in FAMILIES if family in rows]
    columns: dict[str, list[Any]] = {"family": names}
    for column, kind in _COLUMNS.items():
        columns[column] = [rows[family][kind] for family in names]
    wrong = sum(columns["false alarms"]) + sum(columns["unverified"])
    total, least = sum(columns["cases"]), min(columns["cases"])
    return Finding(
        name="false alarms on gradients",
        verdict="SUPPORTED" if not wrong else "REFUTED",
        statement="Torch autograd with float32 internals, rounded once, or with P, dP and dS in the inputs' "
        "dtype, is never accused.",
        source="attnproof.gradient_alarms",
        evidence=f"{sum(columns['false alarms'])} alarms in {total} cases with gradients, "
        f"at least {least} of each family (seed {seed})",
        series=(Series("false alarms on gradients", "table", columns, "family", "cases"),),
    )


if __name__ == "__main__":
    sys.exit(main())
