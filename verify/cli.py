"""The command line. Exit codes: 0 PASS, 1 FAIL or DRIFT, 2 usage, 3 UNVERIFIED."""

from __future__ import annotations

import contextlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from attnproof.claims_command import claims
from attnproof.rendering import LOG_WIDTH, UsageError, render_events, require_writable
from attnproof.reports.record import (
    CaseJudged,
    Event,
    Finding,
    KernelJudged,
    KernelStarted,
    RecordError,
    RunFinished,
)

__all__ = ["app", "main"]

USAGE, UNVERIFIED = 2, 3
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prove an attention kernel right, or show the smallest input on which it is wrong.",
)

app.command()(claims)

Handler = Callable[[Event], None]
DEFAULT_PAGE = Path("reports/out/index.html")
DEFAULT_SCRIPT = Path("attnproof-failure.py")
DATABASE = Path(".hypothesis/examples")  # Hypothesis's own default


def main() -> None:
    """Entry point: errors in the arguments are one line on stderr and exit code 2."""
    from attnproof.properties.case import CaseError
    from attnproof.properties.contract import ContractError
    from attnproof.targets import TargetError

    # Kernels of the repository that one stands in need not be installed.
    sys.path.insert(0, str(Path.cwd()))
    try:
        app(_one_value_a_flag(sys.argv[1:]))
    except (UsageError, ContractError, CaseError, TargetError, RecordError) as error:
        print(f"attnproof: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except Exception:
        # Exit code 1 says that a kernel is wrong, which nobody knows here.
        traceback.print_exc()
        print("attnproof: the checker itself failed; no verdict", file=sys.stderr)
        sys.exit(UNVERIFIED)
    except KeyboardInterrupt:
        print("attnproof: interrupted; the record holds every case judged so far", file=sys.stderr)
        sys.exit(130)


@app.callback()
def _root() -> None:
    """Keeps subcommands subcommands while there are few."""


@app.command()
def verify(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Kernels as package.module:attribute; the suite's own if none are given."),
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Only these families; with TARGETS, their family.")
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help="Comma-separated, such as float16,bfloat16.")] = None,
    options: Annotated[
        str | None, typer.Option(help="Options that TARGETS support, comma-separated.")
    ] = None,
    declare: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the contract, for TARGETS.")] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="FIELD=VALUE of the precision, for TARGETS.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, emulator:sm_90, …; the GPU if there is one.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Larger and random cases, for --time seconds.")
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option("--time", help="Seconds after which no case is begun.")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Cases for each kernel.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the record (JSON lines) here.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help=f"Write the report here; by default {DEFAULT_PAGE}.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    sarif: Annotated[Path | None, typer.Option("--sarif", help="Write SARIF here.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all inputs.", min=0)] = 0,
    jobs: Annotated[int, typer.Option(help="Judge processes.", min=1)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.", min=0.1)] = 60.0,
    with_claims: Annotated[
        bool, typer.Option("--claims/--no-claims", help="Check the theory ledger too, if nothing is chosen.")
    ] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Judge kernels over regimes, dtypes, sizes and options; leave a record and an HTML report."""
    from attnproof.campaign import Campaign, Limits
    from attnproof.planning import default_plan, findings, target_subjects
    from attnproof.reports.record import read_record

    chosen = target_subjects(
        targets or [],
        family or [],
        _split(dtypes),
        _split(options),
        _pairs(declare),
        _pairs(precision),
        device,
        timeout,
    )
    plan = default_plan(chosen, seed=seed, thorough=thorough, examples=examples, dtypes=_split(dtypes))
    page = html or DEFAULT_PAGE
    record = json or page.with_suffix(".jsonl")
    for path in (page, record, junit, sarif):
        if path is not None:
            require_writable(path)
    campaign = Campaign(
        plan=plan,
        command=shlex.join(["attnproof", *sys.argv[1:]]),
        seed=seed,
        findings=() if targets else findings(family or (), jobs, claims=with_claims and not family),
        jobs=jobs,
        limits=Limits(timeout=timeout),
        seconds=time_limit or (3600.0 if thorough else None),
    )
    finished = _run(campaign.run(), record, sum(len(cases) for _, cases in plan), progress)
    render_events(list(read_record(record)), page, junit, sarif)
    Console().print(f"report {page}   record {record}")
    raise typer.Exit(finished.exit_code)


@app.command()
def fuzz(
    target: Annotated[str, typer.Argument(help="The kernel as package.module:attribute.")],
    family: Annotated[str, typer.Option(help="What it computes, such as softmax.")],
    dtypes: Annotated[str | None, typer.Option(help="Comma-separated, such as float16,bfloat16.")] = None,
    options: Annotated[str | None, typer.Option(help="Options that it supports, comma-separated.")] = None,
    layout: Annotated[str | None, typer.Option(help="bhnd or bnhd.")] = None,
    declare: Annotated[list[str] | None, typer.Option(help="KEY=VALUE … of the contract.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="FIELD=VALUE … of the precision.")] = None,
    gradients: Annotated[
        bool | None, typer.Option("--gradients/--no-gradients", help="Judge gradients as well.")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Cases to judge, in place of a time.", min=1)] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time", help="Seconds of the whole search; 50 by default.", min=1.0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all inputs and choices.", min=0)] = 0,
    jobs: Annotated[int, typer.Option(help="Judge threads, each with a worker process.", min=1)] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, emulator:sm_90, …")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.", min=0.1)] = 30.0,
    script: Annotated[Path, typer.Option(help="Where the script of a failure goes.")] = DEFAULT_SCRIPT,
    json: Annotated[Path | None, typer.Option("--json", help="Write the record (JSON lines) here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report here.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    sarif: Annotated[Path | None, typer.Option("--sarif", help="Write SARIF here.")] = None,
) -> None:
    """Search for the smallest input on which a kernel is wrong; print it and write a script that shows it."""
    from hypothesis.database import DirectoryBasedExampleDatabase

    from attnproof.campaign import Limits
    from attnproof.interface import make_subject
    from attnproof.search.engine import DEFAULT_SECONDS, Search

    table = _pairs(declare)
    if layout is not None:
        table["layout"] = layout
    if pairs := _pairs(precision):
        table["precision"] = pairs  # type: ignore[assignment]
    for path in (script, json, html, junit, sarif):
        if path is not None:
            require_writable(path)
    subject = make_subject(target, family, _split(dtypes), _split(options), None, device, table)
    if gradients and "cotangents" not in subject.options:
        raise UsageError(f"--gradients: family {family!r} has none, or differentiable=false is declared")
    search = Search(
        subject=replace(subject, gradients=gradients),
        command=shlex.join(["attnproof", *sys.argv[1:]]),
        examples=examples,
        seconds=time_limit or (None if examples else DEFAULT_SECONDS),
        seed=seed,
        jobs=jobs,
        limits=Limits(timeout=timeout),
        database=DirectoryBasedExampleDatabase(DATABASE),
    )
    finished = _search(search.run(), json, script)
    if html or junit or sarif:
        render_events(finished, html, junit, sarif)
    last = finished[-1]
    assert isinstance(last, RunFinished)
    raise typer.Exit(last.exit_code)


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="Records (JSON lines) of earlier runs.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write an HTML report here.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    sarif: Annotated[Path | None, typer.Option("--sarif", help="Write SARIF here.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of kernels as Markdown.")
    ] = False,
) -> None:
    """Render records again: HTML, Markdown, JUnit, SARIF."""
    from attnproof.reports import markdown as markdown_report
    from attnproof.reports.record import read_record

    events: list[Event] = []
    for path in records:
        if not path.is_file():
            raise UsageError(f"record {path}: no such file")
        events += read_record(path)
    if html or junit or sarif:
        render_events(events, html, junit, sarif)
    if markdown or not (html or junit or sarif):
        print(markdown_report.render(events))


def _search(events: Iterator[Event], record: Path | None, script: Path) -> list[Event]:
    """Tell what a search finds as it goes on; the record, if one is asked for, is written on the way."""
    from attnproof.reports.counterexamples import lines
    from attnproof.reports.record import Counterexample, RecordWriter

    kept: list[Event] = []
    judged = 0
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(RecordWriter(record)) if record else None
        for event in events:
            kept.append(event)
            if writer is not None:
                writer.write(event)
            judged += isinstance(event, CaseJudged)
            if isinstance(event, Counterexample):
                print("\n".join(lines(event)))
                script.write_text(event.script)
                print(f"  script: {script}  (needs torch and the kernel; exits 1 while the kernel is wrong)")
    verdict, last = kept[-2], kept[-1]
    assert isinstance(verdict, KernelJudged)
    assert isinstance(last, RunFinished)
    why = f"; {verdict.reason}" if verdict.reason and verdict.verdict != "FAIL" else ""
    print(f"{verdict.verdict} in {last.seconds:.0f} s: {judged} cases{why}")
    return kept


def _run(events: Iterator[Event], record: Path, planned: int, progress: bool) -> RunFinished:
    """Write every event to the record as it comes, show progress, and print the table of kernels."""
    from attnproof.reports.record import RecordWriter

    last: Event | None = None
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    rows: list[KernelJudged] = []
    examples: set[str] = set()
    with RecordWriter(record) as writer, _progress_bar(console, planned, progress) as advance:
        for event in events:
            writer.write(event)
            last = event
            if isinstance(event, (CaseJudged, Finding)):
                advance(event)
            elif isinstance(event, KernelStarted) and event.example:
                examples.add(event.kernel)
            elif isinstance(event, KernelJudged):
                rows.append(event)
    if not isinstance(last, RunFinished):
        raise UsageError("the run ended without a verdict")
    console.print(_table(rows, examples))
    colour = {"PASS": "green", "FAIL": "red"}.get(last.verdict, "yellow")
    console.print(
        f"[bold {colour}]{last.verdict}[/] in {last.seconds:.0f} s"
        + (f": {last.reason}" if last.reason else "")
    )
    return last


@contextlib.contextmanager
def _progress_bar(
    console: Console, planned: int, shown: bool
) -> Iterator[Callable[[CaseJudged | Finding], None]]:
    if not shown:
        yield lambda event: None
        return
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting workers", total=planned)

        def advance(event: CaseJudged | Finding) -> None:
            if isinstance(event, Finding):
                bar.update(task, description=event.name[:36])
            else:
                bar.update(task, advance=1, description=f"{event.kernel} {event.case.regime}"[:36])

        yield advance


def _table(rows: list[KernelJudged], examples: set[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kernel", no_wrap=True)
    for name in ("verdict", "as expected", "cases", "failed", "vacuous", "declined", "unverified", "seconds"):
        table.add_column(
            name, justify="left" if name in ("verdict", "as expected") else "right", no_wrap=True
        )
    for row in rows:
        name = f"{row.kernel} (example)" if row.kernel in examples else row.kernel
        counts = (row.cases, row.failed, row.vacuous, row.declined, row.unverified)
        listed = "yes" if row.as_expected else "[bold red]NO[/]"
        table.add_row(name, row.verdict, listed, *map(str, counts), f"{row.seconds:.1f}")
    return table


def _one_value_a_flag(arguments: list[str]) -> list[str]:
    """``--declare A=1 B=2`` as ``--declare A=1 --declare B=2``, which is how typer reads a list."""
    flag, given = "", list[str]()
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument if argument in ("--declare", "--precision") else ""
        elif flag and given[-1] != flag:
            if "=" in argument:
                given.append(flag)
            else:
                flag = ""
        given.append(argument)
    return given


def _split(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(item.strip() for item in text.split(",") if item.strip())


def _pairs(items: list[str] | None) -> dict[str, str]:
    pairs = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{item!r}: expected KEY=VALUE")
        pairs[key] = value
    return pairs
