"""Invariants hold between exact results: variants are exact and relations true, whatever a kernel does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import pytest
import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.case import APART, Case, make_inputs
from attnproof.properties.contract import Contract, ContractError, Supports
from attnproof.properties.families import FAMILIES
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.invariants import (
    INVARIANTS,
    Balance,
    Bounds,
    Call,
    Merge,
    Plan,
    Term,
    check_names,
    invariants_for,
)
from attnproof.properties.oracle import evaluate, reference
from attnproof.properties.regimes import plan
from attnproof.properties.signatures import SIGNATURES
from attnproof.properties.views import unit_last_stride

OPTIONS = ("causal", "window", "softcap", "bias", "alibi_slopes", "sinks", "cu_seqlens", "return_lse")
FULL = Contract("softmax", options=OPTIONS)
# Small cases that between them have every option, both directions of M against N, groups and empty rows.
SOFTMAX = (
    "softmax:bfloat16:normal:B2,H4,G2,M7,N13,D8,E4:return_lse:contiguous:1",
    "softmax:float16:normal:B2,H2,G1,M9,N6,D8,E4:causal,return_lse:transposed:2",
    "softmax:float32:normal:B1,H2,G2,M6,N11,D5,E3:window=3..1,bias=11mn,return_lse:columns:3",
    "softmax:bfloat16:masked:B1,H2,G1,M8,N8,D8,E1:causal,bias=b1mn,return_lse:sliced:4",
    "softmax:float16:normal:B1,H2,G1,M12,N12,D8,E4:bias=1h1n,cu_seqlens=4+0+8,return_lse:unaligned:5",
    "softmax:float32:large-logits:B2,H1,G1,M5,N9,D8,E4:sinks,return_lse:broadcast:6",
    "softmax:float16:normal:B1,H3,G1,M4,N10,D8,E4:softcap=2.0,return_lse:contiguous:7",
)
ROWS = (
    "{}:bfloat16:normal:R4,N9:-:contiguous:1",
    "{}:float16:masked:R5,N7:-:sliced:2",
    "{}:float32:near-largest:R3,N6:-:columns:3",
    "{}:float32:large-logits:R1,N1:-:contiguous:4",
)
# Every family that has gradients, each kind of cotangent, each option of theirs.
GRADIENTS = (
    "softmax:float32:normal:B2,H4,G2,M6,N9,D4,E3:bias=b1mn,return_lse,cotangents=normal:contiguous:1",
    "softmax:float16:normal:B1,H2,G1,M7,N7,D4,E3:causal,cotangents=one-hot:sliced:2",
    "softmax:bfloat16:normal:B1,H4,G2,M8,N5,D4,E2:causal,alibi_slopes,bias=bh1n,cotangents=aligned:transposed:3",
    "softmax:float32:normal:B2,H2,G2,M5,N8,D4,E2:sinks,softcap=3.0,return_lse,cotangents=ones:columns:4",
    "softmax:float32:normal:B1,H2,G1,M9,N9,D4,E2:bias=11mn,cu_seqlens=4+0+5,cotangents=normal:contiguous:5",
    "softmax:float32:normal:B2,H2,G1,M4,N6,D4,E2:window=1..0,cotangents=normal:contiguous:6",
    "sigmoid:bfloat16:normal:B2,H4,G2,M5,N7,D4,E3:cotangents=normal:contiguous:1",
    "sigmoid:float32:normal:B1,H2,G1,M7,N6,D4,E2:causal,bias=-0.5,cotangents=one-hot:sliced:2",
    "sigmoid:float32:large-logits:B2,H2,G1,M3,N8,D4,E2:cotangents=aligned:contiguous:3",
    "relu:float16:normal:B2,H4,G2,M5,N7,D4,E3:power=2,cotangents=normal:contiguous:1",
    "relu:float32:normal:B1,H2,G1,M7,N6,D4,E2:causal,normalizer=6.0,cotangents=normal:columns:2",
    "batch_normalised:float32:normal:B2,H4,G2,M5,N7,D4,E3:beta,cotangents=normal:contiguous:1",
    "batch_normalised:float16:normal:B1,H2,G1,M6,N5,D4,E2:variance=off,cotangents=ones:contiguous:2",
    "scaled_head:float32:normal:B2,H4,G2,M5,N7,D4,E3:pool=1+2+3+1,cotangents=normal:contiguous:1",
    "scaled_head:bfloat16:normal:B1,H2,G1,M6,N5,D4,E2:cotangents=normal:sliced:2",
    "differential:float32:normal:B2,H4,G2,M5,N7,D4,E3:cotangents=normal:contiguous:1",
    "differential:float16:normal:B1,H2,G1,M7,N6,D4,E2:causal,cotangents=one-hot:contiguous:2",
    "easy:float32:normal:B2,H2,N7,E3:band=2,cotangents=normal:contiguous:1",
    "easy:bfloat16:normal:B1,H3,N6,E2:cotangents=one-hot:sliced:2",
)
# Families with a state: from none and from one, packed, with each shape of gates.
STATES = (
    "linear:float32:normal:B2,H2,N7,D3,E2:feature_map=relu,return_state,cotangents=normal:contiguous:1",
    "linear:float16:normal:B1,H2,N9,D3,E2:normalize,initial_state,cu_seqlens=3+0+6,return_state:sliced:2",
    "gated_linear:float32:normal:B2,H2,N7,D3,E2:gate=head,return_state,cotangents=normal:contiguous:1",
    "gated_linear:float16:mixed-gates:B1,H2,N9,D3,E2:initial_state,cu_seqlens=3+0+6:columns:2",
    "retention:float32:normal:B2,H2,N7,D3,E2:return_state,cotangents=ones:contiguous:1",
    "retention:float32:normal:B1,H2,N9,D3,E2:cu_seqlens=3+0+6,cotangents=normal:contiguous:2",
    "rwkv6:float32:normal:B2,H2,N7,D3,E2:return_state,cotangents=normal:contiguous:1",
    "rwkv6:bfloat16:normal:B1,H2,N9,D3,E2:initial_state,cu_seqlens=3+0+6,return_state:contiguous:2",
    "mlstm:float32:normal:B2,H2,N7,D3,E2:cotangents=normal:contiguous:1",
    "mlstm:bfloat16:small-input-gates:B1,H2,N9,D3,E2:return_state:transposed:2",
    "mlstm:float16:normal:B1,H2,N9,D3,E2:wide_gates,initial_state,cu_seqlens=2+0+7,return_state:contiguous:3",
    "mlstm:float32:normal:B1,H2,N9,D3,E2:initial_state,return_state,cotangents=ones:contiguous:4",
    "delta:float32:normal:B2,H2,N7,D3,E2:gate=channel,return_state,cotangents=normal:contiguous:1",
    "delta:float16:normal:B1,H2,N9,D3,E2:initial_state,cu_seqlens=3+0+6,return_state:contiguous:2",
)
SCANS = (
    "ssm:float32:normal:B2,H2,N7,D3:complex,skip,return_state,cotangents=normal:contiguous:1",
    "ssm:float16:normal:B1,H2,N9,D3:initial_state,cu_seqlens=3+0+6,return_state,cotangents=normal:columns:2",
    "h3:float32:normal:B2,H2,N7,D3,E2,T3,P2:complex,skip,cotangents=normal:contiguous:1",
    "h3:bfloat16:normal:B1,H3,N9,D1,E1,T4,P3:cotangents=ones:sliced:2",
    "selective_scan:float32:normal:B2,H2,N7,D3:skip,z,delta_bias,delta_softplus,cotangents=normal:contiguous:1",
    "selective_scan:float16:normal:B1,H2,N9,D3:z,initial_state,cu_seqlens=3+0+6,cotangents=ones:columns:2",
    "ssd:float32:normal:B2,H4,G2,N7,D3,E2:skip,return_state,cotangents=normal:contiguous:1",
    "ssd:bfloat16:normal:B1,H2,G1,N9,D3,E2:initial_state,cu_seqlens=3+0+6,return_state:transposed:2",
    "prefix_scan:float32:normal:B2,H2,N7,D3,E2:cotangents=normal:contiguous:1",
    "prefix_scan:float16:wide-maxima:B1,H2,N9,D3,E2:initial_state,return_state,cotangents=normal:sliced:2",
    "rwkv4:float32:normal:B2,H2,N7:cotangents=normal:contiguous:1",
    "rwkv4:bfloat16:normal:B1,H2,N9:initial_state,return_state,cotangents=ones:columns:2",
)
CASES = [Case.parse(text) for text in (*SOFTMAX, *GRADIENTS, *STATES, *SCANS)]
CASES += [Case.parse(text.format(family)) for family in ("logsumexp", "softmax_rows") for text in ROWS]
CONTRACTS = {
    "all options": FULL,
    "causal only": Contract("softmax", options=("causal", "window", "cu_seqlens", "return_lse")),
    "top-left": Contract("softmax", options=OPTIONS, causal_alignment="top-left"),
    "may leak": Contract("softmax", options=OPTIONS, unseen_nonfinite="may-leak"),
}


def contract_for(case: Case, contract: Contract) -> Contract | None:
    """The contract for the case's family; None where it lacks one of the case's options."""
    if case.family != "softmax":
        known = FAMILIES[case.family].options
        bare = "bias" not in contract.options
        options = tuple(name for name in known if not (bare and name == "bias"))
        return dataclasses.replace(contract, family=case.family, options=options)
    passed = {name for name, _ in case.options} - {"cotangents"}
    return contract if passed <= set(contract.options) else None


def exact(call: Call, contract: Contract) -> Mapping[str, Enclosure]:
    """The outputs by name; NaN in rows without keys, of which the contract asks a value of its own."""
    tensors, options = call.inputs.tensors.values(), dict(call.inputs.options)
    family = FAMILIES[call.case.family]
    if "causal" in family.options:
        options["causal_alignment"] = contract.causal_alignment
    if "return_lse" in family.options:
        options["return_lse"] = True
    problem = family.problem(*tensors, **options)
    found = reference(call.case.family, *tensors, **options)
    results = dict(zip(problem.outputs, found if isinstance(found, tuple) else (found,), strict=True))
    if "o" in results:
        o = results["o"]
        for empty in problem.fixed("o").values():
            results["o"] = Enclosure(o.value.masked_fill(empty, torch.nan), o.radius)
    if call.inputs.cotangents:
        cotangents = {name: x.double() for name, x in call.inputs.cotangents.items()}
        results |= evaluate(GradientProblem(problem, {}, cotangents), EnclosureArithmetic())
    return results


def deviations(planned: Plan, contract: Contract) -> list[tuple[str, float]]:
    """How far each relation is from true, over what the references' radii allow."""
    results = [exact(call, contract) for call in planned.calls]
    found = []
    for relation in planned.relations:
        if isinstance(relation, Balance):
            total, allowed = 0.0 - relation.constant, relation.radius
            for term in relation.terms:
                value, radius = taken(term, results[term.call][term.output])
                total = total + term.factor * value
                allowed = allowed + abs(term.factor) * radius
            found.append((relation.terms[0].output, worst(total.abs(), allowed)))
        elif isinstance(relation, Bounds):
            result = results[relation.call][relation.output]
            outside = torch.maximum(relation.lower - result.value, result.value - relation.upper)
            outside = torch.where(result.value.isfinite() & relation.lower.isfinite(), outside, torch.nan)
            found.append((relation.output, worst(outside, result.radius + size(result))))
        else:
            found += merged(relation, results)
    return found


def taken(term: Term, result: Enclosure) -> tuple[torch.Tensor, torch.Tensor]:
    """What a term takes of an output, and how far that may be from exact."""
    select = term.select or (lambda tensor: tensor)
    value, radius = select(result.value), select(result.radius) + select(size(result))
    return (value.sum(-1), radius.sum(-1)) if term.summed else (value, radius)


def merged(relation: Merge, results: list[Mapping[str, Enclosure]]) -> list[tuple[str, float]]:
    whole, (one, two) = results[relation.whole], (results[part] for part in relation.parts)
    l1, l2 = one["lse"].value, two["lse"].value
    w = torch.sigmoid(l1 - l2)[..., None]
    o = w * one["o"].value + (1.0 - w) * two["o"].value
    # The radii of the log-sum-exp move the weights; 2⁻³⁸ is four of the default tolerance of a reference.
    slack = 2.0**-38 * (1.0 + l1.abs() + l2.abs())
    spread = slack[..., None] * (one["o"].value.abs() + two["o"].value.abs())
    return [
        ("o", worst((whole["o"].value - o).abs(), spread)),
        ("lse", worst((whole["lse"].value - torch.logaddexp(l1, l2)).abs(), slack)),
    ]


def size(result: Enclosure) -> torch.Tensor:
    """What float64 may lose in a sum of such values."""
    return 2.0**-50 * (1.0 + result.value.abs())


def worst(difference: torch.Tensor, allowed: torch.Tensor) -> float:
    """The largest ratio where both are numbers: rows that see a NaN, or no key, are left out."""
    ratio = difference / allowed
    ratio = ratio[ratio.isfinite()]
    return float(ratio.max()) if ratio.numel() else 0.0


@pytest.mark.parametrize("name", INVARIANTS)
def test_the_relation_holds_between_exact_results(name: str) -> None:
    invariant, tried = INVARIANTS[name], set()
    for case, declared in itertools.product(CASES, CONTRACTS.values()):
        contract = contract_for(case, declared)
        if contract is None or (case.option("cotangents") and declared.unseen_nonfinite == "may-leak"):
            continue
        planned = invariant.variants(case, make_inputs(case), contract)
        if planned is None:
            continue
        tried.add(case.id)
        for output, ratio in deviations(planned, contract):
            assert ratio <= 1.0, (case.id, output, ratio)
    assert {Case.parse(text).family for text in tried} == set(invariant.families)
    assert len(tried) >= 2


def test_a_false_relation_would_be_seen() -> None:
    case = CASES[0]
    planned = INVARIANTS["key-duplication"].variants(case, make_inputs(case), FULL)
    assert planned is not None
    assert all(ratio <= 1.0 for _, ratio in deviations(planned, FULL))
    (o, lse) = planned.relations
    assert isinstance(lse, Balance)
    wrong = dataclasses.replace(lse, constant=lse.constant + 1e-9)
    ratios = dict(deviations(dataclasses.replace(planned, relations=(o, wrong)), FULL))
    assert ratios["o"] <= 1.0 < ratios["lse"]


def test_a_false_relation_between_gradients_would_be_seen() -> None:
    """Terms moved by 10⁻⁹ of themselves, in every relation between gradients that are not all 0."""
    tried = set()
    for case in CASES[len(SOFTMAX) :]:
        contract = contract_for(case, FULL)
        assert contract is not None
        for invariant in invariants_for(case.family, contract):
            # Padded to whole tiles, calls are long.
            if (invariant.name, case.family) in tried or invariant.name == "length-padding":
                continue
            planned = invariant.variants(case, make_inputs(case), contract)
            wrong = []
            for relation in planned.relations if planned else ():
                if isinstance(relation, Balance) and relation.outputs[0].startswith("d"):
                    first = relation.terms[0]
                    moved = dataclasses.replace(first, factor=first.factor * (1 + 1e-9))
                    wrong.append(dataclasses.replace(relation, terms=(moved, *relation.terms[1:])))
            if planned is not None and wrong:
                changed = dataclasses.replace(planned, relations=tuple(wrong))
                if max(ratio for _, ratio in deviations(changed, contract)) > 1.0:
                    tried.add((invariant.name, case.family))
    names = {name for name, _ in tried}
    linear = {"gradient-linearity", "value-linearity", "score-linearity", "lambda-linearity"}
    symmetric = {"key-permutation", "query-permutation", "strides", "score-shift", "common-shift"}
    parts = {"grouped-heads", "key-duplication", "block-additivity", "batch-independence", "masked-padding"}
    assert linear | symmetric | parts | {"positive-homogeneity", "causal-future"} <= names
    assert {family for _, family in tried} == {case.family for case in CASES[len(SOFTMAX) : -8]}


def test_a_shift_that_is_rounded_would_be_seen() -> None:
    case = Case.parse("softmax:float32:normal:B1,H1,G1,M3,N9,D8,E4:-:contiguous:2")
    planned = INVARIANTS["score-shift"].variants(case, make_inputs(case), Contract("softmax"))
    assert planned is not None
    _, moved = planned.calls
    k = moved.inputs.tensors["k"]
    moved.inputs.tensors["k"] = k + 2.0**-20 * torch.arange(9.0)[:, None]
    assert max(ratio for _, ratio in deviations(planned, Contract("softmax"))) > 1.0


@pytest.mark.parametrize(
    "supports", [Supports(multiple_of=16, last_stride_one=True, nonempty=True), Supports(multiple_of=48)]
)
def test_variants_stay_within_what_the_kernel_supports(supports: Supports) -> None:
    contract = dataclasses.replace(FULL, supports=supports)
    cases = plan("softmax", dtypes=("float16",), options=OPTIONS, supports=supports, budget=24, seed=5)
    calls = 0
    for case, invariant in itertools.product(cases, invariants_for("softmax", contract)):
        if case["N"] * case["M"] > 2**15:
            continue
        planned = invariant.variants(case, make_inputs(case), contract)
        for call in planned.calls if planned else ():
            calls += 1
            words = (invariant.name, call.words, call.case.id)
            assert call.case["N"] % supports.multiple_of == 0, words
            assert all(call.case.sizes.values()), words
            tensors = call.inputs.tensors.values()
            if supports.last_stride_one:
                assert unit_last_stride(call.case.view, 4), words
                assert all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in tensors), words
    assert calls > 200


def test_a_variant_asks_for_no_option_that_the_kernel_lacks() -> None:
    plain = Contract("softmax", options=("causal",))
    for case in plan("softmax", dtypes=("float16",), options=("causal",), budget=12):
        for invariant in invariants_for("softmax", plain):
            planned = invariant.variants(case, make_inputs(case), plain)
            for call in planned.calls if planned else ():
                assert set(call.inputs.options) <= {"scale", "causal"}, (invariant.name, case.id)


def test_the_case_of_a_call_describes_it() -> None:
    for case in CASES[: len(SOFTMAX) + len(GRADIENTS) + len(STATES)]:
        form = SIGNATURES[case.family]
        contract = contract_for(case, FULL)
        assert contract is not None
        for invariant in invariants_for(case.family, contract):
            planned = invariant.variants(case, make_inputs(case), contract)
            for call in planned.calls if planned else ():
                words = (invariant.name, call.words, case.id)
                for name in form.tensors:
                    axes = call.case.axes_of(name)
                    held = call.inputs.tensors.get(name)
                    assert (axes is None) == (held is None), words
                    assert held is None or held.shape == form.shape(axes or (), call.case.sizes), words
                for name, tensor in call.inputs.cotangents.items():
                    axes = {**form.outputs, **form.states}[name]
                    assert tensor.shape == form.shape(axes, call.case.all_sizes), words
                given = {name for name, _ in call.case.options} - {*APART}
                assert set(call.inputs.options) == given | set(form.required), words
                assert bool(call.inputs.cotangents) == bool(call.case.option("cotangents")), words
                assert Case.parse(call.case.id) == call.case


def test_variants_are_the_same_each_time() -> None:
    case = CASES[0]
    for invariant in invariants_for("softmax", FULL):
        first, again = (invariant.variants(case, make_inputs(case), FULL) for _ in range(2))
        assert (first is None) == (again is None)
        for one, two in zip(first.calls if first else (), again.calls if again else (), strict=True):
            assert one.case == two.case
            pairs = zip(one.inputs.tensors.values(), two.inputs.tensors.values(), strict=True)
            assert all(torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)) for a, b in pairs)


def test_transformations_change_something() -> None:
    case = CASES[0]
    own = make_inputs(case).tensors
    by_keys = Contract("softmax", options=("return_lse",))
    for name in ("key-permutation", "query-permutation", "score-shift", "value-linearity", "ones"):
        planned = INVARIANTS[name].variants(case, make_inputs(case), by_keys)
        assert planned is not None
        assert any(not torch.equal(own[t], planned.calls[-1].inputs.tensors[t]) for t in own), name


def test_names_are_checked_and_left_out() -> None:
    assert check_names(["ones", "strides"]) == ("ones", "strides")
    with pytest.raises(ContractError, match=r"without='one': .*key-permutation, .*length-padding"):
        check_names(["one"])
    declared = FULL.declare({"without": "ones,strides"})
    names = {invariant.name for invariant in invariants_for("softmax", declared)}
    ours = {name for name, invariant in INVARIANTS.items() if "softmax" in invariant.families}
    assert names == ours - {"ones", "strides"}
    assert not INVARIANTS["ones"].applicable(CASES[0], declared)
    with pytest.raises(ContractError, match="no such invariant"):
        invariants_for("softmax", dataclasses.replace(FULL, without=("three",)))


def test_families_and_degenerate_sizes() -> None:
    empty = Case.parse("softmax:float16:normal:B1,H2,G1,M3,N0,D8,E8:-:contiguous:1")
    for invariant in INVARIANTS.values():
        assert invariant.families
        assert not invariant.applicable(empty, FULL)
    rows = {invariant.name for invariant in invariants_for("logsumexp", Contract("logsumexp"))}
    assert {"key-permutation", "score-shift", "key-duplication", "row-independence", "determinism"} <= rows
    assert "grouped-heads" not in rows


def test_what_a_family_is_not_held_to() -> None:
    """Statistics see masked keys, windows see places, a sum of weights need not be 1."""
    names = {
        family: {invariant.name for invariant in invariants_for(family, Contract(family))}
        for family in ("sigmoid", "relu", "batch_normalised", "scaled_head", "differential", "easy")
    }
    assert not {"score-shift", "ones", "convex-hull", "key-duplication"} & (names["sigmoid"] | names["relu"])
    assert "masked-padding" not in names["batch_normalised"] | names["scaled_head"]
    assert "key-duplication" not in names["scaled_head"]
    assert "convex-hull" not in names["differential"]
    assert not {"key-permutation", "query-permutation", "row-independence"} & names["easy"]
    assert all("gradient-linearity" in own for own in names.values())


def test_alibi_keeps_its_places() -> None:
    case = Case.parse(GRADIENTS[2])
    for name in ("key-permutation", "query-permutation", "split-merge", "key-duplication"):
        assert not INVARIANTS[name].applicable(case, FULL), name
