"""The theory ledger run: every claim's check in a process, as findings, and the record they are held against.

A check may not hang a run: it has a limit of time. One that raises or goes over it is UNVERIFIED, which is no
statement about its claim.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec
import torch

from attnproof import processes
from attnproof.laboratory import Bench
from attnproof.properties.claims import ledger
from attnproof.properties.claims.base import Claim, ClaimFinding, Effort, Plot
from attnproof.reports.record import Finding, Series

__all__ = [
    "LOCK",
    "Lock",
    "LockError",
    "check",
    "chosen",
    "differences",
    "idle_controls",
    "read_lock",
    "run",
    "write_lock",
]

LOCK: Final = Path(str(resources.files("attnproof.data").joinpath("claims.lock.json")))
"""The recorded ledger: verdicts by id, committed with the package."""

SECONDS: Final[Mapping[Effort, float]] = {"quick": 60.0, "default": 300.0, "thorough": 3600.0}
"""What one check may take."""

Lock = dict[str, str]


class LockError(ValueError):
    """A recorded ledger that cannot be read: the message names the file and what to do."""


def chosen(ids: Sequence[str], subject: str | None) -> list[Claim]:
    """Claims by id (also by an id that they cover) and subject, all if neither is given.

    Raises:
        ValueError: an id or a subject that the ledger does not have.
    """
    known = ledger()
    subjects = list(dict.fromkeys(claim.subject for claim in known.values()))
    if subject is not None and subject not in subjects:
        raise ValueError(f"--subject {subject!r} must be one of {', '.join(subjects)}")
    names: set[str] = set()
    for name in ids:
        found = {claim.id for claim in known.values() if name in (claim.id, *claim.covers)}
        # LSE-7 means LSE-7a and LSE-7b as well.
        found |= {key for key in known if key[:-1] == name and key[-1].isalpha()}
        if not found:
            raise ValueError(f"no claim {name!r} in the ledger; attnproof claims --list shows all")
        names |= found
    wanted = [claim for claim in known.values() if not ids or claim.id in names]
    return [claim for claim in wanted if subject in (None, claim.subject)]


def run(claims: Sequence[Claim], effort: Effort = "default", jobs: int = 2) -> Iterator[Finding]:
    """Check claims in ``jobs`` processes; findings come as they are done."""
    with processes.pool(min(jobs, max(1, len(claims)))) as pool:
        futures: dict[Future[Finding], Claim] = {}
        for claim in claims:
            futures[pool.submit(check, claim.id, effort)] = claim
        for future in as_completed(futures):
            try:
                yield future.result()
            except Exception as error:
                yield _finding(futures[future], effort, f"its process ended: {error}", 0.0)


def idle_controls(
    findings: Sequence[Finding], claims: Sequence[Claim], effort: Effort, jobs: int = 2
) -> list[str]:
    """Claims whose control has their verdict too, or none at all, in words."""
    verdicts = {finding.id: finding.verdict for finding in findings}
    with processes.pool(jobs) as pool:
        futures = {
            claim.id: pool.submit(check, claim.id, effort, control=True) for claim in claims if claim.control
        }
        controls = {name: future.result() for name, future in futures.items()}
    told = []
    for name, control in controls.items():
        if control.verdict == "UNVERIFIED":
            told.append(f"{name}: its control failed: {control.evidence}")
        elif control.verdict == verdicts[name]:
            told.append(f"{name}: {control.verdict}, and its control is, too: the check tells nothing")
    return told


def check(name: str, effort: Effort, *, control: bool = False) -> Finding:
    """Check one claim here, or its control.

    Raises:
        KeyError: no such claim.
    """
    torch.set_num_threads(1)
    claim = ledger()[name]
    function = claim.control if control and claim.control is not None else claim.check
    begin = time.monotonic()

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {SECONDS[effort]:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS[effort])
    found: ClaimFinding | str
    try:
        found = function(Bench(effort))
        _require_plain(found)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return _finding(claim, effort, found, time.monotonic() - begin)


def _require_plain(found: ClaimFinding) -> None:
    """Every number must survive a line of JSON.

    Raises:
        TypeError: a cell that is no plain number, text or truth value.
    """
    for columns in (found.table, *(plot.columns for plot in found.plots)):
        for name, cells in columns.items():
            for cell in cells:
                if not (cell is None or isinstance(cell, (bool, int, float, str))):
                    raise TypeError(
                        f"column {name!r} has a {type(cell).__name__}; int, float and str are plain"
                    )


def _finding(claim: Claim, effort: Effort, found: ClaimFinding | str, seconds: float) -> Finding:
    """The event of a finding, or of the reason why there is none."""
    failed = isinstance(found, str)
    given = ClaimFinding("UNVERIFIED", f"the check failed: {found}") if isinstance(found, str) else found
    flag = "" if effort == "default" else f" --{effort}"
    return Finding(
        name=claim.title,
        verdict="UNVERIFIED" if failed else given.status,
        statement=claim.statement,
        source=claim.source,
        evidence=given.evidence,
        series=(*map(_series, given.plots), *_table(claim.title, given)),
        id=claim.id,
        subject=claim.subject,
        kind=claim.kind,
        covers=claim.covers,
        counterexample=given.counterexample,
        command=f"attnproof claims {claim.id}{flag}",
        seconds=seconds,
        seed=given.seed,
    )


def _series(plot: Plot) -> Series:
    return Series(plot.title, plot.chart, plot.columns, plot.x, plot.y, plot.color, plot.log)


def _table(title: str, found: ClaimFinding) -> tuple[Series, ...]:
    return (Series(title, "table", found.table, "row", "column"),) if found.table else ()


def read_lock(path: Path = LOCK) -> Lock:
    """The recorded verdicts by id.

    Raises:
        LockError: the file is missing or no table of verdicts.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        raise LockError(f"{path}: there is no recorded ledger; write one with --update") from None
    except msgspec.DecodeError as error:
        raise LockError(f"{path} is no recorded ledger ({error}); write it again with --update") from None


def write_lock(findings: Sequence[Finding], path: Path = LOCK, *, whole: bool) -> None:
    """Record verdicts: these and no others if ``whole``, else these beside the recorded others.

    Raises:
        LockError: a finding without a verdict.
    """
    unverified = [finding.id for finding in findings if finding.verdict == "UNVERIFIED"]
    if unverified:
        raise LockError(f"{', '.join(unverified)} could not be checked; nothing was recorded")
    lock = {} if whole or not path.exists() else read_lock(path)
    lock |= {finding.id: finding.verdict for finding in findings}
    order = [name for name in ledger() if name in lock]
    content = msgspec.json.format(msgspec.json.encode({name: lock[name] for name in order}))
    path.write_bytes(content + b"\n")


def differences(findings: Sequence[Finding], lock: Lock, *, whole: bool) -> list[str]:
    """Where verdicts are not what is recorded, in words; with ``whole`` also what was not checked."""
    told = []
    for finding in findings:
        recorded = lock.get(finding.id)
        if recorded is None:
            told.append(f"{finding.id}: {finding.verdict}, not in the recorded ledger")
        elif finding.verdict not in (recorded, "UNVERIFIED"):
            told.append(f"{finding.id}: {finding.verdict}, recorded as {recorded}")
    if whole:
        checked = {finding.id for finding in findings}
        told += [
            f"{name}: recorded as {lock[name]}, not in the ledger" for name in lock if name not in checked
        ]
    return told
