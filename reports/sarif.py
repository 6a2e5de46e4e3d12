"""The SARIF 2.1.0 report (OASIS standard): one result for each kernel, rule and regime.

Its location is the kernel. A failure that the suite lists is given as suppressed, with the reason; unverified
cases are warnings of the tool itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

from attnproof.reports.record import Event
from attnproof.reports.summary import summarize
from attnproof.reports.tables import FailureGroup, KernelSummary, Remark, Summary

__all__ = ["render"]

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

RULES = {
    "certain": "The error exceeds what any correct kernel of this declaration may return.",
    "probable-row": "The rms error of a row exceeds the calibrated threshold.",
    "probable-output": "The rms error of an output exceeds the calibrated threshold.",
    "bias": "The errors lean to one side, significantly and by more than the calibrated fraction.",
    "nonfinite": "NaN or infinity where the contract requires a finite value.",
    "empty-row": "A row that sees no key does not hold what the contract requires.",
    "shape": "An output has another shape or dtype than the contract says.",
    "mutation": "An input was modified.",
    "aliasing": "An output shares memory with an input or another output.",
    "determinism": "Two calls on the same tensors differ.",
    "exception": "The kernel raised.",
    "crash": "The process of the kernel died.",
    "timeout": "The kernel did not return in time.",
    "memory": "The kernel went over its memory limit.",
    "output-flood": "The kernel printed without end.",
    "not-caught": "A case listed to fail passed.",
    "drift": "Worse than the recorded baseline.",
}
"""Short descriptions; a rule that is not here is described by its name."""


def render(events: Iterable[Event]) -> str:
    """The record ``events`` as a SARIF 2.1.0 log, indented JSON."""
    summary = summarize(events)
    results = [_failure(group) for group in summary.failures]
    targets = {kernel.name: kernel.target for kernel in summary.kernels}
    results += [_not_caught(remark, targets.get(remark.kernel, "")) for remark in summary.survived]
    results += [_drift(kernel) for kernel in summary.kernels if kernel.verdict == "DRIFT"]
    rules = sorted({result["ruleId"] for result in results})
    for result in results:
        result["ruleIndex"] = rules.index(result["ruleId"])
    started = next((run.started for run in summary.runs if run.started), None)
    driver = {
        "name": "attnproof",
        "version": started.version if started else "unknown",
        "rules": [{"id": rule, "shortDescription": {"text": RULES.get(rule, rule)}} for rule in rules],
    }
    run = {"tool": {"driver": driver}, "invocations": _invocations(summary), "results": results}
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, allow_nan=False) + "\n"


def _failure(group: FailureGroup) -> dict[str, Any]:
    result = _result(group.kernel, group.target, group.rule, group.regime, group.failure.reason, group.count)
    result["properties"] |= {
        "case": group.case.id,
        "dtypes": list(group.dtypes),
        "worstRatio": _number(group.worst_ratio),
        "script": group.failure.script,
    }
    if group.listed:
        reason = "the suite lists this example kernel to fail in this regime"
        result["suppressions"] = [{"kind": "external", "justification": reason}]
    return result


def _not_caught(remark: Remark, target: str) -> dict[str, Any]:
    text = "The suite lists these cases to fail, and they passed: a known mistake was not noticed."
    result = _result(remark.kernel, target, "not-caught", remark.regime, text, remark.cases)
    result["properties"]["case"] = remark.case_id
    return result


def _drift(kernel: KernelSummary) -> dict[str, Any]:
    reason = kernel.reason or RULES["drift"]
    return _result(kernel.name, kernel.target, "drift", "", reason, kernel.cases)


def _result(kernel: str, target: str, rule: str, regime: str, reason: str, cases: int) -> dict[str, Any]:
    """One result; its fingerprint stays the same from run to run, so that viewers can tell old from new."""
    where = f"{kernel}, {regime}" if regime else kernel
    fingerprint = hashlib.sha256(f"{target}\0{kernel}\0{rule}\0{regime}".encode()).hexdigest()
    location = {"name": kernel, "fullyQualifiedName": target or kernel, "kind": "function"}
    return {
        "ruleId": rule,
        "level": "error",
        "message": {"text": f"{where}: {reason}"},
        "locations": [{"logicalLocations": [location]}],
        "partialFingerprints": {"kernelRuleRegime/v1": fingerprint},
        "properties": {"kernel": kernel, "regime": regime, "cases": cases},
    }


def _invocations(summary: Summary) -> list[dict[str, Any]]:
    """One invocation a run; the notices go with the first."""
    notices = [
        {
            "level": "warning",
            "message": {"text": f"{remark.kernel}, {remark.regime}: unverified: {remark.text}"},
        }
        for remark in summary.unverified
    ]
    invocations: list[dict[str, Any]] = []
    for run in summary.runs:
        invocation: dict[str, Any] = {"executionSuccessful": run.finished is not None}
        if run.started:
            invocation["commandLine"] = run.started.command
        if run.finished:
            invocation["exitCode"] = run.finished.exit_code
        else:
            text = "the record is incomplete: it ends before the run did"
            notices.append({"level": "error", "message": {"text": text}})
        invocations.append(invocation)
    if not invocations:
        invocations.append({"executionSuccessful": False})
    invocations[0]["toolExecutionNotifications"] = notices
    return invocations


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they are given as text, as in the record."""
    return value if value is None or math.isfinite(value) else str(value)
