"""Thresholds of the probable budget, fitted to correct implementations and validated on others.

``python -m attnproof.calibration`` (nox session ``calibrate``) judges some twenty thousand cases: the default
plan over several seeds, and long rows of up to 4096 keys. A third of the implementations of each family,
drawn with the seed ``HELD_OUT_SEED``, take no part in the fit; they are counted. It writes package data: the
record (what the fit needs of each case), the thresholds with the intervals of their estimates, and the
finding that every report shows. ``--share 2`` judges a seeded 2 % of the same cases again and writes nothing;
``--refit`` fits the stored record again; ``--reach`` measures the certain budget (``reach``).

Why healthy statistics are what they are. With the output's own spacing and the mean square of a rounding in
the probable budget (``budgets.rounding``), a healthy kernel in half precision has an output rms of 1, to a
few hundredths where many elements are judged, whatever its algorithm. What spreads is the number of
independent errors behind a statistic. Elements of a row share the errors of its scores and of its normaliser,
and where columns of V are alike (cancelling-values: all of one size) also those of P: such a row's rms is
that of one error, and the largest of a thousand rows is above 3. Rows of one element have a bin of their own
for that reason, and thresholds of rows are above those of outputs. In float32 logits of 10³ and more make
score errors all of the error, with few keys that matter, which is in the fit. Sums of equal terms, one after
the other, round the same way each time: the budget knows of those where all terms are one number. Equal rows,
of broadcast inputs, are one row: the signed mean is judged over distinct rows.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from attnproof import healthy_prefix_scans, healthy_scans, healthy_states
from attnproof.calibration_finding import Placed, calibration_finding
from attnproof.campaign import Campaign
from attnproof.gradient_alarms import gradient_cases
from attnproof.properties.case import Case, case_states
from attnproof.properties.contract import Contract, contract_of
from attnproof.properties.regimes import REGIMES, plan
from attnproof.properties.regimes.regime import STATE_FAMILIES
from attnproof.properties.signatures import SIGNATURES
from attnproof.reach import beyond, measure_reach, reach_series
from attnproof.reports.record import CaseJudged, Finding
from attnproof.statistics import ANY_CLASS, Thresholds, stored_thresholds, threshold_key
from attnproof.suite import STATE_FORMS, default_device
from attnproof.tails import tail
from attnproof.targets import Importable, resolve
from attnproof.trials import Subject

__all__ = [
    "HELD_OUT_SEED",
    "IMPLEMENTATIONS",
    "Alarms",
    "Sample",
    "alarms",
    "fit",
    "held_out",
    "plans",
    "sampled",
    "stored_finding",
]

_ALGORITHMS = (
    *("backwards", "base_two", "divided_first", "key_by_key", "lazy_rescaling", "packed_groups"),
    *("scaled_queries", "split_and_merge", "tiles_16_16", "tiles_32_128", "tiles_128_32", "tree_of_tiles"),
    *("triton_16_16", "triton_32_128", "triton_64_16", "triton_tf32", "two_pass"),
    *("online_logsumexp", "pairwise_logsumexp", "base_two_softmax_rows", "two_pass_softmax_rows"),
)
# Classes of regimes in which a family is held to its certain budget alone. Where keys are nearly parallel and
# β is 2, chunkwise kernels of the delta rule err in half precision by up to 12 times the probable budget,
# which does not know how such errors add.
_CERTAIN_ONLY = (("delta", "tied"),)
_SCORE_FAMILIES = ("sigmoid", "relu", "batch_normalised", "scaled_head", "differential", "easy")
_SOFTMAX_GRADIENTS = ("attention_atomic", "autograd_attention", "stored_attention", "flash_attention")
IMPLEMENTATIONS = (
    "attnproof.kernels.softmax:attention",
    "attnproof.kernels.softmax:attention_split",
    "attnproof.adapters:attention_split_in_three",
    "attnproof.kernels.logsumexp:logsumexp",
    "attnproof.kernels.softmax_rows:softmax_rows",
    "attnproof.healthy:plain_attention",
    "attnproof.healthy:plain_logsumexp",
    "attnproof.healthy:plain_softmax_rows",
    "attnproof.healthy:sdpa_math",
    "attnproof.healthy:sdpa_flash",
    "attnproof.healthy_flash:tiled_attention",
    *(f"attnproof.healthy_algorithms:{name}" for name in _ALGORITHMS),
    "attnproof.kernels.softmax:attention_atomic",
    *(f"attnproof.healthy_gradients:{name}" for name in _SOFTMAX_GRADIENTS[1:]),
    *(f"attnproof.kernels.{family}:attention" for family in _SCORE_FAMILIES),
    *(
        f"attnproof.healthy_gradients:{kind}_{family}"
        for family in _SCORE_FAMILIES
        for kind in ("autograd", "stored")
    ),
    *(f"attnproof.kernels.{family}:{form}" for family, forms in STATE_FORMS.items() for form in forms),
    *(
        f"{module.__name__}:{name}"
        for module in (healthy_states, healthy_scans, healthy_prefix_scans)
        for name in module.__all__
    ),
)
HELD_OUT_SEED = 20261122

# Cases of the emulator take several times as long as those of torch; it gets this share of the number.
_EMULATED_SHARE = 0.35
_LONG_SHARE = 0.05
# What torch autograd computes is judged by its gradients in most cases, of which many are small.
_WITH_GRADIENTS = tuple(
    f"attnproof.healthy_{kind}:" for kind in ("gradients", "states", "scans", "prefix_scans")
)
_GRADIENT_SHARE, _GRADIENT_WORK = 0.8, 2**18
_LONG = (1024, 2048, 3000, 4096)
_LONG_ROWS = 4
# Fewer cases than this say nothing of a class of its own.
_FEWEST = 40
# The signed mean of fewer distinct rows is never judged (``Thresholds.biased``).
_BIASED_ROWS = 8
_RECORD = "calibration.jsonl.gz"
# JSON has no infinity.
_INFINITE = 1e300
_STATISTICS = ("row", "output", "bias")
# Floors of (row, output, bias): a kernel that makes every declared rounding has an output rms of 1 by
# construction, over 16 elements at most sqrt(chi²/16) = 1.9 in one case of a million, over one element 4.9;
# where all rows have the same few weights (capped scores) they share the errors of P, and half of the
# variance is that of ten errors: 1.8 in 10⁻⁸ of such cases, 1.5 in 10⁻⁴. The mean is then at most 1.
_LEAST = {"wide": (2.0, 1.8, 1.0), "narrow": (4.0, 2.0, 1.0), "single": (5.0, 2.0, 1.0)}

# A gradient is a sum of products of three errors' bearers or more; where few keys carry all weight, as in
# extreme regimes, all its elements share the error of one logit, which may be twice its standard deviation.
_DERIVED = 2.0
_FEW_ERRORS = ("extreme", ANY_CLASS)
# Their tails differ from one implementation to the next more than those of outputs: of 2,700 cases of those
# that were held out two passed plain fits, by 9 and 21 percent.
_MARGIN = 1.5
# So do outputs of kernels that compute their operands, whose errors (of a mean, say) all rows share.
_COMPUTED = ("batch_normalised", "scaled_head")
# Recurrences and chunks of families with a state round other things.
_WIDER_MARGIN = 2.0


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """What the fit needs of a judged case.

    ``outputs`` has, by name, row rms, output rms, signed mean, worst error/certain and the rows judged.
    """

    kernel: str
    case: str
    verdict: str
    outputs: dict[str, tuple[float, float, float, float, int]]


@dataclass(frozen=True)
class Alarms:
    """Cases of one implementation that thresholds would have failed: ``alarms`` of ``cases``."""

    cases: int
    alarms: int


def _name(target: str) -> str:
    """How the record calls an implementation; the suite's kernels, all called attention, by their family."""
    module, _, name = target.partition(":")
    family = module.rpartition(".")[2]
    return f"{family}.{name}" if family in (*_SCORE_FAMILIES, *STATE_FORMS) else name


def _contract(target: str) -> Contract:
    contract = contract_of(resolve(target))
    assert contract is not None, f"{target} has no contract"
    return contract


def held_out(targets: Sequence[str] = IMPLEMENTATIONS, seed: int = HELD_OUT_SEED) -> tuple[str, ...]:
    """A third of the implementations of each family (at least one), drawn with ``seed``.

    Those of softmax that are judged by their gradients as well are drawn for themselves.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for target in sorted(targets):
        contract = _contract(target)
        apart = contract.family == "softmax" and _name(target) in _SOFTMAX_GRADIENTS
        families[f"{contract.family} gradients" if apart else contract.family].append(target)
    draw = random.Random(seed)
    # Families with a state came later, and scans after them; the draws of the others stay what they were.
    order = sorted(families, key=lambda name: (_came(name.split()[0]), name))
    return tuple(
        target
        for members in map(families.__getitem__, order)
        for target in sorted(draw.sample(members, max(1, round(len(members) / 3))))
    )


def _came(family: str) -> int:
    """In which wave a family came."""
    return 0 if not SIGNATURES[family].stateful else 1 if family in STATE_FAMILIES else 2


def sampled(event: CaseJudged) -> Sample:
    """The sample of a judged case, numbers to four digits."""
    outputs, case = {}, Case.parse(event.case.id)
    for name, n in event.outputs.items():
        numbers = (n.row_probable, n.rms_probable, n.bias, n.worst_certain)
        row, output, bias, certain = (float(f"{min(number, _INFINITE):.4g}") for number in numbers)
        rows = n.judged // max(1, _width(case, name))
        outputs[name] = (row, output, bias, certain, rows)
    return Sample(event.kernel, event.case.id, event.verdict, outputs)


def _width(case: Case, output: str) -> int:
    """Elements in a row of an output: along its last axis, if it has one beyond those of rows."""
    form = SIGNATURES[case.family]
    if output == "y":
        return case["N"] if case.family == "softmax_rows" else 1
    name = output.removeprefix("d")
    if form.stateful:
        state = name.removeprefix("initial_")
        states = {**case_states(case), **form.outputs}
        axes = states[state] if state in states else case.axes_of(name)
        assert axes is not None, f"{case.id} has no {output}"
        return form.shape(axes[-1:], case.all_sizes)[0]
    if output in ("lse", "dsinks", "dbeta", "dlam"):
        return 1
    if name in ("bias", "alpha"):
        return case["N"]
    axes = (form.tensors if name in form.tensors else form.outputs)[name]
    return form.shape(axes[-1:], case.sizes)[0]


def _statistics(sample: Sample) -> Iterator[tuple[str, dict[str, float]]]:
    """Key and statistics of each output of which anything was compared."""
    case = Case.parse(sample.case)
    regime_class = REGIMES[case.regime].regime_class
    for name, (row, output, bias, _, rows) in sample.outputs.items():
        if rows and output > 0.0:
            width = _width(case, name)
            found = {"row": row, "output": output}
            if rows >= _BIASED_ROWS and case.view != "broadcast" and not name.startswith("d"):
                found["bias"] = abs(bias)
            yield threshold_key(case.family, name, case.dtype, regime_class, width), found


def fit(samples: Iterable[Sample]) -> dict[str, Thresholds]:
    """Thresholds by key from judged cases of healthy implementations."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: {name: [] for name in _STATISTICS})
    for sample in samples:
        for key, found in _statistics(sample):
            for name, value in found.items():
                columns[key][name].append(value)
                columns[_pooled(key)][name].append(value)
    return {
        key: _fitted(key, found)
        for key, found in sorted(columns.items())
        if len(found["row"]) >= _FEWEST or _certain_only(key)
    }


def _certain_only(key: str) -> bool:
    """Whether a class of regimes is held to its certain budget alone."""
    family, _, _, regime_class, _ = key.split("/")
    return (family, regime_class) in _CERTAIN_ONLY


def _fitted(key: str, columns: Mapping[str, list[float]]) -> Thresholds:
    family, output, _, regime_class, width = key.split("/")
    margin = _MARGIN if output.startswith("d") or family in _COMPUTED else 1.0
    margin = _WIDER_MARGIN if family in STATE_FORMS else margin
    least = _LEAST[width]
    if output.startswith("d") and regime_class in _FEW_ERRORS:
        least = (_DERIVED * least[0], _DERIVED * least[1], _DERIVED * least[2])
    limits, intervals = dict(zip(_STATISTICS, least, strict=True)), {}
    if _certain_only(key):
        limits = dict.fromkeys(_STATISTICS, _INFINITE)
    for name, values in columns.items():
        if values:
            found = tail(values)
            limits[name] = float(f"{max(limits[name], margin * found.threshold):.4g}")
            low, high, largest = (float(f"{x:.4g}") for x in (found.low, found.high, found.largest))
            intervals[name] = (low, high, largest)
    return Thresholds(**limits, cases=len(columns["row"]), intervals=intervals)


def _pooled(key: str) -> str:
    """The key of all classes of regimes together."""
    family, output, dtype, _, width = key.split("/")
    return "/".join((family, output, dtype, ANY_CLASS, width))


def alarms(samples: Iterable[Sample], thresholds: Mapping[str, Thresholds]) -> dict[str, Alarms]:
    """By implementation, cases and those beyond a threshold or a certain budget (bias by size alone)."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for sample in samples:
        if sample.verdict != "DECLINED":
            counts[sample.kernel][0] += 1
            counts[sample.kernel][1] += bool(_alarm(sample, thresholds))
    return {kernel: Alarms(*pair) for kernel, pair in sorted(counts.items())}


def _alarm(sample: Sample, thresholds: Mapping[str, Thresholds]) -> str:
    """What of a healthy case would have been a failure, "" if nothing."""
    if sample.verdict == "UNVERIFIED" or (sample.verdict == "FAIL" and not sample.outputs):
        return "not judged"
    for name, (_, _, _, certain, _) in sample.outputs.items():
        if certain > 1.0:
            return f"{name}: error/certain is {certain:.3g}"
    for key, found in _statistics(sample):
        limits = thresholds.get(key) or thresholds.get(_pooled(key))
        for name, value in found.items():
            if limits is not None and value > getattr(limits, name):
                return f"{key}: {name} {value:.3g} is above {getattr(limits, name):.3g}"
    return ""


def plans(targets: Sequence[str], cases: int, seed: int) -> list[tuple[Subject, list[Case]]]:
    """``cases`` for each implementation, fewer in the emulator: seeds of the default plan, and long rows."""
    planned = []
    for target in targets:
        contract = _contract(target)
        device = "cpu" if target.startswith("attnproof.healthy") else default_device()
        device = default_device() if ":triton" in target else device
        count = cases if device == "cpu" else math.ceil(cases * _EMULATED_SHARE)
        subject = Subject(_name(target), Importable(target), contract, device)
        chosen = _long_cases(contract, int(count * _LONG_SHARE), seed)
        if target.startswith(_WITH_GRADIENTS):
            stream = gradient_cases(contract, seed, _GRADIENT_WORK)
            chosen += itertools.islice(stream, int(count * _GRADIENT_SHARE))
        batch = 0
        while len(chosen) < count:
            chosen += plan(
                contract.family,
                dtypes=contract.dtypes,
                options=subject.options,
                supports=contract.supports,
                causal_alignment=contract.causal_alignment,
                budget=min(count, 200),
                seed=seed + batch,
            )
            batch += 1
        planned.append((subject, chosen[:count]))
    return planned


def _long_cases(contract: Contract, count: int, seed: int) -> list[Case]:
    """Few rows over many keys, in regimes and dtypes drawn at random."""
    draw = random.Random(f"long {contract.family} {seed}")
    usable = [r for r in REGIMES.values() if contract.family in r.families and r.available and not r.needs]
    found: list[Case] = []
    while len(found) < count:
        regime, dtype, length = draw.choice(usable), draw.choice(contract.dtypes), draw.choice(_LONG)
        if dtype not in regime.dtypes:
            continue
        shape = {"R": _LONG_ROWS, "N": length}
        options: dict[str, Any] = {}
        if SIGNATURES[contract.family].attention:
            width = 32 if regime.regime_class == "real" else draw.choice((64, 128))
            shape = {"B": 1, "H": 2, "G": 1, "M": _LONG_ROWS, "N": length, "D": width, "E": width}
            options = {"return_lse": True} if "return_lse" in contract.options else {}
            if contract.family == "scaled_head":
                options["pool"] = (1, 3)
        elif SIGNATURES[contract.family].stateful:
            # Recurrences of torch take a step a position, and all positions are rows.
            sizes = {"B": 1, "H": 2, "G": 1, "N": min(length, 1024), "D": 32, "E": 32, "T": 4, "P": 8}
            shape = {symbol: sizes[symbol] for symbol in SIGNATURES[contract.family].symbols}
        elif contract.family == "easy":
            shape = {"B": 1, "H": 1, "N": min(length, 1024), "E": 16}
        found.append(
            Case(contract.family, dtype, shape, regime.name, options, seed=seed * 1000 + len(found))  # type: ignore[arg-type]
        )
    return found


def stored_finding() -> Finding | None:
    """The finding of the committed calibration, or None before the first."""
    path = resources.files("attnproof.data").joinpath("calibration.json")
    return msgspec.json.decode(path.read_bytes(), type=Finding) if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calibration; exit code 1 if a healthy implementation would be accused."""
    parser = argparse.ArgumentParser(prog="python -m attnproof.calibration", description=__doc__)
    parser.add_argument("--cases", type=int, default=800, help="cases for each implementation in torch")
    parser.add_argument(
        "--seed", type=int, default=1000, help="first seed; apart from those of ordinary runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="judge processes")
    parser.add_argument(
        "--into", type=Path, default=Path(__file__).parent / "data", help="folder of the results"
    )
    parser.add_argument(
        "--share",
        type=float,
        metavar="PERCENT",
        help="hold the stored thresholds against this much of the planned cases; write nothing",
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="NAME", help="judge these alone, and keep the record of all others"
    )
    parser.add_argument("--refit", action="store_true", help="fit the stored record again")
    parser.add_argument("--reach", action="store_true", help="measure the certain budget's reach instead")
    chosen = parser.parse_args(arguments)
    if chosen.reach:
        return _reach(chosen.into)
    held = {_name(target) for target in held_out()}
    if chosen.refit:
        known = {_name(target) for target in IMPLEMENTATIONS}
        samples = [sample for sample in _stored(chosen.into) if sample.kernel in known]
    elif chosen.kernels:
        again = [target for target in IMPLEMENTATIONS if _name(target) in chosen.kernels]
        fresh = _judged(chosen.cases, chosen.seed, chosen.jobs, None, again)
        kept = _stored(chosen.into) if (chosen.into / _RECORD).is_file() else []
        samples = [sample for sample in kept if sample.kernel not in chosen.kernels] + fresh
    else:
        samples = _judged(chosen.cases, chosen.seed, chosen.jobs, chosen.share)
    fitted = [sample for sample in samples if sample.kernel not in held]
    thresholds = stored_thresholds() if chosen.share else fit(fitted)
    finding = _finding(samples, held, thresholds)
    if not chosen.share:
        _write(chosen.into, thresholds, finding, samples)
    for sample in samples:
        if reason := _alarm(sample, thresholds):
            print(f"{sample.kernel} {sample.case}\n  {reason}")
    print(f"{finding.verdict}: {finding.evidence}; {len(thresholds)} thresholds")
    return 0 if finding.verdict == "SUPPORTED" else 1


def _finding(samples: Sequence[Sample], held: Iterable[str], thresholds: Mapping[str, Thresholds]) -> Finding:
    """What every report shows of the calibration, with the reach of the certain budget as last measured."""
    placed = []
    for sample in samples:
        for key, found in _statistics(sample):
            if limits := thresholds.get(key) or thresholds.get(_pooled(key)):
                shares = {name: value / getattr(limits, name) for name, value in found.items()}
                placed.append(Placed(sample.kernel, key, shares))
    counted = {name: (c.cases, c.alarms) for name, c in alarms(samples, thresholds).items()}
    stored = stored_finding()
    reach = [series for series in stored.series if "ertain budget" in series.title] if stored else []
    return calibration_finding(placed, frozenset(held), thresholds, counted, HELD_OUT_SEED, reach)


def _reach(folder: Path) -> int:
    """Measure the certain budget's reach into the stored finding; 1 where it is beyond its limit."""
    measured = []
    for found in measure_reach():
        measured.append(found)
        print(f"{found.regime} {found.dtype} N={found.keys} D={found.width}: {found.output:.3g}", flush=True)
    stored = stored_finding()
    if stored is not None:
        kept = [series for series in stored.series if "ertain budget" not in series.title]
        finding = msgspec.structs.replace(stored, series=(*kept, *reach_series(measured)))
        (folder / "calibration.json").write_bytes(msgspec.json.format(msgspec.json.encode(finding)) + b"\n")
    for found in (far := beyond(measured)):
        print(f"beyond its limit: {found}")
    return 1 if far else 0


def _judged(
    cases: int, seed: int, jobs: int, share: float | None, targets: Sequence[str] = IMPLEMENTATIONS
) -> list[Sample]:
    """Judge implementations, or ``share`` percent of their cases drawn at random; progress on stderr."""
    planned = plans(targets, cases, seed)
    if share is not None:
        draw = random.Random(f"share {seed}")
        planned = [
            (subject, draw.sample(chosen, max(1, round(len(chosen) * share / 100.0))))
            for subject, chosen in planned
        ]
    total = sum(len(chosen) for _, chosen in planned)
    samples = []
    for event in Campaign(planned, "attnproof.calibration", seed=seed, jobs=jobs).run():
        if isinstance(event, CaseJudged):
            samples.append(sampled(event))
            if len(samples) % 200 == 0:
                print(f"{len(samples)} of {total} cases", file=sys.stderr, flush=True)
            if event.verdict == "UNVERIFIED" or (event.verdict == "FAIL" and not event.outputs):
                print(event.kernel, event.case.id, event.failures[0].reason, sep="\n  ", file=sys.stderr)
    return samples


def _stored(folder: Path) -> list[Sample]:
    """The samples of the record in ``folder``."""
    with gzip.open(folder / _RECORD) as file:
        return [msgspec.json.decode(line, type=Sample) for line in file]


def _write(
    folder: Path, thresholds: Mapping[str, Thresholds], finding: Finding, samples: Sequence[Sample]
) -> None:
    """The three files of a calibration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("thresholds.json", thresholds), ("calibration.json", finding)):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    with gzip.GzipFile(folder / _RECORD, "wb", mtime=0) as file:
        file.writelines(msgspec.json.encode(sample) + b"\n" for sample in samples)


if __name__ == "__main__":
    sys.exit(main())
