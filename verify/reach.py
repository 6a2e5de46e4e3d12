"""How far the certain budget is above what healthy kernels do, by number of keys.

``python -m attnproof.calibration --reach`` measures, for rows of up to 4096 keys, the smallest factor by
which the certain budget exceeds the worst error of a set of correct algorithms: 1 / max(error/certain) over
all elements and implementations. A defect of that many times a healthy kernel's worst error cannot hide from
proof. Where every kernel is exact (one-hot rows select a value that the output holds), one rounding of the
result stands for the error. In half precision the factor is held below ``LIMIT`` for every regime of class
"plain" but those of ``EXEMPT``; in float32 it is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from attnproof.judge import prepare
from attnproof.properties.budgets.rounding import half_spacing
from attnproof.properties.case import Case
from attnproof.properties.contract import contract_of
from attnproof.properties.regimes import REGIMES
from attnproof.reports.record import Series
from attnproof.targets import resolve

__all__ = ["EXEMPT", "LENGTHS", "LIMIT", "Reach", "beyond", "measure_reach", "reach_series"]

LIMIT = 50.0
LENGTHS = (128, 512, 1024, 2048, 4096)
EXEMPT = {
    "cancelling-values": "keys come in equal pairs with opposite values, so that equal weights round alike"
    " and their errors cancel; no bound that covers every algorithm may count on that",
}
_WIDTHS = (64, 128)
_DTYPES = ("float16", "bfloat16", "float32")
_SEEDS = (1,)
_ROWS = 16
_ALGORITHMS = (
    "base_two",
    "two_pass",
    "divided_first",
    "tiles_16_16",
    "tiles_32_128",
    "split_and_merge",
    "tree_of_tiles",
    "backwards",
    "lazy_rescaling",
)


@dataclass(frozen=True)
class Reach:
    """The factor between the certain budget and the worst healthy error, for o and lse."""

    regime: str
    dtype: str
    keys: int
    width: int
    output: float
    lse: float


def measure_reach(
    regimes: Sequence[str] = (),
    dtypes: Sequence[str] = _DTYPES,
    lengths: Sequence[int] = LENGTHS,
) -> Iterator[Reach]:
    """The factors by regime (all of class "plain" if none are given), dtype, number of keys and width."""
    plain = [r.name for r in REGIMES.values() if r.regime_class == "plain" and "softmax" in r.families]
    for regime in regimes or [name for name in plain if not REGIMES[name].needs]:
        for dtype in dtypes:
            for keys in lengths:
                for width in _WIDTHS:
                    yield _reach(regime, dtype, keys, width)


def _reach(regime: str, dtype: str, keys: int, width: int) -> Reach:
    worst, rounding = {"o": 0.0, "lse": 0.0}, {"o": 0.0, "lse": 0.0}
    shape = {"B": 1, "H": 2, "G": 1, "M": _ROWS, "N": keys, "D": width, "E": width}
    functions = [resolve(f"attnproof.healthy_algorithms:{name}") for name in _ALGORITHMS]
    contract = contract_of(functions[0])
    assert contract is not None
    for seed in _SEEDS:
        case = Case("softmax", dtype, shape, regime, {"return_lse": True}, seed=seed)  # type: ignore[arg-type]
        trial = prepare(case, contract)
        scale = trial.inputs.options["scale"]
        for function in functions:
            o, lse = function(*trial.inputs.tensors.values(), scale=scale, return_lse=True)
            for name, found in trial.judge({"o": o, "lse": lse}).outputs.items():
                worst[name] = max(worst[name], found.worst_certain)
        for name, budget in trial.budgets.items():
            format_ = torch.finfo(torch.float32 if name == "lse" else case.torch_dtype)
            half = half_spacing(trial.reference.outputs[name].value, format_.eps / 2.0, 0.0)
            rounding[name] = max(rounding[name], float((half / budget.certain)[~budget.open].max()))
    factors = {name: 1.0 / (worst[name] or rounding[name]) for name in worst}
    return Reach(regime, dtype, keys, width, factors["o"], factors["lse"])


def reach_series(measured: Sequence[Reach]) -> tuple[Series, ...]:
    """A table of every factor of o, and the largest over widths of each regime and dtype against N."""
    shown = sorted(measured, key=lambda r: (r.dtype, r.regime, r.width, r.keys))
    table = Series(
        "Certain budget: times the worst error of healthy kernels",
        "table",
        {
            "regime": [r.regime for r in shown],
            "dtype": [r.dtype for r in shown],
            "N": [r.keys for r in shown],
            "D": [r.width for r in shown],
            "o": [float(f"{r.output:.3g}") for r in shown],
            "lse": [float(f"{r.lse:.3g}") for r in shown],
            "held below": [
                "reported" if r.dtype == "float32" else "exempt" if r.regime in EXEMPT else f"{LIMIT:g}"
                for r in shown
            ],
        },
        "N",
        "o",
    )
    normal = [r for r in shown if r.regime == "normal"]
    line = Series(
        "Certain budget over the worst healthy error, regime normal, against the number of keys",
        "scatter",
        {
            "keys": [r.keys for r in normal],
            "certain / worst error": [float(f"{r.output:.3g}") for r in normal],
            "dtype": [r.dtype for r in normal],
            "D": [r.width for r in normal],
        },
        "keys",
        "certain / worst error",
        "dtype",
        ("keys", "certain / worst error"),
    )
    return line, table


def beyond(measured: Sequence[Reach]) -> list[Reach]:
    """Those that are not held below the limit and should be."""
    return [r for r in measured if r.dtype != "float32" and r.regime not in EXEMPT and not r.output < LIMIT]
