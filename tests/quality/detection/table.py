"""What a run over the mutants found, and the tables that are made of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec

from attnproof.reports.record import Finding, Series
from tests.quality.mutants.mutant import HELD_OUT_SEED, Mutant, held_out

__all__ = ["OURS", "Verdict", "finding", "kill_table", "summary_rows"]

OURS = "attnproof fuzz"


class Verdict(msgspec.Struct, frozen=True):
    """What one judge said of one kernel.

    Attributes:
        kernel: name of a mutant, or target of a correct implementation; judge: :data:`OURS` or a peer's name.
        rejected: whether the judge did not accept it.
        fits: whether the reason is one that fits the mutant's mechanism; True for peers, who give none.
        seconds: until the verdict; cases: calls or cases until then.
        reason: in words.
    """

    kernel: str
    judge: str
    rejected: bool
    fits: bool
    seconds: float
    cases: int
    reason: str


class Judged(msgspec.Struct, frozen=True):
    """One judge over all kernels: kills, of how many; false alarms, of how many; median seconds to a kill."""

    judge: str
    kills: int
    mutants: int
    accuracy_kills: int
    accuracy_mutants: int
    held_out_kills: int
    held_out_mutants: int
    alarms: int
    correct: int
    seconds_to_kill: float
    seconds_in_all: float


def killed(mutant: Mutant, verdict: Verdict, verdicts: Iterable[Verdict]) -> bool:
    """A kill: rejected for a reason that fits, by a judge who accepts the kernel that it derives from."""
    base = [v for v in verdicts if v.judge == verdict.judge and v.kernel == mutant.base]
    return verdict.rejected and verdict.fits and not any(v.rejected for v in base)


def living(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> list[Mutant]:
    """The mutants that our search was put to and did not kill."""
    ours = [v for v in verdicts if v.judge == OURS]
    known = {mutant.name: mutant for mutant in mutants}
    return [known[v.kernel] for v in ours if v.kernel in known and not killed(known[v.kernel], v, ours)]


def common(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> list[Mutant]:
    """The mutants that every judge was put to: only on them are judges compared."""
    asked = _asked_by_all(verdicts)
    return [m for m in mutants if m.name in asked]


def _asked_by_all(verdicts: Sequence[Verdict]) -> set[str]:
    """The kernels that every judge was put to."""
    judges = {v.judge for v in verdicts}
    asked = {(v.kernel, v.judge) for v in verdicts}
    return {v.kernel for v in verdicts if all((v.kernel, judge) in asked for judge in judges)}


def summary_rows(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> list[Judged]:
    """One row a judge, ours first, the others by falling kills; over those of ``mutants`` that it judged."""
    known = {mutant.name: mutant for mutant in mutants}
    hidden = held_out(known)
    rows = []
    for judge in dict.fromkeys(v.judge for v in verdicts):
        mine = [v for v in verdicts if v.judge == judge]
        tried = [v for v in mine if v.kernel in known]
        kills = [v for v in tried if killed(known[v.kernel], v, mine)]
        correct = [v for v in mine if v.kernel not in known]
        subtle = [v for v in tried if known[v.kernel].accuracy_only]
        rows.append(
            Judged(
                judge=judge,
                kills=len(kills),
                mutants=len(tried),
                accuracy_kills=sum(known[v.kernel].accuracy_only for v in kills),
                accuracy_mutants=len(subtle),
                held_out_kills=sum(v.kernel in hidden for v in kills),
                held_out_mutants=sum(v.kernel in hidden for v in tried),
                alarms=sum(v.rejected for v in correct),
                correct=len(correct),
                seconds_to_kill=statistics.median(v.seconds for v in kills) if kills else 0.0,
                seconds_in_all=sum(v.seconds for v in mine),
            )
        )
    return sorted(rows, key=lambda row: (row.judge != OURS, -row.kills, row.judge))


def kill_table(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> str:
    """Markdown: ours over all mutants, then every judge over those that all of them judged."""
    rows = summary_rows(mutants, [v for v in verdicts if v.judge == OURS])
    if len({v.judge for v in verdicts}) > 1:
        rows += summary_rows(common(mutants, verdicts), _without_others(verdicts))
    lines = [
        "| judge | mutants killed | only lose accuracy | held out | correct accused | median s to kill |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        cells = (
            row.judge,
            f"{row.kills} of {row.mutants}",
            f"{row.accuracy_kills} of {row.accuracy_mutants}",
            f"{row.held_out_kills} of {row.held_out_mutants}",
            f"{row.alarms} of {row.correct}",
            f"{row.seconds_to_kill:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finding(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> Finding:
    """What every report shows: judges against each other, and mutant × judge."""
    (ours,) = summary_rows(mutants, [v for v in verdicts if v.judge == OURS])
    rows = summary_rows(common(mutants, verdicts), _without_others(verdicts))
    same, peers = rows[0], rows[1:]
    ahead = all(same.kills >= peer.kills and same.alarms <= peer.alarms for peer in peers)
    lives = living(mutants, verdicts)
    everything = all(mutant.unseen for mutant in lives) and ours.alarms == 0
    return Finding(
        name="detection power",
        verdict="SUPPORTED" if ahead and everything else "REFUTED",
        statement="Every mutant but those that hardly leave what their base declares is killed by a default "
        "search, no correct implementation is accused, and no rule in use today kills as many.",
        source="nox -s mutants -- --judges both --write",
        evidence=f"{ours.kills} of {ours.mutants} mutants killed ({ours.held_out_kills} of "
        f"{ours.held_out_mutants} that were held out of tuning, seed {HELD_OUT_SEED}), {ours.alarms} of "
        f"{ours.correct} correct implementations accused, median {ours.seconds_to_kill:.1f} s to a kill"
        + "".join(f"; {m.name} lives: {m.unseen or m.story}" for m in lives),
        series=(_judges(rows), _matrix(mutants, verdicts)),
    )


def _without_others(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts on the mutants and correct implementations that all judges judged."""
    asked = _asked_by_all(verdicts)
    return [v for v in verdicts if v.kernel in asked]


def _judges(rows: Sequence[Judged]) -> Series:
    columns = {
        "judge": [row.judge for row in rows],
        "mutants killed": [row.kills for row in rows],
        "of": [row.mutants for row in rows],
        "accuracy only, killed": [row.accuracy_kills for row in rows],
        "accuracy only, of": [row.accuracy_mutants for row in rows],
        "held out, killed": [row.held_out_kills for row in rows],
        "held out, of": [row.held_out_mutants for row in rows],
        "correct kernels accused": [row.alarms for row in rows],
        "correct kernels": [row.correct for row in rows],
        "median seconds to kill": [round(row.seconds_to_kill, 2) for row in rows],
        "seconds in all": [round(row.seconds_in_all, 1) for row in rows],
    }
    return Series(
        "Judges over the same mutants and correct implementations",
        "table",
        columns,
        "judge",
        "mutants killed",
    )


def _matrix(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> Series:
    """Rows of mutants, a column a judge: killed, or what else came."""
    known = {mutant.name: mutant for mutant in mutants}
    judges = [row.judge for row in summary_rows(mutants, verdicts)]
    said = {(v.kernel, v.judge): v for v in verdicts}
    names = sorted({v.kernel for v in verdicts if v.kernel in known}, key=lambda n: (known[n].mechanism, n))
    hidden = held_out(known)

    def cell(name: str, judge: str) -> str:
        verdict = said.get((name, judge))
        if verdict is None:
            return "not run"
        if killed(known[name], verdict, [v for v in verdicts if v.judge == judge]):
            return f"killed, {verdict.seconds:.1f} s"
        if not verdict.rejected:
            return "survived" if verdict.cases else "nothing applies"
        return "other reason" if not verdict.fits else "base rejected"

    columns: dict[str, list[object]] = {
        "mutant": list(names),
        "mechanism": [known[name].mechanism for name in names],
        "bug": [known[name].bug for name in names],
        "held out": ["yes" if name in hidden else "" for name in names],
        **{judge: [cell(name, judge) for name in names] for judge in judges},
    }
    return Series("Mutant × judge", "table", columns, "mutant", OURS)
