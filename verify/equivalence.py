"""Equal forms of a family against each other: every pair of kernels, on the same inputs, in every dtype.

Two kernels that compute one function may differ by what the two together may err. The distance of each pair,
element by element, is divided by the larger of their certain budgets (so that 2 is the most that the declared
precisions allow), and by their probable ones in quadrature; a form's distance to itself is its error against
the certified reference. The exact statement, that the forms are equal over the rationals, is among
the claims (``attnproof.properties.claims``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from attnproof import healthy_prefix_scans, healthy_scans, healthy_states, processes
from attnproof.properties.case import Case
from attnproof.properties.contract import contract_of
from attnproof.properties.signatures import SIGNATURES
from attnproof.reports.record import Finding, Series
from attnproof.suite import STATE_FORMS, default_device
from attnproof.targets import Importable, resolve
from attnproof.trials import JudgedCall, Subject, judge_call
from attnproof.workers import WorkerPool

__all__ = ["FORMS", "Distance", "distances", "equal_forms"]

_KERNELS = "attnproof.kernels"
_TORCH = "attnproof.healthy_"
_TORCH_NAMES = {
    "recurrent": "torch by steps",
    "chunked": "torch by chunks",
    "convolved": "torch by convolution",
    "matrix": "torch by a matrix",
    "doubling": "torch by doubling",
}
_NAMES = {"attention": "chunkwise", "attention_recurrent": "recurrent"}
# Of these the kernel called attention goes by tiles of scores, or by blocks of prefixes.
_NOT_BY_CHUNKS = ("h3", "prefix_scan", "rwkv4")


def _name(family: str, form: str) -> str:
    """How a form is called in the report."""
    return "blocks" if form == "attention" and family in _NOT_BY_CHUNKS else _NAMES.get(form, form)


FORMS: Mapping[str, Mapping[str, str]] = {
    family: {
        **{_name(family, name): f"{_KERNELS}.{family}:{name}" for name in names},
        # Forms of kernels may share a backward kernel; autograd goes back through each form's own steps.
        **{
            _TORCH_NAMES[kind]: f"{module.__name__}:{kind}_{family}"
            for module in (healthy_states, healthy_scans, healthy_prefix_scans)
            for kind in _TORCH_NAMES
            if hasattr(module, f"{kind}_{family}")
        },
    }
    for family, names in STATE_FORMS.items()
}
"""What computes each form, by family: the suite's kernels, and torch under autograd."""

_DTYPES = ("float32", "float16", "bfloat16")
# Two whole chunks and a ragged one, and widths that differ.
_SIZES = {"B": 1, "H": 2, "G": 1, "N": 150, "D": 24, "E": 16, "T": 4, "P": 6}
_OPTIONS: Mapping[str, tuple[Mapping[str, object], ...]] = {
    "linear": ({"feature_map": "elu1", "normalize": True}, {"feature_map": "identity"}),
    "gated_linear": ({"gate": "channel"}, {"gate": "head"}),
    "delta": ({}, {"gate": "channel"}),
    "ssm": ({"complex": True, "skip": True}, {}),
    "h3": ({"complex": True, "skip": True}, {"skip": True}),
    "selective_scan": (
        {"delta_softplus": True, "delta_bias": True, "z": True, "skip": True},
        {"discretization": "zoh"},
    ),
    "ssd": ({"skip": True}, {}),
}
# Families without initial states.
_STATELESS = ("h3",)
_MOST = 2.0


@dataclass(frozen=True)
class Distance:
    """How far two forms are apart on one case: ``worst`` over the certain budget, ``rms`` over the probable
    one, for outputs and states ("forward") or gradients.
    """

    family: str
    dtype: str
    forms: tuple[str, str]
    part: str
    worst: float
    rms: float


def equal_forms(families: Iterable[str] = (), jobs: int = 2, seed: int = 0) -> Iterator[Finding]:
    """A finding for each family that has several forms: all pairs, in every dtype.

    Args:
        families: names; all if empty, and others than those of :data:`FORMS` are left out.
        jobs: processes; seed: of the inputs.
    """
    wanted = tuple(families)
    chosen = [family for family in FORMS if not wanted or family in wanted]
    if not chosen:
        return
    tasks = [(family, dtype) for family in chosen for dtype in _DTYPES]
    with processes.pool(jobs) as pool:
        found = pool.map(distances, *zip(*tasks, strict=True), itertools.repeat(seed))
        for family, group in itertools.groupby(zip(tasks, found, strict=True), key=lambda pair: pair[0][0]):
            yield _finding(family, [distance for _, part in group for distance in part], seed)


def distances(family: str, dtype: str, seed: int = 0) -> list[Distance]:
    """All pairs of a family's forms in one dtype; kinds of gates and feature maps take turns with dtypes.

    Raises:
        RuntimeError: a kernel or the checker failed, so that there was nothing to compare.
    """
    torch.set_num_threads(1)
    found: list[Distance] = []
    with WorkerPool(jobs=1, spares=0) as pool:
        subjects = {form: _subject(target) for form, target in FORMS[family].items()}
        case = _case(family, dtype, seed)
        calls = {form: judge_call(s, case, pool.call, repeat=False) for form, s in subjects.items()}
        for form, call in calls.items():
            if not call.outputs or call.trial is None:
                raise RuntimeError(f"{form} on {case.id}: {[f.reason for f in call.event.failures]}")
        for a, b in itertools.combinations_with_replacement(calls, 2):
            found += _pair(family, dtype, (a, b), calls)
    return found


def _subject(target: str) -> Subject:
    contract = contract_of(resolve(target))
    assert contract is not None, f"{target} has no contract"
    device = "cpu" if target.startswith(_TORCH) else default_device()
    return Subject(target, Importable(target), contract, device, gradients=True)


def _case(family: str, dtype: str, seed: int) -> Case:
    kinds = _OPTIONS.get(family, ({},))
    options = kinds[_DTYPES.index(dtype) % len(kinds)]
    carried: dict[str, object] = {"initial_state": True, "return_state": True}
    chosen = {**options, **({} if family in _STATELESS else carried), "cotangents": "normal"}
    shape = {symbol: _SIZES[symbol] for symbol in SIGNATURES[family].symbols}
    return Case(family, dtype, shape, "normal", chosen, seed=seed)  # type: ignore[arg-type]


def _pair(
    family: str, dtype: str, forms: tuple[str, str], calls: Mapping[str, JudgedCall]
) -> Iterator[Distance]:
    a, b = (calls[form] for form in forms)
    trial = a.trial
    assert trial is not None
    for part in ("forward", "gradients"):
        worst, squares, count = 0.0, 0.0, 0
        for name, x in a.outputs.items():
            if (name in trial.problem.outputs) != (part == "forward"):
                continue
            budget, exact = trial.budgets[name], trial.reference.outputs[name].value
            y = exact if forms[0] == forms[1] else b.outputs[name].double()
            judged = ~budget.open & ~budget.overflow
            apart = (x.double() - y).abs()[judged]
            if apart.numel():
                certain, probable = budget.certain[judged], budget.probable[judged]
                if forms[0] != forms[1]:
                    assert b.trial is not None
                    other = b.trial.budgets[name]
                    certain = torch.maximum(certain, other.certain[judged])
                    probable = torch.hypot(probable, other.probable[judged])
                worst = max(worst, float(_over(apart, certain).max()))
                squares += float(_over(apart, probable).square().sum())
                count += apart.numel()
        if count:
            yield Distance(family, dtype, forms, part, worst, math.sqrt(squares / count))


def _over(apart: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    return torch.where(apart == 0, 0.0, apart / budget.clamp(min=5e-324))


def _finding(family: str, found: Sequence[Distance], seed: int) -> Finding:
    wrong = [d for d in found if not d.worst <= (1.0 if d.forms[0] == d.forms[1] else _MOST)]
    forms = list(FORMS[family])
    pairs = len(forms) * (len(forms) - 1) // 2
    apart = [d for d in found if d.forms[0] != d.forms[1]]
    carried = "" if family in _STATELESS else ", with states in and out"
    evidence = (
        f"{len(forms)} forms ({', '.join(forms)}), {pairs} pairs, {len(_DTYPES)} dtypes, N = {_SIZES['N']}"
        f"{carried}: largest distance {max(d.worst for d in apart):.2g} certain budgets, rms "
        f"{min(d.rms for d in apart):.2g} to {max(d.rms for d in apart):.2g} of the probable ones"
    )
    if wrong:
        worst = max(wrong, key=lambda d: d.worst)
        evidence += f"; {' and '.join(worst.forms)} in {worst.dtype} differ by {worst.worst:.3g}"
    return Finding(
        name=f"equal forms: {family}",
        verdict="REFUTED" if wrong else "SUPPORTED",
        statement=f"The kernels of the forms of {family} differ by no more than twice the certain budget, "
        "outputs, states and gradients, and each from the certified reference by no more than one.",
        source="attnproof verify",
        evidence=evidence,
        series=tuple(_series(family, part, found) for part in ("forward", "gradients")),
        seed=seed,
    )


def _series(family: str, part: str, found: Sequence[Distance]) -> Series:
    """Form by form and dtype, worst over its cases: a picture in colours, and the table beneath it."""
    cells: dict[tuple[str, str, str], tuple[float, float]] = {}
    for d in found:
        if d.part == part:
            for first, second in {d.forms, d.forms[::-1]}:
                before = cells.get((d.dtype, first, second), (0.0, 0.0))
                cells[d.dtype, first, second] = (max(before[0], d.worst), max(before[1], d.rms))
    order = {form: place for place, form in enumerate(FORMS[family])}
    keys = sorted(cells, key=lambda key: (_DTYPES.index(key[0]), order[key[1]], order[key[2]]))
    columns: dict[str, list[object]] = {
        "form": [second for _, _, second in keys],
        "dtype and form": [f"{dtype} {first}" for dtype, first, _ in keys],
        "worst distance/certain": [float(f"{cells[key][0]:.3g}") for key in keys],
        "rms of distance/probable": [float(f"{cells[key][1]:.3g}") for key in keys],
    }
    what = "outputs and states" if part == "forward" else "gradients"
    title = f"{family}: distance of the forms, {what} (a form and itself: its error)"
    return Series(title, "matrix", columns, "form", "dtype and form", "worst distance/certain")
