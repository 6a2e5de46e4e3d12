"""The shared definitions against independent scalar transcriptions, in every arithmetic.

The transcriptions (tests/references/) know nothing of ``properties/``; the two agree when the transcription's
number, computed with 60 digits, lies in the enclosure that the definition states.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from attnproof.properties.arithmetic import Enclosure
from attnproof.properties.oracle import reference
from tests.properties.arithmetic.containment import enclosure_contains
from tests.references.logsumexp import logsumexp
from tests.references.softmax import softmax_attention
from tests.references.softmax_rows import softmax_row

ARITHMETICS = ("auto", "mpmath", "arb", "float64")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the largest term: the transcriptions' own error at 60 digits, and mpmath's at 50 where terms cancel.
OWN_ERROR = 1e-40
CASES = 120


def objects(nested: Any, shape: tuple[int, ...]) -> npt.NDArray[np.object_]:
    """Nested lists of mpmath numbers as an array."""
    flat = nested
    for _ in range(len(shape) - 1):
        flat = [x for inner in flat for x in inner]
    result = np.empty(math.prod(shape), dtype=object)
    result[:] = flat
    return result.reshape(shape)


class Case:
    """A random small call of softmax attention, with the options that a seed draws."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[self.integer(0, 3)]
        packed = self.integer(0, 5) == 0
        batch, kv_heads = (1 if packed else self.integer(1, 2)), self.integer(1, 2)
        heads = kv_heads * self.integer(1, 3)
        m = self.integer(1, 6)
        n = m if packed else self.integer(0, 6)
        width, self.value_width = self.integer(1, 5), self.integer(1, 4)
        size = (0.1, 1.0, 8.0, 60.0)[self.integer(0, 3)]
        self.q, self.k = self.draw(batch, heads, m, width) * size, self.draw(batch, kv_heads, n, width) * size
        self.v = self.draw(batch, kv_heads, n, self.value_width)
        self.shape = (batch, heads, m, n)
        self.options: dict[str, Any] = {"scale": (width**-0.5, -0.7, 1.0)[self.integer(0, 2)]}
        self.options |= self.position_options(packed=packed)
        if self.integer(0, 1):
            self.options["softcap"] = (0.5, 30.0)[self.integer(0, 1)]
        if self.integer(0, 1):
            self.options["bias"] = self.bias()
        if self.integer(0, 2) == 0:
            sinks = self.draw(heads)
            self.options["sinks"] = torch.where(self.draw(heads) > 1.0, -torch.inf, sinks.double()).to(
                self.dtype
            )

    def integer(self, low: int, high: int) -> int:
        """A random integer, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def draw(self, *shape: int) -> torch.Tensor:
        """Normal numbers of the case's dtype."""
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def position_options(self, *, packed: bool) -> dict[str, Any]:
        """Which keys a query sees by their place."""
        options: dict[str, Any] = {}
        if self.integer(0, 1):
            options["causal"] = True
            if self.integer(0, 2) == 0:
                options["causal_alignment"] = "top-left"
        if self.integer(0, 2) == 0:
            sides = [self.integer(-1, 4) for _ in range(2)]
            options["window"] = tuple(None if side < 0 else side for side in sides)
        if packed:
            cuts = sorted(self.integer(0, self.length) for _ in range(self.integer(0, 3)))
            options["cu_seqlens"] = torch.tensor([0, *cuts, self.length], dtype=torch.int32)
        return options

    @property
    def length(self) -> int:
        """M."""
        return self.q.shape[2]

    def bias(self) -> torch.Tensor:
        """A bias of some shape that broadcasts, with −inf here and there."""
        batch, heads, m, n = self.shape
        shape = ((batch, heads, m, n), (1, heads, 1, n), (m, n), (batch, 1, m, 1))[self.integer(0, 3)]
        return torch.where(self.draw(*shape) > 1.0, -torch.inf, self.draw(*shape).double()).to(self.dtype)

    def transcribed(self, **changes: Any) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
        """The o and lse of the scalar transcription."""
        options = {**self.options, **changes}
        if options.get("bias") is not None:
            options["bias"] = options["bias"].double().expand(self.shape).tolist()
        for name in ("sinks", "cu_seqlens"):
            if options.get(name) is not None:
                options[name] = options[name].tolist()
        q, k, v = (x.double().tolist() for x in (self.q, self.k, self.v))
        o, lse = softmax_attention(q, k, v, value_width=self.value_width, **options)
        return objects(o, (*self.shape[:3], self.value_width)), objects(lse, self.shape[:3])

    def defined(self, arithmetic: str) -> tuple[Enclosure, Enclosure]:
        """The o and lse of the shared definition."""
        result = reference(
            "softmax", self.q, self.k, self.v, arithmetic=arithmetic, return_lse=True, **self.options
        )
        assert isinstance(result, tuple)
        return result[0], result[1]


def agree(claimed: Enclosure, exact: npt.NDArray[np.object_], largest: float) -> bool:
    return bool(enclosure_contains(claimed, exact, slack=OWN_ERROR * largest).all())


@pytest.mark.parametrize("seed", range(CASES))
def test_softmax_attention_agrees_with_its_transcription(seed: int) -> None:
    case = Case(seed)
    o, lse = case.transcribed()
    largest = float(case.v.abs().max()) if case.v.numel() else 0.0
    for arithmetic in ARITHMETICS:
        claimed_o, claimed_lse = case.defined(arithmetic)
        assert agree(claimed_o, o, largest), (arithmetic, case.options)
        assert agree(claimed_lse, lse, 1e5), (arithmetic, case.options)
        if arithmetic == "auto":
            assert float(claimed_o.radius.max()) <= 2.0**-40 * max(largest, 1.0)


def test_the_cases_reach_every_option_and_every_edge() -> None:
    cases = [Case(seed) for seed in range(CASES)]
    names = {name for case in cases for name in case.options}
    assert names == {
        "scale",
        "causal",
        "causal_alignment",
        "window",
        "softcap",
        "bias",
        "sinks",
        "cu_seqlens",
    }
    assert {case.dtype for case in cases} == set(DTYPES)
    assert any(case.shape[3] == 0 for case in cases)
    assert any(0 < case.shape[3] < case.shape[2] for case in cases)
    assert any(case.q.shape[1] > case.k.shape[1] > 1 for case in cases)
    assert any(case.q.shape[3] != case.value_width for case in cases)
    assert any(
        -math.inf in [float(x) for x in case.transcribed()[1].ravel()] and case.shape[3] for case in cases
    )


CHANGES: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.5001},
    "causal": {"causal": True},
    "alignment": {"causal": True, "causal_alignment": "top-left"},
    "window": {"window": (1, 0)},
    "softcap": {"softcap": 5.0},
    "bias": {"bias": torch.tensor([[[[0.0, 0.1, 0.0, 0.0, 0.0]]]])},
    "sinks": {"sinks": torch.tensor([0.5, -40.0])},
}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("change", CHANGES)
def test_an_option_that_one_side_ignores_is_seen(change: str, arithmetic: str) -> None:
    random = torch.Generator().manual_seed(0)
    case = Case(0)
    case.q, case.k, case.v = (torch.randn(1, 2, n, 4, generator=random) for n in (3, 5, 5))
    case.shape, case.value_width, case.options = (1, 2, 3, 5), 4, {"scale": 0.5}
    claimed_o, claimed_lse = case.defined(arithmetic)
    same_o, same_lse = case.transcribed()
    assert agree(claimed_o, same_o, 4.0)
    assert agree(claimed_lse, same_lse, 4.0)
    other_o, other_lse = case.transcribed(**CHANGES[change])
    assert not agree(claimed_o, other_o, 4.0)
    assert not agree(claimed_lse, other_lse, 4.0)


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=["no-batch", "no-query", "no-key"]
)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_empty_axes_give_empty_outputs_or_empty_rows(
    arithmetic: str, shape: tuple[int, int, int, int]
) -> None:
    batch, heads, m, n = shape
    q, k, v = torch.ones(batch, heads, m, 4), torch.ones(batch, heads, n, 4), torch.ones(batch, heads, n, 5)
    result = reference("softmax", q, k, v, scale=1.0, return_lse=True, arithmetic=arithmetic)
    assert isinstance(result, tuple)
    o, lse = result
    assert tuple(o.value.shape) == (batch, heads, m, 5)
    assert tuple(lse.value.shape) == (batch, heads, m)
    if n == 0:
        assert bool((o.value == 0).all())
        assert bool((lse.value == -torch.inf).all())
        assert float(lse.radius.max()) == 0.0


def rows(seed: int) -> torch.Tensor:
    """A few rows of logits, some masked in part or altogether, none or many of them."""
    random = torch.Generator().manual_seed(seed)
    length = int(torch.randint(0, 9, (), generator=random))
    size = (0.1, 1.0, 30.0, 1000.0)[seed % 4]
    dtype = DTYPES[seed // 4 % 4]
    x = torch.randn(2, 3, length, generator=random, dtype=torch.float64) * size
    hidden = torch.rand(2, 3, length, generator=random) < 0.3
    hidden[0, 0] = True
    return x.masked_fill(hidden, -torch.inf).to(dtype)


@pytest.mark.parametrize("seed", range(32))
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_rows_agree_with_their_transcriptions(arithmetic: str, seed: int) -> None:
    x = rows(seed)
    nested = x.double().tolist()
    logs = objects([[logsumexp(row) for row in matrix] for matrix in nested], (2, 3))
    claimed = reference("logsumexp", x, arithmetic=arithmetic)
    assert isinstance(claimed, Enclosure)
    assert agree(claimed, logs, 1e5)
    weights = objects([[softmax_row(row) for row in matrix] for matrix in nested], tuple(x.shape))
    claimed = reference("softmax_rows", x, arithmetic=arithmetic)
    assert isinstance(claimed, Enclosure)
    assert agree(claimed, weights, 1.0)
    assert bool((claimed.value[0, 0] == 0).all())
    if x.shape[-1] > 1:
        assert not agree(claimed, np.roll(weights, 1, axis=-1), 1.0)
