"""Right kernels on an H100 that budgets once accused: what its arithmetic does, redone here without one.

The cases are those that ``nox -s gpu`` met there; tests/kernels/test_hardware.py measures its arithmetic.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnproof
from attnproof.judge import Trial, prepare
from attnproof.properties.budgets.propagation import alike_terms
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract, ContractError, Precision

# Fractional bits that Hopper's matrix units keep of a product, below the largest one's exponent, and how many
# products they add at once (theory.md HW-3).
KEPT, BLOCK = 25, 16


def rounded(found: Trial) -> dict[str, Tensor]:
    """The exact outputs, rounded once."""
    dtypes = {name: "float32" if name == "lse" else found.case.dtype for name in found.budgets}
    return {name: found.reference.outputs[name].value.to(getattr(torch, dtypes[name])) for name in dtypes}


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (
            "differential",
            "differential:float32:large-logits:B3,H2,G2,M1,N7,D64,E32:causal,cotangents=aligned:columns:47",
        ),
        (
            "batch_normalised",
            "batch_normalised:float32:one-hot:B1,H2,G1,M33,N70,D32,E32:cotangents=normal:contiguous:50018",
        ),
    ],
)
def test_gradients_of_weights_that_are_flushed_to_zero_are_right(family: str, text: str) -> None:
    """Exact gradients of 6·10^-39 by weights below 2^-126, which ex2.approx.ftz.f32 makes 0."""
    result = attnproof.check(
        f"attnproof.kernels.{family}:attention", Case.parse(text), device="emulator:sm_90"
    )
    assert result.verdict == "PASS", str(result)


def test_equal_terms_may_be_added_one_by_one() -> None:
    """Σ over 226 queries of one weight: each addition to partial sums of one binade rounds alike."""
    case = Case.parse("sigmoid:float32:zero-queries:B1,H2,G1,M113,N512,D72,E72:cotangents=ones:transposed:61")
    found = prepare(case, Contract("sigmoid")).with_gradients()
    outputs = rounded(found)
    rows = 2 * 113  # two heads share keys and values
    weight = (found.reference.outputs["dv"].value / rows).float()
    outputs["dv"] = torch.zeros_like(weight)
    for _ in range(rows):
        outputs["dv"] = outputs["dv"] + weight
    # what the GPU returned
    assert f"{outputs['dv'][0, 0, 0, 0]:.9g}" == "0.440544605"
    judgement = found.judge(outputs)
    assert judgement.verdict == "PASS", judgement.failures
    outputs["dv"] = outputs["dv"] * (1 + 2.0**-15)
    assert found.judge(outputs).verdict == "FAIL"


def cut(x: Tensor, unit: Tensor) -> Tensor:
    return torch.trunc(x / unit) * unit


def by_matrix_units(a: Tensor, b: Tensor) -> Tensor:
    """a (…, M, K) times b (…, K, N) in float64, as Hopper sums products of 16-bit numbers."""
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float64)
    for start in range(0, a.shape[-1], BLOCK):
        inside = slice(start, start + BLOCK)
        products = a[..., inside, None].double() * b[..., None, inside, :].double()
        terms = torch.cat([products, total.unsqueeze(-2)], -2)
        exponent = torch.frexp(terms.abs().amax(-2, keepdim=True))[1] - 1
        total = cut(terms, torch.exp2((exponent - KEPT).double())).sum(-2)
        exponent = torch.frexp(total)[1] - 1
        total = cut(total, torch.exp2((exponent - 23).double()))
    return total


def test_truncating_matrix_units_are_allowed_where_a_gpu_has_them() -> None:
    """q·k of 256 products near 1000: an lse with a mean error of −1/1000, all of one sign."""
    case = Case.parse(
        "softmax:float16:offset-1e3:B1,H6,G2,M53,N53,D256,E64:return_lse,cotangents=aligned:contiguous:52"
    )
    contract = Contract("softmax", options=("return_lse",), precision=Precision(matmul_input="ieee"))
    strict = prepare(case, contract)
    outputs = rounded(strict)
    q, k = strict.inputs.tensors["q"], strict.inputs.tensors["k"].repeat_interleave(3, 1)
    outputs["lse"] = torch.logsumexp(strict.inputs.options["scale"] * by_matrix_units(q, k.mT), -1).float()
    judgement = strict.judge(outputs)
    assert "bias" in {failure.rule for failure in judgement.failures}
    # what the GPU returned where 1029.15538 is exact, up to the rounding of scaled scores
    assert abs(outputs["lse"][0, 3, 19].item() - 1029.1543) <= 2.0**-12
    native = prepare(case, contract.on("cuda"))
    judgement = native.judge(outputs)
    assert judgement.verdict == "PASS", judgement.failures
    # Sums in the inputs' own format are still found out.
    outputs["lse"] = outputs["lse"].half().float()
    assert native.judge(outputs).verdict == "FAIL"


def test_what_a_contract_means_on_a_device() -> None:
    plain = Contract("softmax")
    assert plain.on("cpu") is plain
    assert plain.on("emulator:sm_90") is plain
    native = plain.on("cuda:1").precision
    assert native.accumulate == "tensor-cores"
    assert native.resolved("float16").accumulate == native.resolved("bfloat16").accumulate == "truncated"
    assert native.resolved("float32").accumulate == "float32"
    assert native.resolved("float64").accumulate == "float64"
    tf32 = Contract("softmax", precision=Precision(matmul_input="tf32")).on("cuda").precision
    assert tf32.resolved("float32").accumulate == "truncated"
    declared = Contract("softmax", precision=Precision(accumulate="float32"))
    assert declared.on("cuda") is declared
    with pytest.raises(ContractError, match="accumulate='cores'"):
        Precision(accumulate="cores")


@pytest.mark.parametrize("family", ["softmax_rows", "logsumexp"])
@pytest.mark.parametrize("regime", ["tied", "outliers"])
def test_rows_may_be_added_key_by_key(family: str, regime: str) -> None:
    """A dozen distinct terms, or many that are lost beside a large one: no errors in random order."""
    found = prepare(Case.parse(f"{family}:float32:{regime}:R40,N1000:-:contiguous:1"), Contract(family))
    x = found.inputs.tensors["x"]
    largest = x.amax(-1, keepdim=True)
    terms = torch.exp(x - largest)
    total = torch.zeros_like(largest)
    for column in terms.split(1, -1):
        total = total + column
    y = (largest + torch.log(total))[..., 0] if family == "logsumexp" else terms / total
    judgement = found.judge({"y": y})
    assert judgement.verdict == "PASS", judgement.failures


def test_keys_that_round_apart_do_not_cancel() -> None:
    """One component carries all logits: the errors of two keys' are no common shift."""
    case = Case.parse(
        "scaled_head:float16:descending:B1,H2,G1,M193,N128,D128,E128:pool=7+2,cotangents=aligned:transposed:"
        "471100020"
    )
    result = attnproof.check("attnproof.kernels.scaled_head:attention", case, device="emulator:sm_90")
    assert result.verdict == "PASS", str(result)


def test_an_output_that_is_cut_is_biased_on_a_gpu_too() -> None:
    """Where truncating sums are no visible part of the budget they excuse nothing."""
    case = Case.parse(
        "softmax:float16:uniform:B1,H4,G2,M17,N17,D128,E128:window=3..,bias=bhmn,cu_seqlens=5+0+12:contiguous:500009"
    )
    contract = Contract("softmax", options=("window", "bias", "cu_seqlens")).on("cuda")
    found = prepare(case, contract)
    exact = found.reference.outputs["o"].value
    half = exact.half()
    cut_off = torch.where(
        half.double().abs() > exact.abs(), half.view(torch.int16) - 1, half.view(torch.int16)
    )
    assert "bias" in {failure.rule for failure in found.judge({"o": cut_off.view(torch.float16)}).failures}
    assert found.judge({"o": half}).verdict == "PASS"


def test_terms_are_alike_where_their_sum_cannot_tell_them_apart() -> None:
    """σ ≈ 1 − 6·10^-6 differs by less than the last place of a sum of 226, and not of a sum of 4."""
    r = Roundings.of(Contract("sigmoid"), "float32")
    generator = torch.Generator().manual_seed(0)
    x = 1.0 - 6e-6 * torch.rand(226, generator=generator, dtype=torch.float64)
    assert alike_terms(x, -1, r).item() > 0.9
    assert alike_terms(x[:4], -1, r).item() <= 0.5
    spread = torch.rand(226, generator=generator, dtype=torch.float64)
    assert alike_terms(spread, -1, r).item() < 0.02
    half = torch.cat(
        [torch.ones(113, dtype=torch.float64), spread[:113], torch.zeros(50, dtype=torch.float64)]
    )
    assert abs(alike_terms(half, -1, r).item() - 0.5) < 0.02
