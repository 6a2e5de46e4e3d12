"""Gradients of softmax attention: the closed formulas, their budgets, and what the judge makes of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.judge import prepare
from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.case import Case, make_inputs
from attnproof.properties.contract import Contract, Precision
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.softmax import SOFTMAX
from attnproof.properties.oracle import evaluate
from tests.properties.naive_gradients import central_differences

OPTIONS = ("causal", "window", "softcap", "bias", "alibi_slopes", "sinks", "return_lse")
CONTRACT = Contract("softmax", options=OPTIONS)
IDS = (
    "softmax:float32:normal:B1,H1,G1,M2,N3,D2,E2:cotangents=normal:contiguous:1",
    "softmax:float32:normal:B1,H2,G1,M2,N3,D2,E1:causal,return_lse,cotangents=normal:contiguous:2",
    "softmax:float32:normal:B2,H2,G2,M3,N2,D1,E2:softcap=0.7,bias=1h1n,cotangents=normal:contiguous:3",
    "softmax:float32:normal:B1,H2,G1,M3,N3,D2,E2:sinks,return_lse,cotangents=normal:contiguous:4",
    "softmax:float32:masked:B1,H2,G2,M3,N3,D2,E1:window=1..0,bias=bhmn,cotangents=normal:contiguous:5",
    "softmax:float32:normal:B1,H2,G1,M2,N4,D1,E1:alibi_slopes,softcap=2.0,sinks,cotangents=normal:sliced:6",
)


def numbers(tensor: torch.Tensor) -> Any:
    """An object array of the tensor's numbers, exactly."""
    flat = [mpmath.mpf(x) for x in tensor.double().flatten().tolist()]
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array.reshape(tuple(tensor.shape))


def loss_of(case: Case, problem: Any, options: Mapping[str, Any], cotangents: Mapping[str, Any]) -> Any:
    """Σ outputs·cotangents as a scalar transcription from the formula, by loops over mpf."""
    seen, scale = problem.seen, mpmath.mpf(options["scale"])

    def loss(tensors: Mapping[str, Any]) -> Any:
        total = mpmath.mpf(0)
        heads, groups = case["H"], case["G"]
        for b, h, i in itertools.product(range(case["B"]), range(heads), range(case["M"])):
            g = h // (heads // groups)
            weights = {}
            for j in range(case["N"]):
                if not seen[b, h, i, j]:
                    continue
                s = sum(
                    (tensors["q"][b, h, i, d] * tensors["k"][b, g, j, d] for d in range(case["D"])),
                    mpmath.mpf(0),
                )
                s *= scale
                if case.option("softcap"):
                    s = case.option("softcap") * mpmath.tanh(s / case.option("softcap"))
                if "bias" in tensors:
                    shape = tensors["bias"].shape
                    place = tuple(0 if n == 1 else x for n, x in zip(shape, (b, h, i, j), strict=True))
                    s += tensors["bias"][place]
                if case.option("alibi_slopes"):
                    distance = abs(i + case["N"] - case["M"] - j)
                    s -= mpmath.mpf(float(options["alibi_slopes"][h])) * distance
                weights[j] = mpmath.exp(s)
            normaliser = sum(weights.values(), mpmath.mpf(0))
            if "sinks" in tensors:
                normaliser += mpmath.exp(tensors["sinks"][h])
            if not normaliser:
                continue
            for j, weight in weights.items():
                for e in range(case["E"]):
                    total += cotangents["o"][b, h, i, e] * weight / normaliser * tensors["v"][b, g, j, e]
            if "lse" in cotangents:
                total += cotangents["lse"][b, h, i] * mpmath.log(normaliser)
        return total

    return loss


def gradient_problem(case: Case) -> tuple[GradientProblem, Any]:
    inputs = make_inputs(case)
    problem = SOFTMAX.problem(*inputs.tensors.values(), **inputs.options)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    cotangents = {name: tensor.double() for name, tensor in inputs.cotangents.items()}
    return GradientProblem(problem, forward, cotangents), inputs


@pytest.mark.parametrize("text", IDS)
def test_closed_formulas_are_the_derivatives(text: str) -> None:
    case = Case.parse(text)
    found, inputs = gradient_problem(case)
    tensors = {**inputs.tensors, **{n: inputs.options[n] for n in ("bias", "sinks") if n in inputs.options}}
    with mpmath.workdps(60):
        arrays = {name: numbers(tensor.nan_to_num(neginf=0.0)) for name, tensor in tensors.items()}
        cotangents = {name: numbers(tensor) for name, tensor in found.cotangents.items()}
        expected = central_differences(loss_of(case, found.problem, inputs.options, cotangents), arrays)
    for arithmetic in (MpmathArithmetic(60), ArbArithmetic(200), EnclosureArithmetic()):
        for name, enclosure in evaluate(found, arithmetic).items():
            values = torch.tensor(
                [float(x) for x in expected[name.removeprefix("d")].ravel()], dtype=torch.float64
            ).reshape(enclosure.value.shape)
            far = (enclosure.value - values).abs() - enclosure.radius - 2.0**-52 * values.abs() - 1e-24
            assert float(far.max()) <= 0.0, (name, arithmetic)


def straight(inputs: Any, dtype: torch.dtype, *, broken: str = "") -> dict[str, torch.Tensor]:
    """Outputs and gradients of plain attention with float32 internals, rounded once, and its mutants."""
    q, k, v = (tensor.float() for tensor in inputs.tensors.values())
    do, scale = inputs.cotangents["o"].float(), inputs.options["scale"]
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    p = torch.softmax(q @ keys.mT * scale, -1)
    o = (p @ values).to(dtype)
    delta = (do * o.float()).sum(-1, keepdim=True)
    if broken == "delta missing":
        delta = torch.zeros_like(delta)
    if broken == "delta of half the columns":
        half = o.shape[-1] // 2
        delta = (do * o.float())[..., :half].sum(-1, keepdim=True)
    ds = p * (do @ values.mT - delta)
    dq = ds @ keys * (1.0 if broken == "dq without scale" else scale)
    dk = ds.mT @ q * (1.0 if broken == "dk without scale" else scale)
    dv = p.mT @ do

    def together(x: torch.Tensor) -> torch.Tensor:
        parts = x.reshape(x.shape[0], k.shape[1], group, *x.shape[2:])
        return parts[:, :, 0] if broken == "first head of the group" else parts.sum(2)

    return {"o": o, "dq": dq.to(dtype), "dk": together(dk).to(dtype), "dv": together(dv).to(dtype)}


CASES = (
    "softmax:{}:normal:B1,H2,G1,M17,N33,D16,E16:cotangents=normal:contiguous:1",
    "softmax:{}:off-centre:B1,H4,G2,M20,N65,D32,E16:cotangents=ones:contiguous:2",
    "softmax:{}:one-hot:B2,H2,G1,M9,N40,D16,E32:cotangents=one-hot:contiguous:3",
    "softmax:{}:large-logits:B1,H2,G2,M33,N17,D64,E8:cotangents=aligned:contiguous:4",
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("text", CASES)
def test_a_plain_backward_pass_is_within_budget(text: str, dtype: str) -> None:
    case = Case.parse(text.format(dtype))
    trial = prepare(case, CONTRACT).with_gradients()
    judgement = trial.judge(straight(make_inputs(case), case.torch_dtype))
    assert judgement.verdict == "PASS", judgement.failures
    assert judgement.vacuous == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("broken", "output"),
    [
        ("delta missing", "dq"),
        ("delta of half the columns", "dk"),
        ("dq without scale", "dq"),
        ("dk without scale", "dk"),
        ("first head of the group", "dv"),
    ],
)
def test_broken_backward_passes_are_beyond_it(broken: str, output: str, dtype: str) -> None:
    case = Case.parse(CASES[0].format(dtype))
    trial = prepare(case, CONTRACT).with_gradients()
    judgement = trial.judge(straight(make_inputs(case), case.torch_dtype, broken=broken))
    assert ("certain", output) in {(failure.rule, failure.output) for failure in judgement.failures}


def test_keys_that_nobody_sees_have_gradients_of_exactly_zero() -> None:
    case = Case.parse(
        "softmax:float16:normal:B1,H2,G1,M3,N20,D8,E8:window=2..0,cotangents=normal:contiguous:1"
    )
    trial = prepare(case, CONTRACT).with_gradients()
    unseen = ~trial.problem.seen.any(2).any(1)[0]  # type: ignore[attr-defined]
    assert int(unseen.sum()) == 15
    for name in ("dk", "dv"):
        assert bool((trial.reference.outputs[name].value[0, 0, unseen] == 0.0).all())
        assert float(trial.budgets[name].certain[0, 0, unseen].max()) == 0.0


def test_gradients_of_nonfinite_inputs_are_left_open() -> None:
    case = Case.parse("softmax:float16:seen-nonfinite:B1,H2,G1,M9,N20,D8,E8:cotangents=normal:contiguous:1")
    trial = prepare(case, CONTRACT).with_gradients()
    assert all(bool(trial.budgets[name].open.all()) for name in ("dq", "dk", "dv"))


def test_overflow_of_stored_gradients_of_scores_is_left_open() -> None:
    text = "softmax:float16:large-values:B1,H1,G1,M7,N7,D64,E256:cotangents=ones:contiguous:500029"
    stored = prepare(Case.parse(text), CONTRACT).with_gradients()
    wide = Contract("softmax", options=OPTIONS, precision=Precision(dscores="float32"))
    held = prepare(Case.parse(text), wide).with_gradients()
    assert bool(stored.budgets["dq"].open.any())
    assert not bool(held.budgets["dq"].open.any())
