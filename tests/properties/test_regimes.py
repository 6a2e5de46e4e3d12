"""Every regime has the property for which it exists, and the plan covers what it promises."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from attnproof.properties.case import OPTIONS, Case, make_inputs
from attnproof.properties.contract import DTYPES, Supports
from attnproof.properties.regimes import REGIMES, SIZES, plan
from attnproof.properties.regimes.planning import VACUOUS_SHARE
from attnproof.properties.regimes.regime import Regime, merged
from attnproof.properties.regimes.visibility import seen_keys
from attnproof.properties.signatures import SIGNATURES
from attnproof.properties.views import VIEWS

HALF = ("float16", "bfloat16")
USUAL = ("float32", *HALF)
SIZES_USED = (
    {"B": 2, "H": 4, "G": 2, "M": 9, "N": 40, "D": 64, "E": 16},
    {"B": 1, "H": 2, "G": 1, "M": 5, "N": 33, "D": 5, "E": 3},
    {"B": 1, "H": 1, "G": 1, "M": 6, "N": 20, "D": 1, "E": 1},
    {"B": 1, "H": 7, "G": 1, "M": 3, "N": 130, "D": 256, "E": 8},
)


def attention(regime: str, dtype: str, shape: dict[str, int], **fields: Any) -> tuple[torch.Tensor, ...]:
    """q, k (one key/value head for each query head), v, and logits, of a case, all in float64."""
    case = Case("softmax", dtype, shape, regime, **fields)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    q, k, v = (tensor.double() for tensor in inputs.tensors.values())
    k, v = (tensor.repeat_interleave(shape["H"] // shape["G"], dim=1) for tensor in (k, v))
    # Not a matrix product, which may add the terms of equal keys in different orders.
    return q, k, v, (q[:, :, :, None] * k[:, :, None]).sum(-1) * inputs.options["scale"]


def row_values(regime: str, dtype: str, rows: int = 17, keys: int = 40) -> torch.Tensor:
    """Rows x of a row-wise case, in float64."""
    case = Case("logsumexp", dtype, {"R": rows, "N": keys}, regime)  # type: ignore[arg-type]
    return make_inputs(case).tensors["x"].double()


def steps(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., 1:] - logits[..., :-1]


def times_largest(logits: torch.Tensor) -> torch.Tensor:
    """How often each row's maximum occurs."""
    return (logits == logits.amax(-1, keepdim=True)).sum(-1)


LOGITS: dict[str, Callable[[torch.Tensor], bool]] = {
    "near-uniform": lambda s: bool(s.abs().max() < 0.2),
    "zero-queries": lambda s: bool((s == 0).all()),
    "equal-keys": lambda s: bool((s == s[..., :1]).all()),
    "tied": lambda s: bool((times_largest(s) >= 4).all()),
    "tied-one-sign": lambda s: bool((times_largest(s) >= 4).all()),
    "one-hot": lambda s: bool((-steps(s.topk(2)[0]) >= 40).all()),
    "exp-overflow": lambda s: bool(s.min() > 88.73),
    "exp-underflow": lambda s: bool(s.max() < -103.98),
    "offset-1e3": lambda s: bool(s.min() > 900) and bool(s.max() < 4200),
    "offset-1e4": lambda s: bool(s.min() > 9000) and bool(s.max() < 42000),
    "identical-huge": lambda s: bool((s == s.flatten()[0]).all()) and bool(s.min() > 1e10),
    "large-logits": lambda s: bool(s.amax() > 88.73) and bool(s.amin() < -103.98),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES_USED, ids=lambda shape: f"D{shape['D']}")
@pytest.mark.parametrize("regime", LOGITS)
def test_logits_are_what_the_regime_claims(regime: str, shape: dict[str, int], dtype: str) -> None:
    if dtype not in REGIMES[regime].dtypes:
        pytest.skip("not representable")
    *_, logits = attention(regime, dtype, shape)
    assert logits.isfinite().all()
    assert LOGITS[regime](logits), f"logits from {logits.min()} to {logits.max()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES_USED, ids=lambda shape: f"D{shape['D']}")
def test_raw_scores_pass_their_thresholds(shape: dict[str, int], dtype: str) -> None:
    q, k, *_ = attention("score-overflow", dtype, shape)
    assert (q @ k.transpose(2, 3)).min() > 65504
    assert max(q.abs().max(), k.abs().max()) < 65504, "q and k themselves are representable in float16"
    q, k, *_ = attention("below-sentinel", dtype, shape)
    assert (q @ k.transpose(2, 3)).max() < -5e4


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SIZES_USED, ids=lambda shape: f"D{shape['D']}")
def test_ordered_scores_rise_or_fall_at_every_key(shape: dict[str, int], dtype: str) -> None:
    for regime, sign in (("ascending", 1), ("descending", -1)):
        *_, logits = attention(regime, dtype, shape)
        assert (sign * steps(logits)).min() > 0.2
        assert (sign * steps(logits)).max() < 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_what_the_regime_claims(dtype: str) -> None:
    shape = SIZES_USED[0]
    finfo = torch.finfo(getattr(torch, dtype))
    *_, v, logits = attention("cancelling-values", dtype, shape)
    output = torch.softmax(logits, -1) @ v
    gauge = torch.softmax(logits, -1) @ v.abs()
    assert (output.abs() / gauge).median() < 0.005
    *_, v, _ = attention("one-sign-values", dtype, shape)
    assert (v[..., 0::2] <= -1).all()
    assert (v[..., 1::2] >= 1).all()
    *_, v, logits = attention("large-values", dtype, shape)
    assert v.abs().max() > finfo.max / (8 * (1 if dtype == "float16" else 2 * shape["N"]))
    assert (torch.softmax(logits, -1) @ v.abs()).max() < finfo.max / 2
    *_, v, _ = attention("wide-values", dtype, shape)
    assert v.abs().max() / v.abs().median() > 50
    _, k, v, _ = attention("correlated", dtype, SIZES_USED[3])
    assert torch.corrcoef(torch.stack([k[..., :8].flatten(), v.flatten()]))[0, 1] > 0.8
    q, *_ = attention("outliers", dtype, SIZES_USED[3])
    assert 7 < q.abs().max() < 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_inputs_are_subnormal_and_matter(dtype: str) -> None:
    tiny = torch.finfo(getattr(torch, dtype)).tiny
    q, _, _, logits = attention("subnormal-queries", dtype, SIZES_USED[0])
    assert q.abs().max() < tiny
    assert (q != 0).all()
    assert 1 < logits.std() < 4, "flushing q to zero would make these weights equal"
    *_, v, _ = attention("subnormal-values", dtype, SIZES_USED[0])
    assert v.abs().max() < tiny
    assert v.abs().median() > tiny / 64


@pytest.mark.parametrize("view", ["contiguous", "broadcast"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"bias": "bhmn"}, {"window": (6, 2), "sinks": True}], ids=str
)
@pytest.mark.parametrize("shape", SIZES_USED, ids=lambda shape: f"D{shape['D']}")
def test_representable_cases_have_exact_outputs(
    shape: dict[str, int], options: dict[str, Any], view: str
) -> None:
    """In rationals: logits are 0 or ≤ −256, outputs of power-of-two rows exact even in bfloat16."""
    case = Case("softmax", "bfloat16", shape, "representable", options, view)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    q, k, v = (t.double() for t in inputs.tensors.values())
    group = shape["H"] // shape["G"]
    bias = inputs.options["bias"].double() if "bias" in options else None
    seen = seen_keys(case.sizes, options, None if bias is None else bias.numpy())
    powers = 0
    for b, h, i in itertools.product(range(shape["B"]), range(shape["H"]), range(shape["M"])):
        # Products of a few bits each: float64 holds them and their sum exactly.
        logits = k[b, h // group] @ q[b, h, i]
        if bias is not None:
            logits = logits + bias[b, h, i] / inputs.options["scale"]
        visible = [j for j in range(shape["N"]) if seen[b, h, i, j]]
        tied = [j for j in visible if logits[j] == 0]
        assert all(logits[j] * inputs.options["scale"] <= -256 for j in visible if j not in tied)
        assert tied or options or not visible, "without a mask every row sees the maximum 0"
        if tied and len(tied) & (len(tied) - 1) == 0:
            powers += 1
            for column in range(shape["E"]):
                mean = sum(Fraction(v[b, h // group, j, column].item()) for j in tied) / len(tied)
                assert Fraction(torch.tensor(float(mean)).bfloat16().item()) == mean
    # With D = 1 there is one class of keys, so a mask decides how many of it each row sees.
    assert powers >= (0.6 if shape["D"] > 1 else 0.1) * shape["B"] * shape["H"] * shape["M"]
    if "sinks" in options:
        assert set(inputs.options["sinks"].tolist()) <= {0.0, -1024.0}


def test_representable_products_are_exact_in_any_order_and_in_tf32() -> None:
    for shape in SIZES_USED:
        q, k, _, _ = attention("representable", "float16", shape)
        for tensor in (q, k):
            mantissa, _ = torch.frexp(tensor)
            assert (mantissa * 2**8 == (mantissa * 2**8).round()).all(), "8 bits are enough"
        products = q[:, :, :, None] * k[:, :, None]
        assert products.abs().sum(-1).max() < 2**24
        assert (products == products.round()).all()


@pytest.mark.parametrize("pattern", ["bhmn", "11mn", "b11n", "1h1n"])
def test_masks_hide_some_keys_and_whole_rows(pattern: str) -> None:
    for regime, mark in (("masked", -math.inf), ("finite-sentinel", torch.finfo(torch.float16).min)):
        case = Case("softmax", "float16", SIZES_USED[0], regime, {"bias": pattern})  # type: ignore[arg-type]
        marked = make_inputs(case).options["bias"] == mark
        assert marked.any()
        assert not marked.all()
        if regime == "masked":
            assert marked.all(-1).any()


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (2, 1)},
        {"bias": "b1mn"},
        {"cu_seqlens": (16, 0, 24)},
        {"causal": True, "bias": "bhmn"},
    ],
    ids=str,
)
@pytest.mark.parametrize("view", ["contiguous", "broadcast"])
def test_nonfinite_keys_are_seen_by_at_most_half_of_the_rows(options: dict[str, Any], view: str) -> None:
    shape = {**SIZES_USED[0], "M": 40, "B": 1}
    case = Case("softmax", "float32", shape, "unseen-nonfinite", options, view)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    bias = inputs.options.get("bias")
    seen = torch.from_numpy(
        seen_keys(case.sizes, options, None if bias is None else bias.double().numpy()).copy()
    )
    bad = ~inputs.tensors["k"].isfinite().all(-1) | ~inputs.tensors["v"].isfinite().all(-1)
    assert bad.any()
    touched = (seen & bad.repeat_interleave(2, dim=1)[:, :, None]).any(-1)
    assert touched.double().mean() <= 0.5
    kinds = inputs.tensors["k"][bad]
    assert kinds.isnan().any()
    assert kinds.isinf().any()


def test_some_rows_and_not_all_see_a_nonfinite_query() -> None:
    for shape in SIZES_USED:
        q, *_ = attention("seen-nonfinite", "float16", shape)
        bad = ~q.isfinite().all(-1)
        assert 0 < bad.sum() < bad.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_what_the_regime_claims(dtype: str) -> None:
    tiny = torch.finfo(getattr(torch, dtype)).tiny
    assert row_values("near-uniform", dtype).abs().max() < 0.01
    assert (steps(row_values("equal-rows", dtype)) == 0).all()
    assert row_values("equal-rows", dtype).abs().max() >= 9984
    assert (times_largest(row_values("tied", dtype)) >= 2).all()
    assert (-steps(row_values("one-hot", dtype).topk(2)[0]) >= 40).all()
    assert row_values("exp-overflow", dtype).min() > 88.73
    assert row_values("exp-underflow", dtype).max() < -103.98
    assert row_values("below-sentinel", dtype).max() < -5e4
    for level in ("offset-1e3", "offset-1e4"):
        assert len(set(row_values(level, dtype)[0].tolist())) > 2, "rows are not constant even in bfloat16"
    assert row_values("ascending", "float32").diff().min() > 0
    assert row_values("descending", "float32").diff().max() < 0
    assert row_values("log-near-zero", dtype).logsumexp(-1).abs().max() < 0.01
    assert 0 < row_values("subnormal", dtype).abs().max() < tiny
    hidden = row_values("masked", dtype).isneginf()
    assert 0 < hidden.all(-1).sum() < 17
    bad = ~row_values("seen-nonfinite", dtype).isfinite().all(-1)
    assert 0 < bad.sum() < 17
    x = row_values("representable", dtype)
    assert (x[x != 0] <= -256).all()
    assert all(count & (count - 1) == 0 for count in (x == 0).sum(-1).tolist())
    assert row_values("near-largest", dtype).abs().max() == torch.finfo(getattr(torch, dtype)).max


@pytest.mark.parametrize("regime", REGIMES.values(), ids=list(REGIMES))
def test_every_regime_serves_every_size_and_option(regime: Regime) -> None:
    """Degenerate sizes included; the text that a report shows is there."""
    assert len(regime.reason) > 10
    assert regime.available, "install the extra 'activations' to run the tests"
    awkward = (
        (0, 1, 1, 2, 3, 4, 2),
        (1, 2, 1, 0, 3, 1, 1),
        (2, 2, 2, 3, 0, 5, 1),
        (1, 7, 1, 1, 1, 2, 9),
        (1, 2, 1, 3, 2, 3, 1),
    )
    for family, view in itertools.product(regime.families, VIEWS):
        shapes = [dict(zip("BHGMNDE", sizes, strict=True)) for sizes in awkward]
        if family == "easy":
            shapes = [{"B": b, "H": h, "N": n, "E": 3} for b, h, n in ((0, 1, 2), (1, 2, 0), (2, 3, 5))]
        elif SIGNATURES[family].stateful:
            few = ((0, 1, 2), (1, 2, 0), (2, 3, 5), (1, 1, 1))
            rest = {"G": 1, "D": 3, "E": 2, "T": 4, "P": 2}
            shapes = [
                {symbol: {"B": b, "H": h, "N": n, **rest}[symbol] for symbol in SIGNATURES[family].symbols}
                for b, h, n in few
            ]
        elif not SIGNATURES[family].attention:
            shapes = [{"R": r, "N": n} for r, n in ((0, 3), (3, 0), (1, 1), (2, 2))]
        for shape, option in itertools.product(shapes, [None, *OPTIONS[family]]):
            options: dict[str, Any] = {} if option is None else {option: True}
            needed = set() if regime.served(family, options) else set(regime.needs)
            options |= {"bias": "bhmn"} if option == "bias" or needed == {"bias"} else {}
            options |= {"sinks": True} if needed == {"sinks"} else {}
            options |= {"causal": True} if "causal" in needed and "causal" in OPTIONS[family] else {}
            options |= {"band": 1} if "band" in needed and "band" in OPTIONS[family] else {}
            options |= dict.fromkeys({"z", "delta_softplus"} & needed, True)
            values = {
                "window": (1, 0),
                "softcap": 2.0,
                "causal_alignment": "top-left",
                "cotangents": "aligned",
                "normalizer": 3.0,
                "power": 2,
                "variance": "off",
                "band": 1,
                "pool": (2,) * shape.get("H", 1),
                "feature_map": "taylor",
                "gate": "head",
                "discretization": "zoh",
            }
            if SIGNATURES[family].stateful:
                values["causal"] = "off"
            options |= {"bias": -1.0} if family == "sigmoid" and option == "bias" else {}
            options |= {option: values[option]} if option in values else {}
            packed = option == "cu_seqlens"
            if packed and not (shape["B"] == 1 and shape.get("M", shape["N"]) == shape["N"]):
                continue
            options |= {"cu_seqlens": (shape["N"], 0)} if packed else {}
            if regime.declines(family, "bfloat16", options) is None:
                make_inputs(Case(family, "bfloat16", shape, regime.name, options, view))  # type: ignore[arg-type]


def test_regimes_of_one_name_cannot_build_one_family_twice() -> None:
    regime = REGIMES["normal"]
    with pytest.raises(ValueError, match="defined twice"):
        merged([regime], [regime])


ALL = ("causal", "window", "softcap", "bias", "sinks", "cu_seqlens", "return_lse")


@pytest.mark.parametrize("options", [(), ("causal",), ("causal", "window", "return_lse"), ALL], ids=len)
def test_plan_covers_what_it_promises(options: tuple[str, ...]) -> None:
    cases = plan("softmax", dtypes=USUAL, options=options, budget=170)
    assert len(set(cases)) == len(cases) == 170
    regimes = [r for r in REGIMES.values() if "softmax" in r.families]
    regimes = [r for r in regimes if r.served("softmax", options)]
    expected = {(r.name, d) for r in regimes for d in USUAL if d in r.dtypes}
    assert {(case.regime, case.dtype) for case in cases} == expected
    used = [{name for name, _ in case.options} for case in cases]
    for option in options:
        assert {option} in used, f"{option} alone"
        with_it = [case for case, names in zip(cases, used, strict=True) if option in names]
        assert {case.view for case in with_it} == set(VIEWS)
        assert {case.dtype for case in with_it} == set(USUAL)
    for pair in itertools.combinations(options, 2):
        assert any(set(pair) <= names for names in used), pair
    assert {(case.view, case.dtype) for case in cases} == set(itertools.product(VIEWS, USUAL))


def test_plan_covers_all_sizes() -> None:
    cases = plan("softmax", dtypes=USUAL, options=ALL, budget=170)
    lengths = {case["N"] for case in cases}
    assert lengths >= {size for sizes in SIZES.values() for size in sizes}
    assert {case["H"] // case["G"] for case in cases} == {1, 2, 3, 7}
    assert {case["D"] for case in cases} >= {1, 5, 16, 40, 64, 72, 128, 256}
    assert {case["E"] for case in cases} >= {1, 5, 16, 40, 64, 72, 128, 256}
    relations = Counter((case["M"] > case["N"]) - (case["M"] < case["N"]) for case in cases)
    assert min(relations.values()) > 20
    assert sum(case["M"] == 1 for case in cases) > 10
    assert any(case.option("causal") and case["M"] > case["N"] for case in cases), "rows that see no key"
    assert any(0 in case.option("cu_seqlens", ()) for case in cases), "empty sequences"


@pytest.mark.parametrize("family", ["softmax", "logsumexp", "softmax_rows"])
@pytest.mark.parametrize("budget", [20, 60, 170])
def test_plans_are_small_quick_and_of_substance(family: str, budget: int) -> None:
    cases = plan(family, dtypes=USUAL, options=ALL, budget=budget)
    assert cases == plan(family, dtypes=USUAL, options=ALL, budget=budget)
    vacuous = [c for c in cases if REGIMES[c.regime].vacuous or min(c.sizes.values()) == 0 or c["N"] <= 1]
    assert len(vacuous) <= max(VACUOUS_SHARE * budget, 2) + 1
    assert min(cases[1].sizes.values()) <= 8, "degenerate sizes come first"
    work = [
        math.prod(c.sizes.get(s, 1) for s in "BHMN") * (c.sizes.get("D", 1) + c.sizes.get("E", 1))
        for c in cases
    ]
    assert max(work) <= 2**24
    assert max(c.sizes.get("B", 1) * c.sizes.get("H", 1) for c in cases) <= 14
    small = plan(family, dtypes=["float16"], options=(), budget=40)
    assert {case.dtype for case in small} == {"float16"}


def test_plan_keeps_to_what_a_kernel_supports() -> None:
    supports = Supports(head_dims=(64, 128), multiple_of=32, last_stride_one=True, nonempty=True)
    for case in plan("softmax", dtypes=["bfloat16"], options=("causal",), supports=supports, budget=80):
        assert {case["D"], case["E"]} <= {64, 128}
        assert case["N"] % 32 == 0
        assert min(case.sizes.values()) > 0
        assert make_inputs(case).tensors["q"].stride(-1) == 1
    narrow = plan("softmax", dtypes=["bfloat16"], supports=Supports(max_head_dim=40), budget=60)
    assert max(max(case["D"], case["E"]) for case in narrow) == 40


def test_plan_speaks_of_the_declared_alignment() -> None:
    cases = plan("softmax", dtypes=["float32"], options=("causal",), budget=40, causal_alignment="top-left")
    assert {case.option("causal_alignment") for case in cases if case.option("causal")} == {"top-left"}


def test_thorough_plans_go_on_with_new_cases() -> None:
    stream = plan("softmax", dtypes=USUAL, options=ALL, budget=30, thorough=True)
    cases = list(itertools.islice(stream, 300))
    assert cases[:30] == plan("softmax", dtypes=USUAL, options=ALL, budget=30)
    assert len(set(cases)) == 300
    assert max(case["N"] for case in cases) > 1000


def test_families_without_regimes_have_no_plan() -> None:
    with pytest.raises(ValueError, match="family='hyena'"):
        plan("hyena", dtypes=USUAL, budget=10)
