"""The Markdown report: for a continuous-integration summary, and the kernels' table for a README.

Text of the record is escaped for GitHub's Markdown, whose tables end a cell at "|" and which reads HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attnproof.reports.counterexamples import lines
from attnproof.reports.record import Counterexample, Event
from attnproof.reports.summary import summarize
from attnproof.reports.tables import FailureGroup, KernelSummary, Remark, Summary
from attnproof.reports.wording import count, counted, duration, ratio

__all__ = ["kernel_table", "render"]

GROUPS_SHOWN = 20
"""Failures and remarks listed; GitHub refuses summaries beyond 1 MiB, and readers give up long before."""

COLUMNS = (
    "kernel",
    "verdict",
    "as expected",
    "cases",
    "failed",
    "vacuous",
    "declined",
    "unjudged elements",
    "worst error/certain",
    "worst row rms error/probable",
)

REASON_LIMIT = 600
SCRIPT_LIMIT = 8000

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$@])")


def render(events: Iterable[Event]) -> str:
    """The report of ``events`` as GitHub-flavoured Markdown: verdict, kernels, unexpected failures."""
    summary = summarize(events)
    parts = [_head(summary), kernel_table(summary.kernels)]
    if summary.counterexamples:
        parts += ["### Smallest failing inputs", *map(_counterexample, summary.counterexamples)]
    if summary.unexpected_failures:
        parts += [
            "### Failures that were not expected",
            *map(_failure, summary.unexpected_failures[:GROUPS_SHOWN]),
        ]
        parts += _more(len(summary.unexpected_failures))
    for title, remarks in (
        ("Listed to fail, but passed", summary.survived),
        ("Unverified", summary.unverified),
    ):
        if remarks:
            parts += [f"### {title}", "\n".join(map(_remark, remarks[:GROUPS_SHOWN])), *_more(len(remarks))]
    return "\n\n".join(part for part in parts if part) + "\n"


def kernel_table(kernels: Iterable[KernelSummary]) -> str:
    """One row a kernel: verdict, whether as listed, cases, and the worst ratios (error over budget)."""
    rows = [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    expected = {True: "yes", False: "**no**", None: "not judged to the end"}
    for kernel in kernels:
        cells = (
            escaped(kernel.name) + (" (example)" if kernel.example else ""),
            escaped(kernel.verdict),
            expected[kernel.as_expected],
            count(kernel.cases),
            count(kernel.failed),
            count(kernel.vacuous),
            count(kernel.declined),
            count(kernel.unjudged),
            ratio(kernel.worst_certain),
            ratio(kernel.row_probable),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "No kernel was judged."


def escaped(text: str) -> str:
    """``text`` on one line, with everything escaped that Markdown or HTML would read as markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _head(summary: Summary) -> str:
    lines = [f"## attnproof: {summary.verdict}", ""]
    if not summary.complete:
        lines += ["The record is incomplete: it ends before the run did.", ""]
    as_expected = sum(kernel.as_expected is True for kernel in summary.kernels)
    kernels = counted(len(summary.kernels), "kernel")
    lines.append(f"{kernels}, {counted(summary.cases, 'case')}; {as_expected} came out as listed.")
    for run in summary.runs:
        facts = [f"`{run.started.command.replace('`', chr(39))}`"] if run.started else []
        facts += (
            [f"attnproof {escaped(run.started.version)}", f"seed {run.started.seed}"] if run.started else []
        )
        facts += [duration(run.finished.seconds)] if run.finished else []
        facts += [escaped(run.finished.reason)] if run.finished and run.finished.reason else []
        lines += ["", " · ".join(facts)]
    return "\n".join(lines)


def _counterexample(found: Counterexample) -> str:
    """A failing input made small, with its script in a fence."""
    told = [escaped(line.strip()) for line in lines(found)]
    text = [f"**{escaped(found.kernel)}**", "", *(f"- {line}" for line in told), ""]
    return "\n".join([*text, *_fenced(found.script)])


def _fenced(script: str) -> list[str]:
    """A script in a fence that it cannot close; nothing where it is too long for a summary."""
    if not script or len(script) > SCRIPT_LIMIT:
        return []
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", script)), default=0))
    return [f"{fence}python", script.rstrip("\n"), fence, ""]


def _failure(group: FailureGroup) -> str:
    """One group of failures, folded; its script in a fence that the script cannot close."""
    title = f"{group.kernel}: {group.rule} in {group.regime}, {counted(group.count, 'case')}"
    head = [
        f"<details><summary>{_html(title)}</summary>",
        "",
        escaped(group.failure.reason[:REASON_LIMIT]),
        "",
        f"Case {escaped(group.case.id)}",
        "",
    ]
    return "\n".join([*head, *_fenced(group.failure.script), "</details>"])


def _remark(remark: Remark) -> str:
    text = escaped(remark.text[:REASON_LIMIT])
    return f"- {escaped(remark.kernel)}, {escaped(remark.regime)}, {counted(remark.cases, 'case')}: {text}"


def _more(number: int) -> list[str]:
    return [f"{count(number - GROUPS_SHOWN)} more are in the record."] if number > GROUPS_SHOWN else []


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
