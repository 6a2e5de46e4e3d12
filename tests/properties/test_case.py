"""Cases: their text, their errors, their inputs and the memory these lie in."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnproof.properties.case import Case, CaseError, make_inputs
from attnproof.properties.contract import DTYPES, Supports
from attnproof.properties.draw import Draw
from attnproof.properties.regimes.visibility import seen_keys
from attnproof.properties.strategies import cases
from attnproof.properties.views import VIEWS, lay_out, unit_last_stride

SIZES = {"B": 2, "H": 4, "G": 2, "M": 5, "N": 7, "D": 8, "E": 3}
ALL_OPTIONS = ("causal", "window", "softcap", "bias", "sinks", "cu_seqlens", "return_lse")


def attention(**changes: Any) -> Case:
    """A small softmax case with some fields changed."""
    fields: dict[str, Any] = {"family": "softmax", "dtype": "float32", "shape": SIZES, **changes}
    return Case(**fields)


@given(case=cases("softmax", dtypes=DTYPES, options=ALL_OPTIONS))
@settings(max_examples=200, deadline=None)
def test_parse_is_the_inverse_of_id(case: Case) -> None:
    assert Case.parse(case.id) == case
    assert not set(case.id) & set(" \t\n'\"$*?;&|<>()[]{}\\"), "the text must survive a shell without quotes"


def test_id_reads_as_documented() -> None:
    case = attention(
        shape=list(reversed(SIZES.items())),
        options={"window": [3, None], "return_lse": True, "softcap": 30, "causal": True, "sinks": False},
        regime="one-hot",
        view="transposed",
        seed=7,
    )
    expected = (
        "softmax:float32:one-hot:B2,H4,G2,M5,N7,D8,E3:causal,window=3..,softcap=30.0,return_lse:transposed:7"
    )
    assert case.id == expected
    packed = Case.parse("softmax:bfloat16:normal:B1,H1,G1,M5,N5,D4,E4:cu_seqlens=3+0+2,window=..2:sliced:0")
    assert packed.option("cu_seqlens") == (3, 0, 2)
    assert packed.option("window") == (None, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "hyena"}, "family='hyena': expected one of"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"view": "reversed"}, "view='reversed'"),
        ({"seed": -1}, "seed=-1"),
        ({"regime": "One Hot"}, "regime='One Hot'"),
        ({"shape": {**SIZES, "G": 3}}, "H is a multiple of G"),
        ({"shape": {**SIZES, "M": -1}}, "M=-1"),
        ({"shape": {"N": 3}}, "has the sizes B, H, G, M, N, D, E"),
        ({"options": {"dropout": True}}, "option 'dropout'"),
        ({"options": {"window": (1, -2)}}, "window=(1, -2)"),
        ({"options": {"softcap": 0}}, "softcap=0"),
        ({"options": {"bias": "bhnm"}}, "how it broadcasts"),
        ({"options": {"cu_seqlens": (3, 4)}}, "with B = 1"),
        ({"options": {"causal": 1}}, "causal=1"),
        ({"options": {"causal_alignment": "middle"}}, "top-left"),
    ],
)
def test_impossible_cases_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError) as raised:
        attention(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("softmax:float32", "found 2 parts"),
        ("softmax:float32:normal:B1,N-3:-:contiguous:0", "'N-3'"),
        ("softmax:float32:normal:R1,N3:-:contiguous:x", "seed 'x'"),
        ("softmax:float32:normal:B1,H1,G1,M5,N5,D4,E4:window=3:contiguous:0", "window=3"),
        ("softmax:float32:normal:B1,H1,G1,M5,N5,D4,E4:causal=1:contiguous:0", "causal=1"),
    ],
)
def test_texts_that_are_no_case_are_refused(text: str, message: str) -> None:
    with pytest.raises(CaseError) as raised:
        Case.parse(text)
    assert message in str(raised.value)


def test_regimes_that_do_not_fit_are_refused_when_inputs_are_made() -> None:
    with pytest.raises(CaseError, match="no such regime"):
        make_inputs(attention(regime="unheard-of"))
    with pytest.raises(CaseError, match="needs one of the options bias"):
        make_inputs(attention(regime="masked"))
    with pytest.raises(CaseError, match="softcap would undo it"):
        make_inputs(attention(regime="one-hot", options={"softcap": 2.0}))
    with pytest.raises(CaseError, match="not representable in float16"):
        make_inputs(attention(regime="identical-huge", dtype="float16"))
    with pytest.raises(CaseError, match="family 'softmax' has no such inputs"):
        make_inputs(attention(regime="log-near-zero"))


def test_inputs_never_change() -> None:
    """Bytes of these regimes' inputs are those that were recorded: a stored case means the same for ever.

    Regimes whose values pass through a logarithm or a matrix product are left out, as are real activations:
    their last bit is a matter of the machine.
    """
    digest = hashlib.blake2b(digest_size=8)
    for regime in (
        "normal",
        "one-hot",
        "tied",
        "offset-1e4",
        "ascending",
        "outliers",
        "wide-values",
        "masked",
    ):
        case = attention(regime=regime, options={"bias": "1hmn", "sinks": True}, seed=3)
        inputs = make_inputs(case)
        for tensor in (*inputs.tensors.values(), inputs.options["bias"], inputs.options["sinks"]):
            digest.update(tensor.numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == "10ef0b0431ee4f8b"


def test_values_are_those_of_their_distributions() -> None:
    draw = Draw("softmax", "float32", "normal", {"N": 1})
    normal = draw.normal("a", 200_000)
    # Standard errors at this size: mean 0.0022, variance 0.0032, fourth moment 0.022 around 3 - 1.2/16.
    assert abs(normal.mean()) < 0.01
    assert abs(normal.var() - 1) < 0.015
    assert abs((normal**4).mean() - 2.925) < 0.1
    uniform = draw.uniform("b", 200_000)
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.003
    assert abs(np.corrcoef(normal, uniform)[0, 1]) < 0.01
    assert sorted(draw.permutations("c", 3, 50)[1]) == list(range(50))
    assert set(draw.integers("d", -2, 2, 1000)) == {-2, -1, 0, 1}


def test_values_depend_on_regime_shape_and_seed_only() -> None:
    reference = make_inputs(attention(dtype="float64")).tensors
    for dtype in ("float32", "float16", "bfloat16"):
        for view in ("contiguous", "sliced", "transposed", "columns", "unaligned"):
            options = {"causal": True, "bias": "bhmn"} if view == "sliced" else {}
            tensors = make_inputs(attention(dtype=dtype, view=view, options=options)).tensors
            for name, tensor in tensors.items():
                assert torch.equal(tensor, reference[name].to(torch.float32).to(tensor.dtype)), (dtype, view)
    for other in (attention(seed=1), attention(shape={**SIZES, "N": 8}), attention(regime="tied")):
        assert not torch.equal(make_inputs(other).tensors["q"].double(), reference["q"])


@given(case=cases("softmax", dtypes=DTYPES, options=ALL_OPTIONS, most=40))
@settings(max_examples=60, deadline=None)
def test_inputs_are_those_of_the_contract(case: Case) -> None:
    inputs, again = make_inputs(case), make_inputs(case)
    b, h, g, m, n, d, e = (case[symbol] for symbol in "BHGMNDE")
    shapes = {"q": (b, h, m, d), "k": (b, g, n, d), "v": (b, g, n, e)}
    assert {name: tuple(tensor.shape) for name, tensor in inputs.tensors.items()} == shapes
    assert list(inputs.tensors) == ["q", "k", "v"]
    passed = {name for name, _ in case.options} - {"causal_alignment"} | {"scale"}
    assert set(inputs.options) == passed
    assert isinstance(inputs.options["scale"], float)
    tensors = {**inputs.tensors, **{k: v for k, v in inputs.options.items() if isinstance(v, torch.Tensor)}}
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.int32 if name == "cu_seqlens" else case.torch_dtype)
        other = again.tensors.get(name, again.options.get(name))
        assert torch.equal(tensor.nan_to_num(nan=7.5), other.nan_to_num(nan=7.5))
        assert tensor.stride() == other.stride()
        assert (
            tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
        )
    if "bias" in inputs.options:
        inputs.options["bias"].expand(b, h, m, n)
    if "cu_seqlens" in inputs.options:
        assert inputs.options["cu_seqlens"][-1] == n


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 5)])
def test_views_have_their_strides_among_nan(view: str, shape: tuple[int, ...]) -> None:
    values = torch.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)
    if view == "broadcast":
        values = values[(slice(0, 1),) * (2 if len(shape) == 4 else 1)].expand(shape)
    tensor = lay_out(values, view, "k" if len(shape) == 4 else "x")
    assert torch.equal(tensor, values)
    stride, offset = tensor.stride(), tensor.storage_offset()
    whole = torch.empty(0).set_(tensor.untyped_storage())
    expected = {
        (4, "contiguous"): ((60, 20, 5, 1), 0, 120),
        (4, "sliced"): ((5 * 6 * 7, 6 * 7, 7, 1), 5 * 6 * 7 + 6 * 7 + 7 + 1, 4 * 5 * 6 * 7),
        (4, "transposed"): ((60, 5, 15, 1), 0, 120),
        (4, "columns"): ((60, 20, 1, 4), 0, 120),
        (4, "broadcast"): ((0, 0, 5, 1), 0, 20),
        (4, "unaligned"): ((60, 20, 5, 1), 1, 122),
        (2, "contiguous"): ((5, 1), 0, 20),
        (2, "sliced"): ((7, 1), 8, 42),
        (2, "transposed"): ((1, 4), 0, 20),
        (2, "columns"): ((1, 4), 0, 20),
        (2, "broadcast"): ((0, 1), 0, 5),
        (2, "unaligned"): ((5, 1), 1, 22),
    }[len(shape), view]
    assert (stride, offset, whole.numel()) == expected
    assert whole.isnan().sum() == (whole.numel() - tensor.numel() if view in ("sliced", "unaligned") else 0)
    assert unit_last_stride(view, len(shape)) == (stride[-1] == 1)


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_nothing_are_empty(view: str) -> None:
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (0, 4), (4, 0)):
        assert lay_out(torch.zeros(shape), view, "k").shape == shape


def test_broadcast_cases_share_one_head_of_keys() -> None:
    inputs = make_inputs(attention(view="broadcast", regime="representable"))
    for name in ("k", "v"):
        assert inputs.tensors[name].stride()[:2] == (0, 0)
    assert inputs.tensors["q"].is_contiguous()


def test_seen_keys_are_those_of_the_contract() -> None:
    """Against the definition, element by element (contract.md, the edges)."""
    for m, n in ((3, 5), (5, 3), (4, 4)):
        sizes = {"B": 1, "H": 1, "M": m, "N": n}
        for options in (
            {},
            {"causal": True},
            {"causal": True, "causal_alignment": "top-left"},
            {"window": (1, None)},
            {"window": (None, 0)},
            {"causal": True, "window": (1, 2)},
        ):
            seen = seen_keys(sizes, options)[0, 0]
            left, right = options.get("window", (None, None))
            for i in range(m):
                for j in range(n):
                    position = i + n - m
                    expected = left is None or j >= position - left
                    expected &= right is None or j <= position + right
                    if "causal" in options:
                        expected &= j <= (i if "causal_alignment" in options else position)
                    assert seen[i, j] == expected, (m, n, options, i, j)
    packed = seen_keys({"B": 1, "H": 1, "M": 5, "N": 5}, {"cu_seqlens": (2, 0, 3), "causal": True})[0, 0]
    assert packed.tolist() == [[i >= j and (i < 2) == (j < 2) for j in range(5)] for i in range(5)]
    bias = np.zeros((1, 2, 1, 3))
    bias[0, 1, 0, 2] = -np.inf
    assert seen_keys({"B": 1, "H": 2, "M": 2, "N": 3}, {}, bias).sum() == 10


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_strategies_keep_to_what_a_kernel_supports(data: st.DataObject) -> None:
    supports = Supports(head_dims=(16, 64), multiple_of=16, last_stride_one=True, nonempty=True)
    case = data.draw(cases("softmax", dtypes=["bfloat16"], options=["causal"], supports=supports))
    assert case["D"] in (16, 64)
    assert case["E"] in (16, 64)
    assert case["N"] % 16 == 0
    assert min(case.sizes.values()) > 0
    assert case.view != "columns"
    assert {name for name, _ in case.options} <= {"causal"}


def test_cases_shrink_to_a_description_of_the_defect() -> None:
    """A kernel that is wrong for more than 16 keys under a causal mask shrinks to just that."""
    from hypothesis import find

    case = find(
        cases("softmax", options=ALL_OPTIONS),
        lambda case: bool(case.option("causal")) and case["N"] > 16,
        settings=settings(max_examples=2000, database=None, derandomize=True),
    )
    assert case.id == "softmax:float32:normal:B0,H1,G1,M17,N17,D1,E1:causal:contiguous:0"
