"""Linear attention in its forms and its gradients against float64 autograd: maps, sizes, states, packing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnproof.kernels.arguments import ContractError
from attnproof.kernels.linear import attention, parallel, recurrent, with_chunk
from attnproof.properties.contract import contract_of
from tests.kernels.linear_reference import MAPS, Problem, assert_within, naive, problem, results, widened
from tests.kernels.pointwise_reference import DTYPES

pytestmark = pytest.mark.usefixtures("emulated")

FORMS = {"chunkwise": attention, "recurrent": recurrent, "parallel": parallel}
# The parallel form is one chunk of the chunkwise one, by the same kernels.
KERNELS = ("chunkwise", "recurrent")


@pytest.mark.parametrize(
    ("name", "feature_map"),
    [
        *((name, feature_map) for name in KERNELS for feature_map in MAPS),
        ("parallel", "elu1"),
        ("parallel", "taylor"),
    ],
)
def test_forms_and_maps(name: str, feature_map: str) -> None:
    """Forms by maps; dtypes, normaliser and causality turn along, so that each form meets all."""
    turn = MAPS.index(feature_map) + (name == "recurrent")
    p = problem(DTYPES[turn % 3], feature_map, normalize=turn % 2 == 0, causal=turn % 4 < 3)
    assert_within(p, results(FORMS[name], p))


@pytest.mark.parametrize("name", KERNELS)
def test_normaliser_without_causality_in_half_precision(name: str) -> None:
    p = problem(torch.float16, causal=False)
    assert_within(p, results(FORMS[name], p))


@pytest.mark.parametrize("n", [1, 17, 64, 65, 130])
def test_lengths(n: int) -> None:
    p = problem(n=n)
    for form in (*FORMS.values(), with_chunk(5), with_chunk(100)):
        assert_within(p, results(form, p))


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_to_attend_to(name: str) -> None:
    p = problem(n=0)
    o, state, z, *gradients = results(FORMS[name], p)
    assert o.shape == (1, 2, 0, 20)
    assert torch.equal(state, p.states[0])
    assert torch.equal(z, p.states[1])
    assert all(torch.equal(x, y) for x, y in zip(gradients[3:], p.cotangents[1:], strict=True))
    none = problem(b=0, n=9)
    assert [x.numel() for x in results(FORMS[name], none)] == [0] * 8


@pytest.mark.parametrize(("d", "e", "feature_map"), [(80, 100, "elu1"), (16, 72, "taylor"), (1, 1, "elu1")])
@pytest.mark.parametrize("name", KERNELS)
def test_widths(name: str, d: int, e: int, feature_map: str) -> None:
    p = problem(torch.bfloat16, feature_map, d=d, e=e, h=1, initial=d < 80)
    assert_within(p, results(FORMS[name], p))


@pytest.mark.parametrize("name", FORMS)
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    """Also sequences of length 0, at both ends and in between."""
    ends = [0, 0, 17, 17, 82, 83, 83]
    p = problem(n=83)
    pieces = len(ends) - 1
    states = tuple(torch.rand(pieces, *x.shape[1:]) + 0.5 for x in p.states)
    cotangents = (p.cotangents[0], *(torch.randn(pieces, *x.shape[1:]) for x in p.cotangents[1:]))
    packed = results(
        FORMS[name], replace(p, states=states, cotangents=cotangents),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
    )  # fmt: skip
    for piece, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        rows, own = slice(start, stop), slice(piece, piece + 1)
        alone = Problem(
            p.q[:, :, rows], p.k[:, :, rows], p.v[:, :, rows], tuple(x[own] for x in states),
            (p.cotangents[0][:, :, rows], *(x[own] for x in cotangents[1:])), p.feature_map, True, True,
        )  # fmt: skip
        part = [x[own] if x.shape[0] == pieces else x[:, :, rows] for x in packed]
        assert_within(alone, part)


@pytest.mark.parametrize("name", KERNELS)
def test_any_strides(name: str) -> None:
    """Transposed, sliced, broadcast and reversed axes; the same values contiguous give the same bits."""
    p = problem(b=2, d=16, e=16)
    n = p.q.shape[2]
    strided = replace(
        p,
        q=torch.randn(2, n, 2, 40).transpose(1, 2)[..., 3:19],
        k=torch.randn(2, 1, 1, 16).expand(2, 2, n, 16),
        v=torch.randn(2, 2, 16, n).mT,
        states=(torch.rand(2, 2, 16, 16).mT + 0.5, (torch.rand(16, 2, 2) + 0.5).permute(2, 1, 0)),
        cotangents=(torch.ones(1).expand(2, 2, n, 16), torch.randn(2, 2, 16, 16).mT, p.cotangents[2]),
    )
    assert_within(strided, results(FORMS[name], strided))


@pytest.mark.parametrize("name", FORMS)
def test_a_sequence_in_two_parts(name: str) -> None:
    """The state handed over is the state, and decoding is a part of length 1."""
    p = widened(problem(initial=False))
    want, *_ = naive(
        p.q, p.k, p.v, feature_map="elu1", normalize=True, causal=True, initial_state=None, return_state=True
    )
    q, k, v = (x.float() for x in (p.q, p.k, p.v))
    state, parts = None, []
    for start, stop in ((0, 41), (41, 41), (41, 42), (42, 70)):
        rows = slice(start, stop)
        o, *state = FORMS[name](
            q[:, :, rows], k[:, :, rows], v[:, :, rows], feature_map="elu1", normalize=True,
            initial_state=None if state is None else tuple(state), return_state=True,
        )  # fmt: skip
        parts.append(o)
    # 70 terms of width 12 and 20, all positive but v: far below 2**-24 times their number
    assert (torch.cat(parts, 2).double() - want).abs().max() < 200 * 2.0**-24 * p.v.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_two_runs_agree_and_inputs_stay(name: str) -> None:
    p = problem()
    before = [x.clone() for x in (*p.inputs, *p.cotangents)]
    first, second = results(FORMS[name], p), results(FORMS[name], p)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, (*p.inputs, *p.cotangents), strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_only_some_gradients_and_cotangents(name: str) -> None:
    """Each leaf alone gets the gradient that it gets among all; a final z alone has a cotangent."""
    p = problem()
    every = results(FORMS[name], p)[3:]
    options: dict[str, Any] = {"feature_map": "elu1", "normalize": True, "return_state": True}
    for chosen in range(5):
        leaves = [x.clone().requires_grad_(i == chosen) for i, x in enumerate(p.inputs)]
        outputs = FORMS[name](*leaves[:3], initial_state=tuple(leaves[3:]), **options)
        (gradient,) = torch.autograd.grad(outputs, [leaves[chosen]], p.cotangents, allow_unused=True)
        assert torch.equal(gradient, every[chosen])
    k = p.k.clone().requires_grad_()
    *_, z = FORMS[name](p.q, k, p.v, **options)
    z.backward(torch.ones_like(z))
    assert torch.allclose(k.grad, torch.where(p.k > 0, 1.0, p.k.exp()), rtol=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", FORMS)
def test_nothing_non_finite_is_seen_before_its_position(name: str, poison: float) -> None:
    p = problem()
    options: dict[str, Any] = {"feature_map": "elu1", "normalize": True}
    clean = FORMS[name](p.q, p.k, p.v, **options)
    for which in range(3):
        inputs = [x.clone() for x in (p.q, p.k, p.v)]
        inputs[which][:, :, 40, 3] = poison
        o = FORMS[name](*inputs, **options)
        assert torch.equal(o[:, :, :40], clean[:, :, :40])
        assert not o[:, :, 40].isfinite().all()
        if which == 0:
            assert torch.equal(o[:, :, 41:], clean[:, :, 41:])


@pytest.mark.parametrize("name", KERNELS)
def test_memory_beyond_the_end_does_not_leak(name: str) -> None:
    p = problem(n=37, d=16, e=16)
    q, k, v = (torch.full((1, 2, 64, 32), math.nan) for _ in range(3))
    for whole, part in ((q, p.q), (k, p.k), (v, p.v)):
        whole[:, :, :37, :16] = part
    views = replace(p, q=q[:, :, :37, :16], k=k[:, :, :37, :16], v=v[:, :, :37, :16])
    assert_within(views, results(FORMS[name], views))


@pytest.mark.parametrize("name", KERNELS)
def test_features_beyond_float16(name: str) -> None:
    """exp(16) is 1e7, and the state reaches 1e8: o is a mean of values all the same."""
    p = problem(torch.float16, "exp", initial=False)
    p = replace(p, k=(p.k / 8 + 16).half(), cotangents=(p.cotangents[0], *(x * 0 for x in p.cotangents[1:])))
    assert_within(p, results(FORMS[name], p))


@pytest.mark.parametrize("name", KERNELS)
def test_elu_plus_one_keeps_small_exponentials(name: str) -> None:
    """At x = −30 it is e^−30, of which expm1(x) + 1 would leave nothing; and the slopes at 0."""
    q, k = torch.ones(1, 1, 3, 1), torch.full((1, 1, 3, 1), -30.0)
    _, state = FORMS[name](q, k, q, feature_map="elu1", normalize=False, return_state=True)
    assert state.item() == pytest.approx(3 * math.exp(-30), rel=1e-5)
    for feature_map, slope in (("elu1", 1.0), ("relu", 0.0)):
        x = torch.zeros(1, 1, 1, 1, requires_grad=True)
        _, state = FORMS[name](x, x, torch.ones(1, 1, 1, 1), feature_map=feature_map, normalize=False,
                               return_state=True)  # fmt: skip
        state.sum().backward()
        assert x.grad is not None
        assert x.grad.item() == slope


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "elu"}, "feature_map='elu'"),
        ({"k": torch.zeros(1, 2, 5, 7)}, "the width D"),
        ({"k": torch.zeros(1, 2, 6, 8), "v": torch.zeros(1, 2, 6, 9)}, "as many queries as keys"),
        ({"initial_state": torch.zeros(1, 2, 8, 9)}, r"a pair \(S, z\)"),
        ({"initial_state": (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8))}, r"expected \(1, 2, 8, 9\)"),
        ({"initial_state": (torch.zeros(1, 2, 8, 9), None)}, "pass S and z"),
        ({"initial_state": (torch.zeros(1, 2, 8, 9).half(), torch.zeros(1, 2, 8))}, "states are float32"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "expected to rise from 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 9),
        "feature_map": "elu1", "normalize": True,
    }  # fmt: skip
    with pytest.raises(ContractError, match=message):
        attention(**{**given, **change})


def test_contract() -> None:
    for kernel in FORMS.values():
        contract = contract_of(kernel)
        assert contract is not None
        assert contract.family == "linear"
        assert contract.options == ("causal", "initial_state", "cu_seqlens", "return_state")
    wide = torch.zeros(1, 1, 3, 17)
    for feature_map in ("taylor", "squared"):
        with pytest.raises(NotImplementedError, match="up to D = 16"):
            attention(wide, wide, wide, feature_map=feature_map, normalize=False)
    with pytest.raises(NotImplementedError, match="float64"):
        attention(*(wide.double(),) * 3, feature_map="elu1", normalize=False)
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(ContractError, match="chunk="):
            with_chunk(chunk)  # type: ignore[arg-type]
