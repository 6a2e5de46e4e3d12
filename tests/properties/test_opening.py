"""The planned cases of a search: what a kernel declares decides which there are, and they cost little."""

from __future__ import annotations

import math

import pytest

from attnproof.properties.case import OPTIONS, make_inputs
from attnproof.properties.contract import Supports
from attnproof.properties.regimes import REGIMES
from attnproof.properties.regimes.opening import larger, opening
from attnproof.properties.views import unit_last_stride

FAMILIES = ("softmax", "logsumexp", "softmax_rows")
DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cases", [opening, larger])
def test_every_case_can_be_made_and_is_small_enough_for_a_search(family: str, cases: object) -> None:
    options = [name for name in OPTIONS[family] if name != "causal_alignment"]
    made = cases(family, dtypes=DTYPES, options=options, supports=Supports())  # type: ignore[operator]
    assert made
    assert len({case.id for case in made}) == len(made)
    for case in made:
        assert REGIMES[case.regime].declines(family, case.dtype, [name for name, _ in case.options]) is None
        sizes = case.sizes
        work = math.prod(sizes[s] for s in sizes if s not in "GDE") * (sizes.get("D", 1) + sizes.get("E", 1))
        assert work < 2**26, case.id
        assert make_inputs(case).tensors


def test_each_option_and_each_dtype_of_a_kernel_comes_up_in_the_opening() -> None:
    options = ("causal", "window", "softcap", "bias", "sinks", "cu_seqlens", "return_lse")
    made = opening("softmax", dtypes=DTYPES, options=options, supports=Supports())
    assert {name for case in made for name, _ in case.options} == set(options)
    assert {case.dtype for case in made} == set(DTYPES)
    # Every case whose kind asks for options that a kernel lacks is left out, not called without them.
    plain = opening("softmax", dtypes=DTYPES, options=(), supports=Supports())
    assert all(case.options == () for case in plain)
    assert 0 < len(plain) < len(made)


def test_one_shape_comes_again_with_other_values() -> None:
    made = opening("softmax", dtypes=("float16",), options=(), supports=Supports())
    shapes = [(case.shape, case.regime) for case in made]
    assert any(shapes.count(shape) > 1 for shape in shapes)


@pytest.mark.parametrize(
    "supports",
    [
        Supports(head_dims=(64, 128)),
        Supports(max_head_dim=40),
        Supports(multiple_of=16, last_stride_one=True),
    ],
)
def test_what_a_kernel_does_not_support_is_not_asked(supports: Supports) -> None:
    made = [
        *opening("softmax", dtypes=DTYPES, options=("causal",), supports=supports),
        *larger("softmax", dtypes=DTYPES, options=("causal",), supports=supports),
    ]
    assert made
    for case in made:
        assert case["N"] % supports.multiple_of == 0
        assert supports.head_dims is None or (case["D"] in supports.head_dims and case["E"] == case["D"])
        assert supports.max_head_dim is None or max(case["D"], case["E"]) <= supports.max_head_dim
        assert not supports.last_stride_one or unit_last_stride(case.view, 4)


def test_top_left_alignment_is_a_part_of_causal_cases() -> None:
    made = opening(
        "softmax", dtypes=DTYPES, options=("causal",), supports=Supports(), causal_alignment="top-left"
    )
    causal = [case for case in made if case.option("causal")]
    assert causal
    assert all(case.option("causal_alignment") == "top-left" for case in causal)
