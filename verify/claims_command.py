"""``attnproof claims``: the theory ledger, checked and held against its record."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attnproof.rendering import LOG_WIDTH, UsageError, render_events, require_writable
from attnproof.reports.record import Finding, RunFinished, encode_event

if TYPE_CHECKING:
    from attnproof.ledger import Lock
    from attnproof.properties.claims.base import Claim, Effort

__all__ = ["claims"]

_COLOURS = {"HOLDS": "green", "SUPPORTED": "green", "REFUTED": "red", "CONDITIONAL": "yellow", "OPEN": "blue"}


def claims(
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="Such as SPL-6 or LSE-7a; LSE-7 means all its letters. All if none are given."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="Only this subject, such as splines.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: all claims in 3 minutes.")] = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Large sizes and searches.")] = False,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Check each claim's control too: its verdict must differ."),
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Record the verdicts found.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the claims; check nothing.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write a JSON line a finding here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report here.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Check the claims of the literature; exit 1 only if a verdict is not the recorded one."""
    from attnproof import ledger

    if quick and thorough:
        raise UsageError("--quick and --thorough exclude each other")
    try:
        wanted = ledger.chosen(ids or [], subject)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if listing:
        _print_list(wanted)
        return
    for path in (json, html):
        if path is not None:
            require_writable(path)
    effort: Effort = "quick" if quick else "thorough" if thorough else "default"
    whole = not ids and subject is None
    began = time.monotonic()
    findings = _checked(wanted, effort, jobs, json, progress)
    wrong: list[str] = []
    try:
        if update:
            ledger.write_lock(findings, whole=whole)
        lock = ledger.read_lock()
    except ledger.LockError as error:
        raise UsageError(str(error)) from None
    wrong += ledger.differences(findings, lock, whole=whole)
    if controls:
        wrong += ledger.idle_controls(findings, wanted, effort, jobs)
    seconds = time.monotonic() - began
    code = 1 if wrong else 3 if any(finding.verdict == "UNVERIFIED" for finding in findings) else 0
    _print_table(findings, lock)
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    Console(soft_wrap=True).print(Text(f"{len(findings)} claims in {seconds:.0f} s: {told}"))
    for line in wrong:
        print(f"attnproof: {line}", file=sys.stderr)
    if html is not None:
        finished = RunFinished(("PASS", "FAIL", "", "UNVERIFIED")[code], code, seconds, "; ".join(wrong))
        # Imported late: campaigns bring the whole judge.
        from attnproof.campaign import run_started

        started = run_started(shlex.join(["attnproof", *sys.argv[1:]]), 0, jobs)
        render_events([started, *findings, finished], html, None, None)
        print(f"report {html}")
    raise typer.Exit(code)


def _checked(
    wanted: list[Claim], effort: Effort, jobs: int, path: Path | None, progress: bool
) -> list[Finding]:
    """Findings in the ledger's order; each is written to ``path`` when it is there."""
    from attnproof.ledger import run

    findings = []
    with (path or Path(os.devnull)).open("wb") as lines:
        for finding in _shown(run(wanted, effort, jobs), len(wanted), progress):
            lines.write(encode_event(finding))
            lines.flush()
            findings.append(finding)
    order = {claim.id: place for place, claim in enumerate(wanted)}
    return sorted(findings, key=lambda finding: order[finding.id])


def _shown(findings: Iterator[Finding], total: int, progress: bool) -> Iterator[Finding]:
    """The same, with a bar that names the last claim done."""
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("starting processes", total=total)
        for finding in findings:
            bar.update(task, advance=1, description=f"{finding.id} {finding.name}"[:36])
            yield finding


def _print_list(wanted: list[Claim]) -> None:
    for subject, group in groupby(wanted, key=lambda claim: claim.subject):
        print(subject)
        for claim in group:
            print(f"  {claim.id:9} {claim.title}")


def _print_table(findings: list[Finding], lock: Lock) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    for subject, group in groupby(findings, key=lambda finding: finding.subject):
        table = Table(box=box.SIMPLE_HEAD, title=subject, title_justify="left", expand=False)
        for column in ("id", "claim", "verdict", "recorded"):
            table.add_column(column, no_wrap=column != "claim")
        table.add_column("seconds", justify="right", no_wrap=True)
        for finding in group:
            verdict = Text(finding.verdict, _COLOURS.get(finding.verdict, "bold red"))
            recorded = Text(lock.get(finding.id, "—"))
            table.add_row(finding.id, Text(finding.name), verdict, recorded, f"{finding.seconds:.1f}")
        console.print(table)
