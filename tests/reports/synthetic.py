"""A builder of synthetic records that look like those of a run, for every test of the reports."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from attnproof.reports.record import (
    SCHEMA_VERSION,
    CaseJudged,
    CaseRecord,
    Event,
    Failure,
    Finding,
    KernelJudged,
    KernelStarted,
    OutputStatistics,
    RunFinished,
    RunStarted,
    Series,
)

HOSTILE = "<script>alert('out')</script>&\"'</pre><!--"
"""What a hostile kernel may print; it must reach no page as markup."""

KERNELS = {
    "softmax.attention": ("softmax", False),
    "softmax.split_kv": ("softmax", False),
    "softmax.decode": ("softmax", False),
    "softmax.backward": ("softmax", False),
    "sigmoid.attention": ("sigmoid", False),
    "relu.attention": ("relu", False),
    "linear.chunked": ("linear", False),
    "linear.recurrent": ("linear", False),
    "gated_linear.chunked": ("gated_linear", False),
    "delta.chunked": ("delta", False),
    "ssm.convolution": ("ssm", False),
    "selective_scan.scan": ("selective_scan", False),
    "ssd.chunked": ("ssd", False),
    "logsumexp.online": ("logsumexp", False),
    "prefix_scan.online": ("prefix_scan", False),
    "examples.no_max": ("softmax", True),
    "examples.bf16_sum": ("softmax", True),
    "examples.leaky_mask": ("softmax", True),
}
REGIMES = {
    "plain": "plain",
    "peaked": "plain",
    "uniform": "tied",
    "tied": "tied",
    "large-logits": "extreme",
    "overflowing": "extreme",
    "subnormal": "extreme",
    "cancelling": "extreme",
    "masked-rows": "plain",
    "nonfinite": "extreme",
    "exact": "exact",
    "degenerate": "exact",
}
DTYPES = ("float32", "float16", "bfloat16")
LISTED = {
    "examples.no_max": ("large-logits", "overflowing"),
    "examples.bf16_sum": ("uniform", "cancelling"),
    "examples.leaky_mask": ("masked-rows",),
}
SCRIPT = """\
import torch
from attnproof import check
from {module} import attention

# Fails on every machine: the row maximum is not subtracted before exp.
check(attention, "{case}")
"""


def build_events(cases: int = 300, *, seed: int = 0, finished: bool = True) -> Iterator[Event]:
    """Events of a run over all of KERNELS with about ``cases`` cases; delta.chunked fails unexpectedly."""
    draw = random.Random(seed)
    yield RunStarted(
        schema=SCHEMA_VERSION,
        command="attnproof verify --jobs 2",
        version="0.1.0",
        started="2026-03-01T12:00:00Z",
        seed=seed,
        platform={"system": "Linux x86_64", "python": "3.11.9", "torch": "2.13.0+cpu", "triton": "3.9.0"},
    )
    each = max(1, cases // len(KERNELS))
    for name, (family, example) in KERNELS.items():
        yield from _kernel_events(draw, name, family, example, each)
    yield calibration(draw)
    yield Finding(
        name="softmax: online equals two-pass within certain",
        verdict="held up",
        statement="The rescaled sum of the online softmax stays within the budget of the two-pass form.",
        source="Milakov & Gimelshein 2018",
        evidence="1,200 cases, N up to 4096; worst ratio 0.31.",
        series=(
            Series(
                "Worst ratio by N",
                "table",
                {"N": [128, 1024, 4096], "ratio": [0.31, 0.2, math.inf]},
                "N",
                "ratio",
            ),
        ),
    )
    if finished:
        yield RunFinished("FAIL", 1, 754.2, "delta.chunked did not come out as listed")


def _kernel_events(draw: random.Random, name: str, family: str, example: bool, cases: int) -> Iterator[Event]:
    target = f"attnproof.kernels.{name.replace('.', ':')}"
    contract = {
        "family": family,
        "dtypes": list(DTYPES),
        "options": ["causal", "window"],
        "deterministic": True,
    }
    yield KernelStarted(name, target, family, "emulator", contract, example, cases)
    judged = [_case(draw, name, family, number) for number in range(cases)]
    yield from judged
    failed = sum(event.verdict == "FAIL" for event in judged)
    unverified = sum(event.verdict == "UNVERIFIED" for event in judged)
    unexpected = unverified + sum(event.verdict == "FAIL" and event.expected == "PASS" for event in judged)
    yield KernelJudged(
        kernel=name,
        verdict="FAIL" if failed else "UNVERIFIED" if unverified else "PASS",
        as_expected=not unexpected,
        reason=f"{failed} of {cases} cases failed" if failed else "nothing failed",
        cases=cases,
        failed=failed,
        vacuous=sum(bool(event.vacuous) for event in judged),
        declined=sum(event.verdict == "DECLINED" for event in judged),
        unverified=unverified,
        seconds=round(draw.uniform(2, 90), 2),
    )


def _case(draw: random.Random, kernel: str, family: str, number: int) -> CaseJudged:
    regime = list(REGIMES)[number % len(REGIMES)]
    dtype = DTYPES[(number // len(REGIMES)) % len(DTYPES)]
    n, d = draw.choice((1, 5, 16, 64, 100, 128, 257, 512, 1024, 2048)), draw.choice((16, 64, 128))
    case = CaseRecord(
        id=f"{family}/{dtype}/{regime}/B1.H2.M{n}.N{n}.D{d}/causal/seed{number}",
        family=family,
        dtype=dtype,
        regime=regime,
        regime_class=REGIMES[regime],
        shape={"B": 1, "H": 2, "M": n, "N": n, "D": d},
        options={"causal": True} if number % 2 else {},
        view="contiguous" if number % 3 else "sliced",
        seed=number,
    )
    listed = regime in LISTED.get(kernel, ())
    defect = listed or (kernel == "delta.chunked" and regime == "cancelling")
    ratio = _certain_ratio(draw, dtype, regime, n, defect)
    verdict = "FAIL" if defect else "PASS"
    if kernel == "softmax.decode" and regime == "degenerate":
        verdict = "DECLINED"
    if kernel == "ssm.convolution" and regime == "overflowing" and number < 12:
        verdict = "UNVERIFIED"
    return CaseJudged(
        kernel=kernel,
        case=case,
        verdict=verdict,
        expected="FAIL" if listed else "PASS",
        failures=_failures(draw, kernel, case, ratio, verdict),
        vacuous=(f"values: all rows nearly uniform (largest p {draw.uniform(0, 0.02):.4f})",)
        if regime == "uniform"
        else (),
        unjudged={"row sees a NaN or inf": n * d} if regime == "nonfinite" else {},
        outputs={}
        if verdict in ("DECLINED", "UNVERIFIED")
        else {"o": _statistics(draw, n, d, ratio, regime)},
        seconds=round(draw.uniform(0.01, 0.5), 4),
        kernel_seconds=round(draw.uniform(0.001, 0.1), 4),
    )


def _certain_ratio(draw: random.Random, dtype: str, regime: str, n: int, defect: bool) -> float:
    if defect:
        return math.inf if regime == "overflowing" else draw.lognormvariate(3, 2) + 1.01
    if regime == "exact":
        return 0.0
    slack = 0.02 / math.sqrt(n) if dtype == "float32" else 0.2
    return min(0.9, slack * draw.lognormvariate(0, 0.5))


def _statistics(draw: random.Random, n: int, d: int, ratio: float, regime: str) -> OutputStatistics:
    row = ratio * 3 if ratio > 1 else abs(draw.gauss(1, 0.2)) * (ratio > 0)
    return OutputStatistics(
        elements=2 * n * d,
        judged=2 * n * d - (n * d if regime == "nonfinite" else 0),
        worst_certain=ratio,
        worst_probable=row * 3.5,
        row_probable=row,
        rms_probable=row * 0.7,
        bias=draw.gauss(0, 0.05),
        certain_reach=0.01,
        logit_magnitude=draw.lognormvariate(6 if "large" in regime or "over" in regime else 1.5, 1),
        arithmetic={"float64": 2 * n},
    )


def _failures(
    draw: random.Random, kernel: str, case: CaseRecord, ratio: float, verdict: str
) -> tuple[Failure, ...]:
    if verdict == "DECLINED":
        return (Failure("declined", "the kernel raised NotImplementedError: N = 1 is not supported"),)
    if verdict == "UNVERIFIED":
        return (Failure("unverified", "Arb needed more than 4096 bits for row 3"),)
    if verdict == "PASS":
        return ()
    reason = (
        f"o[0, 1, 3, 5] = 0.25, exact 0.1875 ± 1e-16: error {ratio:.3g} times the certain budget; "
        "key positions 0 and 7 carry 99 % of the row"
    )
    return (
        Failure(
            rule="certain",
            reason=reason,
            output="o",
            index=(0, 1, 3, 5),
            expected=0.1875,
            radius=1e-16,
            got=math.nan if ratio == math.inf else 0.25,
            ratio=ratio,
            detail=f"standard output of the kernel:\n{HOSTILE}",
            script=SCRIPT.format(module=f"attnproof.kernels.{kernel}", case=case.id)
            if draw.random() < 0.8
            else "",
        ),
    )


def calibration(draw: random.Random) -> Finding:
    """The calibration plot: error/probable of healthy kernels, with the thresholds fitted to their tails."""
    columns: dict[str, list[object]] = {"row rms of error/probable": [], "dtype": [], "threshold": []}
    for dtype, threshold in zip(DTYPES, (4.1, 3.6, 3.4), strict=True):
        columns["row rms of error/probable"] += [round(draw.lognormvariate(0, 0.25), 4) for _ in range(400)]
        columns["dtype"] += [dtype] * 400
        columns["threshold"] += [threshold] * 400
    return Finding(
        name="calibration",
        verdict="fitted",
        statement="Thresholds are tail fits, estimated below 1e-6 per case, observed 0 of 1,200.",
        source="Higham & Mary 2019",
        evidence="Validated on implementations that were not used in the fit.",
        series=(
            Series("Healthy kernels", "histogram", columns, "row rms of error/probable", "cases", "dtype"),
            Series(
                "False alarms against threshold",
                "line",
                {"threshold": [1.0, 2.0, 3.0, 4.0], "rate": [0.4, 1e-2, 1e-4, 1e-6]},
                "threshold",
                "rate",
                log=("rate",),
            ),
        ),
    )
