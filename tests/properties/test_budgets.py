"""The certain budget covers every algorithm whose roundings are declared, and no algorithm that rounds more.

Each algorithm below is softmax attention with float32 (or declared) steps in another order; all are written
from the formula, apart from ``attnproof.properties``. The regimes are those in which the orders differ most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch

from attnproof.judge import prepare
from attnproof.properties.budgets import softmax as budgets
from attnproof.properties.budgets.base import Budget
from attnproof.properties.budgets.rounding import half_spacing
from attnproof.properties.budgets.rows import Row, overtaking
from attnproof.properties.case import Case, Inputs, make_inputs
from attnproof.properties.contract import Contract, Precision
from attnproof.properties.families import FAMILIES
from attnproof.properties.oracle import certify

Algorithm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

PLAIN = Precision()
# Operands that are the inputs as they are, not scaled and rounded again.
UNSCALED = Precision(matmul_input="ieee")
REGIMES = (
    "normal",
    "near-uniform",
    "one-hot",
    "ascending",
    "descending",
    "offset-1e3",
    "tied",
    "one-sign-values",
)


def two_pass(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    s = (q.float() @ k.float().mT) * scale
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return ((p.to(v.dtype).float() @ v.float()) / p.sum(-1, keepdim=True)).to(q.dtype)


def divided_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    s = (q.float() @ k.float().mT) * scale
    p = torch.exp(s - s.amax(-1, keepdim=True))
    p = (p / p.sum(-1, keepdim=True)).to(v.dtype).float()
    return (p @ v.float()).to(q.dtype)


def division_free(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    s = (q.float() @ k.float().mT) * scale
    p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))
    return (p.to(v.dtype).float() @ v.float()).to(q.dtype)


def base_two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    constant = torch.tensor(scale * math.log2(math.e), dtype=torch.float32)
    s = q.float() @ k.float().mT
    # The product with the maximum is rounded apart from the product with the score, as in a fused
    # multiply-add.
    p = torch.exp2((s * constant) - (s.amax(-1, keepdim=True) * constant))
    return ((p.to(v.dtype).float() @ v.float()) / p.sum(-1, keepdim=True)).to(q.dtype)


def scaled_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return base_two_of_scores(
        (q.float() * (scale * math.log2(math.e))).to(q.dtype).float() @ k.float().mT, v, q.dtype
    )


def scaled_both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    root = math.sqrt(scale)
    s = (q.float() * root).to(q.dtype).float() @ (k.float() * root).to(k.dtype).float().mT
    return base_two_of_scores(s * math.log2(math.e), v, q.dtype)


def base_two_of_scores(s: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return ((p.to(v.dtype).float() @ v.float()) / p.sum(-1, keepdim=True)).to(dtype)


def online(tile: int, *, backwards: bool = False) -> Algorithm:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        starts = list(range(0, k.shape[-2], tile))
        m = torch.full(q.shape[:-1], -torch.inf)[..., None]
        total, acc = torch.zeros_like(m), torch.zeros(*q.shape[:-1], v.shape[-1])
        for start in reversed(starts) if backwards else starts:
            kt, vt = k[..., start : start + tile, :].float(), v[..., start : start + tile, :]
            s = (q.float() @ kt.mT) * scale
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            p, alpha = torch.exp(s - new), torch.exp(m - new)
            total = total * alpha + p.sum(-1, keepdim=True)
            acc = acc * alpha + p.to(v.dtype).float() @ vt.float()
            m = new
        return (acc / total).to(q.dtype)

    return run


def split(parts: int) -> Algorithm:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        outs, lses = [], []
        for kt, vt in zip(k.chunk(parts, -2), v.chunk(parts, -2), strict=True):
            s = (q.float() @ kt.float().mT) * scale
            lse = torch.logsumexp(s, -1, keepdim=True)
            p = torch.exp(s - s.amax(-1, keepdim=True))
            outs.append((p.to(v.dtype).float() @ vt.float()) / p.sum(-1, keepdim=True))
            lses.append(lse)
        joined = torch.logsumexp(torch.cat(lses, -1), -1, keepdim=True)
        merged = sum(torch.exp(lse - joined) * o for lse, o in zip(lses, outs, strict=True))
        assert isinstance(merged, torch.Tensor)
        return merged.to(q.dtype)

    return run


def one_key_at_a_time(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Every sum sequential in float32: the worst order."""
    s = torch.zeros(*q.shape[:-1], k.shape[-2])
    for d in range(q.shape[-1]):
        s = s + q[..., d : d + 1].float() * k[..., d].float().unsqueeze(-2)
    s = s * scale
    p = torch.exp(s - s.amax(-1, keepdim=True))
    total, acc = torch.zeros(*s.shape[:-1], 1), torch.zeros(*s.shape[:-1], v.shape[-1])
    stored = p.to(v.dtype).float()
    for j in range(k.shape[-2]):
        total = total + p[..., j : j + 1]
        acc = acc + stored[..., j : j + 1] * v[..., j, :].float().unsqueeze(-2)
    return (acc / total).to(q.dtype)


def sums_of_stored(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The normaliser sums P as it is stored."""
    s = (q.float() @ k.float().mT) * scale
    p = torch.exp(s - s.amax(-1, keepdim=True)).to(v.dtype).float()
    return ((p @ v.float()) / p.sum(-1, keepdim=True)).to(q.dtype)


def lazy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Online, tile 8; the maximum in use is replaced only where it is exceeded by more than log 256."""
    m = torch.full(q.shape[:-1], -torch.inf)[..., None]
    total, acc = torch.zeros_like(m), torch.zeros(*q.shape[:-1], v.shape[-1])
    for kt, vt in zip(k.split(8, -2), v.split(8, -2), strict=True):
        s = (q.float() @ kt.float().mT) * scale
        highest = torch.maximum(m, s.amax(-1, keepdim=True))
        new = torch.where(highest - m > math.log(256.0), highest, m)
        p, alpha = torch.exp(s - new), torch.exp(m - new)
        total = total * alpha + p.sum(-1, keepdim=True)
        acc = acc * alpha + p.to(v.dtype).float() @ vt.float()
        m = new
    return (acc / total).to(q.dtype)


def normalised_accumulator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """FlashAttention's first algorithm (arXiv 2205.14135, Algorithm 1): divided after every tile."""
    m = torch.full(q.shape[:-1], -torch.inf)[..., None]
    total, o = torch.zeros_like(m), torch.zeros(*q.shape[:-1], v.shape[-1])
    for kt, vt in zip(k.split(8, -2), v.split(8, -2), strict=True):
        s = (q.float() @ kt.float().mT) * scale
        own = s.amax(-1, keepdim=True)
        new = torch.maximum(m, own)
        p = torch.exp(s - own)
        longer = torch.exp(m - new) * total + torch.exp(own - new) * p.sum(-1, keepdim=True)
        added = torch.exp(own - new) * (p.to(v.dtype).float() @ vt.float())
        o = (total * torch.exp(m - new) * o + added) / longer
        m, total = new, longer
    return o.to(q.dtype)


def ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Parts of 16 keys merged one after the other by their log-sum-exps, as in ring attention."""
    o, lse = torch.zeros(*q.shape[:-1], v.shape[-1]), torch.full(q.shape[:-1], -torch.inf)[..., None]
    for kt, vt in zip(k.split(16, -2), v.split(16, -2), strict=True):
        s = (q.float() @ kt.float().mT) * scale
        part = torch.logsumexp(s, -1, keepdim=True)
        p = torch.exp(s - s.amax(-1, keepdim=True))
        block = (p.to(v.dtype).float() @ vt.float()) / p.sum(-1, keepdim=True)
        joined = torch.logaddexp(lse, part)
        o, lse = o * torch.exp(lse - joined) + block * torch.exp(part - joined), joined
    return o.to(q.dtype)


def hostile(sign: float, ulps: float = 2.0) -> Algorithm:
    """Online, one key at a time in rising order; every exponential but 1 off by its declared ulps."""

    def exp(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x == 0, 1.0, torch.exp(x) * (1.0 + sign * ulps * 2.0**-23))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        s, order = ((q.float() @ k.float().mT) * scale).sort(-1)
        wide = v.float().unsqueeze(-3).expand(*s.shape, v.shape[-1])
        values = wide.gather(-2, order.unsqueeze(-1).expand(*order.shape, v.shape[-1]))
        m = torch.full(q.shape[:-1], -torch.inf)[..., None]
        total, acc = torch.zeros_like(m), torch.zeros(*q.shape[:-1], v.shape[-1])
        for j in range(s.shape[-1]):
            new = s[..., j : j + 1]
            alpha = exp(m - new)
            total, acc, m = total * alpha + 1.0, acc * alpha + values[..., j, :], new
        return (acc / total).to(q.dtype)

    return run


ALLOWED: dict[str, Algorithm] = {
    "sums of stored P": sums_of_stored,
    "lazy": lazy,
    "normalised accumulator": normalised_accumulator,
    "ring": ring,
    "hostile exponentials, up": hostile(1.0),
    "hostile exponentials, down": hostile(-1.0),
    "two-pass": two_pass,
    "divided first": divided_first,
    "division-free": division_free,
    "base two": base_two,
    "scaled queries": scaled_queries,
    "scaled both": scaled_both,
    "online, tile 1": online(1),
    "online, tile 7": online(7),
    "online, tile 64": online(64),
    "online, backwards": online(16, backwards=True),
    "split in 3": split(3),
    "split in 8": split(8),
    "one key at a time": one_key_at_a_time,
}


@functools.cache
def prepared(regime: str, dtype: str, n: int, precision: Precision) -> tuple[Inputs, torch.Tensor, Budget]:
    """Inputs, certified output and budget of a small case."""
    case = Case("softmax", dtype, {"B": 1, "H": 2, "G": 2, "M": 24, "N": n, "D": 32, "E": 24}, regime)
    inputs = make_inputs(case)
    problem = FAMILIES["softmax"].problem(*inputs.tensors.values(), scale=inputs.options["scale"])
    contract = Contract("softmax", precision=precision)
    exact = certify(problem, lambda found: {"o": problem.budgets(found, contract)["o"].certain / 64}).outputs
    return inputs, exact["o"].value, problem.budgets(exact, contract)["o"]


def ratio(algorithm: Algorithm, regime: str, dtype: str, precision: Precision = PLAIN, n: int = 100) -> float:
    """Worst error/certain of an algorithm in a regime."""
    inputs, exact, budget = prepared(regime, dtype, n, precision)
    got = algorithm(*inputs.tensors.values(), inputs.options["scale"]).double()
    judged = ~budget.open
    assert judged.any(), "nothing to compare: the test would be vacuous"
    return float(((got - exact).abs() / budget.certain.clamp(min=1e-300))[judged].max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALLOWED)
def test_certain_covers_every_order_of_the_same_roundings(name: str, dtype: str) -> None:
    worst = {regime: ratio(ALLOWED[name], regime, dtype) for regime in REGIMES}
    assert max(worst.values()) <= 1.0, worst


def stored(dtype: torch.dtype) -> Algorithm:
    """P stored in ``dtype`` before the second matmul."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        s = (q.float() @ k.float().mT) * scale
        p = torch.exp(s - s.amax(-1, keepdim=True))
        return ((p.to(dtype).float() @ v.float()) / p.sum(-1, keepdim=True)).to(q.dtype)

    return run


def low_accumulator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Σ p v accumulated in the inputs' dtype."""
    s = (q.float() @ k.float().mT) * scale
    p = torch.exp(s - s.amax(-1, keepdim=True))
    acc = torch.zeros(*s.shape[:-1], v.shape[-1], dtype=q.dtype)
    for j in range(k.shape[-2]):
        acc = (acc.float() + p[..., j : j + 1] * v[..., j, :].float().unsqueeze(-2)).to(q.dtype)
    return (acc.float() / p.sum(-1, keepdim=True)).to(q.dtype)


def tf32_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    s = (cut(q) @ cut(k).mT) * scale
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return (cut(p) @ cut(v)) / p.sum(-1, keepdim=True)


FORBIDDEN: dict[str, tuple[Algorithm, str, Precision]] = {
    "P in bfloat16 under float16": (stored(torch.bfloat16), "float16", UNSCALED),
    "P in float16 under float32": (stored(torch.float16), "float32", PLAIN),
    "accumulator in bfloat16": (low_accumulator, "bfloat16", PLAIN),
    "accumulator in float16": (low_accumulator, "float16", PLAIN),
    "tf32 inputs undeclared": (tf32_inputs, "float32", PLAIN),
    "scale 1 % too large": (lambda q, k, v, scale: two_pass(q, k, v, scale * 1.01), "float32", PLAIN),
    "last key dropped": (
        lambda q, k, v, scale: two_pass(q, k[..., :-1, :], v[..., :-1, :], scale),
        "float16",
        PLAIN,
    ),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_certain_is_exceeded_by_roundings_that_are_not_declared(name: str) -> None:
    algorithm, dtype, precision = FORBIDDEN[name]
    worst = {
        (regime, n): ratio(algorithm, regime, dtype, precision, n) for regime in REGIMES for n in (100, 600)
    }
    assert max(worst.values()) > 1.0, worst


def test_declaring_what_a_kernel_rounds_makes_room_for_it() -> None:
    declared = Precision(matmul_input="tf32")
    assert max(ratio(tf32_inputs, regime, "float32", declared) for regime in REGIMES) <= 1.0


@pytest.mark.parametrize("regime", ["normal", "one-sign-values", "uniform"])
def test_truncation_to_tf32_leans_to_one_side_within_the_probable_budget(regime: str) -> None:
    """Hardware cuts bits off: q·k, P and V are all smaller than themselves, and their sums too."""
    inputs, exact, budget = prepared(regime, "float32", 500, Precision(matmul_input="tf32"))
    got = tf32_inputs(*inputs.tensors.values(), inputs.options["scale"]).double()
    lean = ((got - exact) * exact.sign() / budget.probable).mean()
    assert -0.5 < float(lean) < -0.3
    undeclared = prepared(regime, "float32", 500, PLAIN)[2]
    assert float(((got - exact) / undeclared.probable).square().mean().sqrt()) > 10.0


def test_budgets_grow_with_every_looser_declaration() -> None:
    case = Case("softmax", "float16", {"B": 1, "H": 1, "G": 1, "M": 8, "N": 40, "D": 16, "E": 8}, "normal")
    inputs = make_inputs(case)
    problem = FAMILIES["softmax"].problem(*inputs.tensors.values(), scale=0.25)
    strict = Contract("softmax", precision=Precision(matmul_input="ieee"))
    exact = certify(problem, lambda found: {"o": problem.budgets(found, strict)["o"].certain / 64}).outputs
    base = problem.budgets(exact, strict)["o"]
    for looser in (
        Precision(matmul_input="ieee", scores="float16"),
        Precision(matmul_input="ieee", accumulate="float16"),
        Precision(matmul_input="ieee", probabilities="bfloat16"),
        Precision(matmul_input="ieee", output="bfloat16"),
        Precision(matmul_input="ieee", exp_ulp=4096.0),
        Precision(),
    ):
        budget = problem.budgets(exact, Contract("softmax", precision=looser))["o"]
        assert bool((budget.certain > base.certain).all()), looser
        assert bool((budget.probable >= base.probable).all()), looser


def test_rows_that_one_key_dominates_allow_one_rounding_only() -> None:
    case = Case(
        "softmax", "float32", {"B": 1, "H": 1, "G": 1, "M": 8, "N": 64, "D": 16, "E": 8}, "representable"
    )
    inputs = make_inputs(case)
    problem = FAMILIES["softmax"].problem(*inputs.tensors.values(), scale=inputs.options["scale"])
    contract = Contract("softmax")
    exact = certify(problem, lambda found: {"o": problem.budgets(found, contract)["o"].certain / 64}).outputs
    budget = problem.budgets(exact, contract)["o"]
    size = exact["gauge:o"].value
    assert float((budget.certain / size.clamp(min=1.0)).max()) < 2.0**-16


def budget_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    precision: Precision = PLAIN,
    **options: object,
) -> tuple[torch.Tensor, Budget]:
    """Certified output and budget of one call."""
    problem = FAMILIES["softmax"].problem(q, k, v, scale=scale, **options)
    contract = Contract("softmax", precision=precision)
    exact = certify(problem, lambda found: {"o": problem.budgets(found, contract)["o"].certain / 64}).outputs
    return exact["o"].value, problem.budgets(exact, contract)["o"]


def rows(*entries: list[float], dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, rows, width)."""
    return torch.tensor(entries, dtype=dtype)[None, None]


def test_weights_are_exact_only_where_no_allowed_rounding_makes_them_inexact() -> None:
    """Found in review: (3, 1)·(1, −3) cancels until queries are scaled and rounded, fl(3c) ≠ 3 fl(c)."""
    q = rows([3.0, 1.0], dtype=torch.float16)
    k = rows([0.0, 0.0], [1.0, -3.0], [-1.0, 3.0], dtype=torch.float16)
    v = rows([1.0], [-1.0], [1.0], dtype=torch.float16)
    exact, budget = budget_of(q, k, v, 418.8)
    got = scaled_queries(q, k, v, 418.8)
    assert float((got.double() - exact).abs().max()) > 0.1
    assert bool(((got.double() - exact).abs() <= budget.certain).all())


def test_equal_weights_of_many_keys_may_be_summed_with_rounding() -> None:
    """Found in review: p = fl(1/n), added up in order, is not 1 for n = 3000."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3000, 4), torch.ones(1, 1, 3000, 1)
    _, budget = budget_of(q, k, v, 1.0)
    total = torch.zeros(())
    for _ in range(3000):
        total = total + torch.tensor(1.0) / 3000.0
    assert 1e-5 < abs(float(total) - 1.0) <= float(budget.certain.max())


def test_a_weight_that_underflows_float64_may_still_be_raised_by_its_error() -> None:
    """Found in review: exact logits (0, −1138) in bfloat16 with errors of more than 1138."""
    q = rows([3.0e4, 3.0e4], dtype=torch.bfloat16)
    k = rows([3.0e4, -3.0e4], [3.0e4 * (1 - 2**-8), -3.0e4], dtype=torch.bfloat16)
    v = rows([1.0], [2.0], dtype=torch.bfloat16)
    _, budget = budget_of(q, k, v, 1e-3)
    assert float(budget.certain.max()) >= 1.0


def test_budgets_are_numbers_for_huge_logits_and_columns_of_zeros() -> None:
    """Found in review: 0·∞ in the budget switched the certain check off."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.randn(1, 1, n, 64, generator=generator) * 300).bfloat16() for n in (4, 6, 6))
    v[..., 0] = 0.0
    for precision in (PLAIN, Precision(accumulate="bfloat16")):
        _, budget = budget_of(q, k, v, 1.0, precision)
        assert not bool(budget.certain.isnan().any())
        assert not bool(budget.probable.isnan().any())


def test_values_that_a_row_does_not_see_do_not_widen_its_budget() -> None:
    """Found in review: one huge value in the future."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, 16, generator=generator) for _ in range(3))
    _, before = budget_of(q, k, v, 0.25, causal=True)
    v[0, 0, 7] = 1e30
    _, after = budget_of(q, k, v, 0.25, causal=True)
    assert bool((after.certain[0, 0, 1:7] <= 10.0 * before.certain[0, 0, 1:7] + 1e-4).all())


def test_float64_kernels_are_judged_too() -> None:
    for family, shape in (
        ("softmax", {"B": 1, "H": 1, "G": 1, "M": 4, "N": 8, "D": 8, "E": 4}),
        ("logsumexp", {"R": 4, "N": 9}),
    ):
        case = Case(family, "float64", shape, "normal")
        trial = prepare(case, Contract(family, dtypes=("float64",)))
        name, exact = next(iter(trial.reference.outputs.items()))
        assert trial.judge({name: exact.value}).verdict == "PASS"
        assert trial.judge({name: exact.value * (1.0 + 1e-12)}).verdict == "FAIL"


def test_declared_values_of_empty_rows_hold_for_every_family() -> None:
    x = torch.full((2, 3), -torch.inf)
    problem = FAMILIES["softmax_rows"].problem(x)
    for asked, literal in (("zero", 0.0), ("nan", math.nan)):
        contract = Contract("softmax_rows", empty_row=asked)  # type: ignore[arg-type]
        (value,) = problem.budgets(
            certify(problem, lambda found: {"y": found["y"].radius}).outputs, contract
        )["y"].literal
        assert value == literal or math.isnan(value) == math.isnan(literal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_the_spacing_at_a_number_is_what_the_format_has(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    x = torch.tensor([1.0, 1.5, -3.7, 1024.0, 1e-4, 65000.0, info.tiny, smallest * 5, 0.0], dtype=dtype)
    beyond = torch.nextafter(x.abs(), torch.tensor(torch.inf, dtype=dtype)).double()
    half = half_spacing(x.double(), info.eps / 2, smallest / 2)
    assert torch.equal(half, (beyond - x.abs().double()) / 2)


def test_keys_that_may_overtake_are_counted_as_by_comparing_all_pairs() -> None:
    generator = torch.Generator().manual_seed(3)
    x = (
        torch.randn(5, 40, generator=generator)
        .double()
        .masked_fill(torch.rand(5, 40, generator=generator) < 0.2, -torch.inf)
    )
    x[4] = -torch.inf
    x[3, :10] = 1.0
    for size in (0.0, 0.01, 10.0):
        e = torch.rand(5, 40, generator=generator).double() * size
        pairs = ((x + e)[:, None, :] > (x - e)[:, :, None]) & ~torch.eye(40, dtype=torch.bool)
        seen = x > -torch.inf
        counted = overtaking(Row.of(x), e)
        asked = (pairs & seen[:, None, :]).sum(-1)
        assert bool((counted[seen] >= asked[seen]).all())
        assert bool((counted[seen] <= asked[seen] + 1).all())
    assert bool((overtaking(Row.of(x), torch.full((5, 40), torch.inf).double())[x > -torch.inf] > 0).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_rescaling_may_be_off_by_what_an_exponential_may(
    sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exponentials of 2048 ulps, rescalings are all of the error: a bound without them is exceeded."""
    precision, algorithm = Precision(exp_ulp=2048.0), hostile(sign, 2048.0)
    worst = [ratio(algorithm, r, "float32", precision, n) for r in REGIMES for n in (20, 100)]
    assert 0.2 < max(worst) <= 1.0
    monkeypatch.setattr(budgets, "overtaking", lambda row, e: torch.zeros_like(e))
    prepared.cache_clear()
    assert ratio(algorithm, "normal", "float32", precision, 100) > 1.0
    prepared.cache_clear()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("regime", ["normal", "tied", "one-sign-values"])
def test_probable_is_the_standard_deviation_of_a_healthy_error_in_half_precision(
    regime: str, dtype: str
) -> None:
    inputs, exact, budget = prepared(regime, dtype, 100, UNSCALED)
    for algorithm in (two_pass, online(16), split(3), divided_first):
        got = algorithm(*inputs.tensors.values(), inputs.options["scale"]).double()
        spread = float(((got - exact) / budget.probable).square().mean().sqrt())
        assert 0.75 < spread < 1.25, (algorithm, spread)
