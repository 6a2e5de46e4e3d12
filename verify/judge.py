"""The judge: from what a kernel returned to a verdict with its reasons.

Nothing of a kernel's own process is trusted: the judge makes the inputs again from the case, certifies the
reference to 1/64 of each element's budget and compares. ``FAIL`` is a certain budget exceeded, a probable one
exceeded beyond the calibrated threshold, a rule of the contract's edges broken, or a call that did not return
what the contract says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.case import Case, Inputs, make_inputs
from attnproof.properties.contract import Contract, Precision
from attnproof.properties.families import family_of
from attnproof.properties.families.base import Budget, Family, Problem, Reference
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import CertificationError, certify
from attnproof.properties.regimes import REGIMES
from attnproof.properties.signatures import SIGNATURES
from attnproof.reports.record import Failure, OutputStatistics
from attnproof.statistics import Deviation, Thresholds, deviation, thresholds_for

__all__ = ["CERTIFIED_FRACTION", "Judgement", "Trial", "prepare"]

# Rows of logits at a time.
_BLOCK = 1024

# The reference's radius is at most this fraction of an element's budgets: it moves no ratio by more than 2 %.
CERTIFIED_FRACTION = 1.0 / 64.0

# A part of a budget that widens it by less than this moves no mean by what thresholds of bias allow.
_LEANING = 1.05

# Declarations that are tried, weakest assumption first, to name what would explain an error beyond the
# budget.
_EXPLANATIONS: tuple[tuple[str, Mapping[str, str | float]], ...] = (
    ("tf32 matmul inputs (matmul_input=tf32)", {"matmul_input": "tf32"}),
    ("truncated accumulation (accumulate=truncated)", {"accumulate": "truncated"}),
    ("an exponential of 2^-9 relative error (exp_ulp=16384)", {"exp_ulp": 16384.0}),
    ("probabilities stored in bfloat16 (probabilities=bfloat16)", {"probabilities": "bfloat16"}),
    ("a log-sum-exp stored in the inputs' dtype (lse=…)", {"lse": "input"}),
    ("scores stored in the inputs' dtype (scores=…)", {"scores": "input"}),
    ("dS and dP stored in the inputs' dtype (dscores=…)", {"dscores": "input"}),
    ("accumulation in the inputs' dtype (accumulate=…)", {"accumulate": "input"}),
)


@dataclass(frozen=True, eq=False)
class Trial:
    """A case made ready to be judged: inputs, certified reference and budgets for one contract."""

    case: Case
    contract: Contract
    family: Family
    inputs: Inputs
    problem: Problem
    reference: Reference
    budgets: Mapping[str, Budget]
    gradients: GradientProblem | None = None

    def problem_of(self, name: str) -> Problem:
        """The problem that has the output ``name``: the forward one, or that of the gradients."""
        if self.gradients is not None and name in self.gradients.outputs:
            return self.gradients
        return self.problem

    def row_axes(self, name: str) -> int:
        """How many leading axes of an output index its rows."""
        return self.problem_of(name).row_axes(name)

    def with_gradients(self) -> Trial:
        """This trial with reference and budgets of the gradients that its cotangents ask for.

        Raises:
            CertificationError: a gradient could not be certified.
        """
        if self.gradients is not None or not self.inputs.cotangents or not self.problem.differentiated:
            return self
        cotangents = {name: tensor.double() for name, tensor in self.inputs.cotangents.items()}
        problem = GradientProblem(self.problem, self.reference.outputs, cotangents)
        reference, budgets = _certified(problem, self.contract, self.case)
        counts = dict(self.reference.arithmetic)
        for name, count in reference.arithmetic.items():
            counts[name] = counts.get(name, 0) + count
        return dataclasses.replace(
            self,
            gradients=problem,
            reference=Reference({**self.reference.outputs, **reference.outputs}, counts),
            budgets={**self.budgets, **budgets},
        )

    def judge(self, outputs: Mapping[str, torch.Tensor]) -> Judgement:
        """Compare outputs (by name, in layout bhnd, of the right shapes and dtypes) with the reference."""
        failures: list[Failure] = []
        statistics = {}
        for name, got in outputs.items():
            budget, exact = self.budgets[name], self.reference.outputs[name]
            found = deviation(got, exact, budget, self.row_axes(name))
            failures += self._failures(name, got, found)
            statistics[name] = self._statistics(name, found)
        unjudged: dict[str, int] = {}
        for name in outputs:
            for reason, count in self.budgets[name].reasons.items():
                unjudged[reason] = unjudged.get(reason, 0) + count
        vacuous = tuple(self.problem.vacuity(self.reference.outputs, self.budgets))
        if vacuous and self.gradients is not None:
            own = {name: self.budgets[name] for name in self.gradients.outputs}
            vacuous = tuple(self.gradients.vacuity(self.reference.outputs, own))
        return Judgement("FAIL" if failures else "PASS", tuple(failures), vacuous, unjudged, statistics)

    @property
    def regime_class(self) -> str:
        """The class of the case's regime, for thresholds."""
        return REGIMES[self.case.regime].regime_class

    def _statistics(self, name: str, found: Deviation) -> OutputStatistics:
        budget, compared = self.budgets[name], found.compared
        rows = found.row_rms
        gauge = self.problem_of(name).gauge(name, self.reference.outputs).clamp(min=1e-300)
        reach = (budget.certain / gauge).reshape(compared.shape)[compared]
        return OutputStatistics(
            elements=compared.numel(),
            judged=int((~budget.open).sum()),
            # A result that should be finite and is not, or misses a literal value, is beyond any budget.
            worst_certain=math.inf
            if bool((found.nonfinite | found.misplaced).any())
            else _largest(found.certain),
            worst_probable=_largest(found.probable.abs()),
            row_probable=_largest(rows[rows.isfinite()]),
            rms_probable=found.rms,
            bias=found.mean,
            certain_reach=_largest(reach),
            worst_threshold=self._over_threshold(name, found),
            logit_magnitude=self.logit_magnitude(),
            arithmetic=dict(self.reference.arithmetic),
        )

    def _thresholds(self, name: str, found: Deviation) -> Thresholds | None:
        """What healthy kernels stay below; None where nothing was compared or calibrated."""
        if not found.compared.any():
            return None
        width = found.probable.shape[-1]
        return thresholds_for(self.case.family, name, self.case.dtype, self.regime_class, width)

    def _over_threshold(self, name: str, found: Deviation) -> float:
        """The largest statistic over its threshold, the bias only where it is significant."""
        limits = self._thresholds(name, found)
        if limits is None:
            return 0.0
        ratios = [float(found.row_rms.nan_to_num(0.0).max()) / limits.row, found.rms / limits.output]
        if self._biased(name, limits, found):
            ratios.append(abs(found.mean) / limits.bias)
        return max(ratios)

    def _biased(self, name: str, limits: Thresholds, found: Deviation) -> bool:
        """Whether an output is biased; of gradients it is not asked.

        All their rows are made of the same queries, so that their errors have a mean without any bias.
        """
        return name in self.problem.outputs and limits.biased(found)

    def logit_magnitude(self) -> float:
        """Largest |logit| among the finite inputs, before soft cap and bias."""
        tensors = self.inputs.tensors
        if "x" in tensors:
            x = tensors["x"].double()
            return _largest(x[x.isfinite()].abs())
        if "q" not in tensors:
            return 0.0
        q, k = tensors["q"].double().nan_to_num(0, 0, 0), tensors["k"].double().nan_to_num(0, 0, 0)
        if not q.numel() or not k.numel():
            return 0.0
        q = q if q.dim() == 4 else q[None, :, None]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
        # By blocks of rows: all pairs of 65,536 positions would be 34 GB a head.
        largest = max(float((rows @ k).abs().max()) for rows in torch.split(q, _BLOCK, dim=2))
        return largest * abs(float(self.inputs.options.get("scale", 1.0)))

    def _failures(self, name: str, got: torch.Tensor, found: Deviation) -> list[Failure]:
        failures = []
        if found.misplaced.any():
            index = _first(found.misplaced, got)
            asked = [v for v, where in self.budgets[name].literal.items() if where[index]][0]
            failures.append(
                self._failure("empty-row", name, index, got, None, f"the contract asks for {asked}")
            )
        if found.nonfinite.any():
            index = _first(found.nonfinite, got)
            expected = (
                "an infinity of the exact result's sign"
                if self.budgets[name].overflow[index]
                else "a finite result"
            )
            failures.append(self._failure("nonfinite", name, index, got, None, f"{expected} is required"))
        certain = found.certain.reshape(got.shape)
        if certain.numel() and float(certain.max()) > 1.0:
            index = _worst(certain)
            ratio = f"{float(certain[index]):.3g}"
            words = f"error is {ratio} times what any kernel of the declared precision can make"
            hint = self._explanation(name, got)
            count = int((certain > 1.0).sum())
            rows = int(_rows(certain > 1.0, self.row_axes(name)).sum())
            more = f"; {count} elements in {rows} rows exceed theirs"
            failures.append(
                self._failure("certain", name, index, got, float(certain[index]), words + more + hint)
            )
        return failures or self._improbable(name, got, found)

    def _improbable(self, name: str, got: torch.Tensor, found: Deviation) -> list[Failure]:
        """Failures against the calibrated thresholds, looked for only where nothing is already proved."""
        limits = self._thresholds(name, found)
        if limits is None:
            return []
        failures = []
        rows = found.row_rms.nan_to_num(0.0)
        worst = float(rows.max())
        index = _worst(found.probable.abs().reshape(got.shape))
        if worst > limits.row:
            row = _worst(rows)
            inside = _worst(found.probable.abs()[row])
            index = (*row, *inside)[: got.dim()]
            words = f"row rms of error/probable is {worst:.3g}, healthy kernels stay below {limits.row:.3g}"
            failures.append(self._failure("probable-row", name, index, got, worst, words))
        rms = found.rms
        if rms > limits.output:
            words = f"rms of error/probable is {rms:.3g}, healthy kernels stay below {limits.output:.3g}"
            failures.append(self._failure("probable-output", name, index, got, rms, words))
        if self._biased(name, limits, found) and not self._may_lean(name):
            mean = found.mean
            side = "away from" if mean > 0 else "toward"
            usual = f"healthy kernels stay below {limits.bias:.3g}"
            words = f"mean error is {mean:.3g} probable budgets {side} zero, {usual}"
            failures.append(self._failure("bias", name, index, got, abs(mean), words))
        return failures

    def _may_lean(self, name: str) -> bool:
        """Whether sums that truncate, as the contract declares them, are a visible part of a budget.

        Their errors have one sign. Where the budget of rounded sums is as large, a bias comes from elsewhere.
        """
        if self.contract.precision.resolved(self.case.dtype).accumulate != "truncated":
            return False
        precision = dataclasses.replace(self.contract.precision, accumulate="float32")
        rounded = dataclasses.replace(self.contract, precision=precision)
        budget = self.problem_of(name).budgets(self.reference.outputs, rounded)[name]
        judged = ~(self.budgets[name].open | budget.open)
        here, there = self.budgets[name].probable[judged], budget.probable[judged]
        return not here.numel() or float(here.square().mean()) > _LEANING**2 * float(there.square().mean())

    def _failure(
        self, rule: str, name: str, index: tuple[int, ...], got: torch.Tensor, ratio: float | None, words: str
    ) -> Failure:
        exact = self.reference.outputs[name]
        problem = self.problem_of(name)
        row = index[: problem.row_axes(name)]
        value, radius, returned = float(exact.value[index]), float(exact.radius[index]), float(got[index])
        place = f"{name}[{', '.join(map(str, index))}]"
        reason = (
            f"{place} = {returned:.9g}, expected {value:.9g} ± {radius:.2g}: {words}; "
            f"{problem.explain_row(name, row)}"
        )
        return Failure(
            rule=rule,
            reason=reason,
            output=name,
            index=index,
            expected=value,
            radius=radius,
            got=returned,
            ratio=ratio,
        )

    def _explanation(self, name: str, got: torch.Tensor) -> str:
        """The weakest declaration under which the outputs would be within their certain budget, in words."""
        for words, change in _EXPLANATIONS:
            table = {key: self.case.dtype if value == "input" else value for key, value in change.items()}
            precision: Precision = dataclasses.replace(self.contract.precision, **table)  # type: ignore[arg-type]
            if change.get("matmul_input") == "tf32" and self.case.torch_dtype.itemsize < 4:
                continue  # half-precision inputs are exact in tf32
            if precision.resolved(self.case.dtype) == self.contract.precision.resolved(self.case.dtype):
                continue
            weaker = dataclasses.replace(self.contract, precision=precision)
            exact, problem = self.reference.outputs, self.problem_of(name)
            weaker_budgets = problem.budgets(exact, weaker)
            budget = weaker_budgets[name]
            vacuity = problem.vacuity(exact, weaker_budgets)
            if any(reason.startswith(("accuracy", "gradients")) for reason in vacuity):
                continue  # what would excuse the mean of V as well explains nothing
            found = deviation(got, exact[name], budget, self.row_axes(name))
            if not found.nonfinite.any() and _largest(found.certain) <= 1.0:
                return f"; consistent with {words}: declare it if intended"
        return ""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one case: "PASS" or "FAIL", with what the record keeps of it."""

    verdict: str
    failures: tuple[Failure, ...] = ()
    vacuous: tuple[str, ...] = ()
    unjudged: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, OutputStatistics] = field(default_factory=dict)


def prepare(case: Case, contract: Contract, inputs: Inputs | None = None) -> Trial:
    """Make a case's inputs, certify its reference for ``contract`` and compute the budgets.

    Args:
        case: what is called; its regime decides the class of thresholds.
        contract: what the kernel promises.
        inputs: values to take in place of the case's own; of the family, dtype and options of ``case``.

    Raises:
        ContractError: the case's regime or options do not fit the contract's family.
        CertificationError: the reference could not be certified; the verdict is then UNVERIFIED.
    """
    family = family_of(case.family)
    inputs = make_inputs(case) if inputs is None else inputs
    options = dict(inputs.options)
    if "causal_alignment" in SIGNATURES[family.name].options:
        options["causal_alignment"] = contract.causal_alignment
    problem = family.problem(*inputs.tensors.values(), **options)
    reference, budgets = _certified(problem, contract, case)
    return Trial(case, contract, family, inputs, problem, reference, budgets)


def _certified(problem: Problem, contract: Contract, case: Case) -> tuple[Reference, dict[str, Budget]]:
    """The reference to a fraction of each element's budgets, and the budgets.

    Raises:
        CertificationError: the largest precision did not suffice, or a budget is not a number.
    """
    latest: dict[str, Budget] = {}

    def targets(found: Mapping[str, Enclosure]) -> dict[str, torch.Tensor]:
        latest.update(problem.budgets(found, contract))
        asked = {}
        for name, budget in latest.items():
            finest = torch.minimum(budget.certain, budget.probable) * CERTIFIED_FRACTION
            # Where float64 cannot tell an accuracy apart (an exact zero) the smallest subnormal does.
            finest = finest.nan_to_num(0.0, posinf=torch.inf).clamp(min=2.0**-1000)
            # Nor can a float64 centre be closer than its own rounding; the radius is taken off every error.
            size = found[name].value.abs().nan_to_num(0.0, posinf=0.0)
            finest = torch.maximum(finest, 2.0**-52 * size)
            asked[name] = torch.where(budget.open, torch.inf, finest)
        return asked

    reference = certify(problem, targets)
    for name, budget in latest.items():
        if bool((budget.certain.isnan() & ~budget.open).any()):
            raise CertificationError(f"the budget of output {name} is not a number for case {case.id}")
    return reference, dict(latest)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0


def _worst(tensor: torch.Tensor) -> tuple[int, ...]:
    place = torch.unravel_index(tensor.argmax(), tensor.shape)
    return tuple(int(i) for i in place)


def _first(mask: torch.Tensor, got: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.reshape(got.shape).nonzero()[0].tolist())


def _rows(mask: torch.Tensor, rows: int) -> torch.Tensor:
    return mask.flatten(rows).any(-1) if mask.dim() > rows else mask
