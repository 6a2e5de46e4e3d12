"""Correct implementations by other algorithms: each passes, and each is an algorithm of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

import attnproof
from attnproof import healthy_algorithms
from attnproof.in_process import InProcess
from attnproof.properties.case import Case
from attnproof.properties.contract import contract_of, promises
from attnproof.properties.regimes import plan
from attnproof.reports.record import CaseJudged
from attnproof.targets import Importable
from attnproof.trials import Subject, judge_case

TRITON = tuple(name for name in healthy_algorithms.__all__ if name.startswith("triton"))
TORCH = tuple(name for name in healthy_algorithms.__all__ if name not in TRITON)
ATTENTION = tuple(
    name
    for name in TORCH
    if contract_of(getattr(healthy_algorithms, name)).family == "softmax"  # type: ignore[union-attr]
)
CASES = 40


@functools.cache
def subject(name: str) -> Subject:
    contract = contract_of(getattr(healthy_algorithms, name))
    assert contract is not None
    return Subject(name, Importable(f"attnproof.healthy_algorithms:{name}"), contract, "cpu")


def judged(name: str) -> Iterator[CaseJudged]:
    contract = subject(name).contract
    call = InProcess().call
    for case in plan(
        contract.family, dtypes=contract.dtypes, options=contract.options, budget=CASES, seed=60
    ):
        yield judge_case(subject(name), case, call)


@pytest.mark.parametrize("name", TORCH)
def test_each_algorithm_is_right_in_every_case(name: str) -> None:
    events = list(judged(name))
    assert len(events) == CASES
    wrong = [(e.case.id, e.verdict, e.failures) for e in events if e.verdict != "PASS"]
    assert not wrong, wrong


@pytest.mark.parametrize("name", TRITON)
def test_each_tile_of_the_triton_kernel_is_right(name: str) -> None:
    result = attnproof.verify(
        f"attnproof.healthy_algorithms:{name}", "softmax", device="emulator:sm_90", examples=15, jobs=1
    )
    assert result.verdict == "PASS", result


def results(dtype: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """o and lse of every attention algorithm for one call whose maxima rise from tile to tile."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, generator=generator) for n in (40, 500, 500))
    k = k * torch.linspace(0.2, 3.0, 500)[:, None]
    tensors = [t.to(getattr(torch, dtype)) for t in (q, k, v)]
    return {
        name: getattr(healthy_algorithms, name)(*tensors, scale=0.3, return_lse=True) for name in ATTENTION
    }


def test_no_two_algorithms_are_one() -> None:
    """Different orders of rounding show as different bits; equal bits would be one algorithm twice."""
    found = results("float32")
    for name, (o, _) in found.items():
        same = [other for other, (p, _) in found.items() if other != name and torch.equal(o, p)]
        assert not same, f"{name} gives the bits of {same}"


def test_lazy_rescaling_keeps_a_stale_maximum_and_others_do_not() -> None:
    largest: dict[str, float] = {}
    for name, slack in (("lazy", healthy_algorithms._LAZY), ("eager", 0.0)):
        seen: list[float] = []
        call = recorded(seen)
        healthy_algorithms._online(call, slice(None), 16, slack=slack)
        largest[name] = max(seen)
    assert largest["eager"] == 1.0
    assert 1.0 < largest["lazy"] <= 256.0


def recorded(seen: list[float]) -> healthy_algorithms._Call:
    """A call with rising scores that notes the largest P of each tile."""

    class Noted(healthy_algorithms._Call):
        def stored(self, p: torch.Tensor) -> torch.Tensor:
            seen.append(float(p.max()))
            return super().stored(p)

    q, v = torch.ones(1, 1, 3, 4), torch.randn(1, 1, 200, 4, generator=torch.Generator().manual_seed(1))
    k = torch.linspace(0.0, 5.0, 200)[:, None].expand(1, 1, 200, 4)
    plain = healthy_algorithms._call(q, k, v, scale=1.0)
    return Noted(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})


def broken(
    function: Callable[..., object], change: Callable[[dict[str, object]], None]
) -> Callable[..., object]:
    """The algorithm called with changed options, under the same contract."""
    contract = contract_of(function)
    assert contract is not None

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> object:
        change(options)
        return function(q, k, v, **options)

    return promises(contract)(kernel)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("scale", 0.26, "softmax:float32:normal:B1,H1,G1,M9,N33,D16,E8:-:contiguous:5"),
        ("causal", False, "softmax:float16:normal:B1,H2,G1,M33,N33,D16,E8:causal:contiguous:5"),
        ("sinks", None, "softmax:bfloat16:normal:B1,H2,G1,M9,N7,D16,E8:sinks:contiguous:5"),
        ("window", (3, 0), "softmax:float16:normal:B1,H2,G1,M33,N33,D16,E8:window=2..0:contiguous:5"),
    ],
)
def test_the_same_algorithm_with_an_option_ignored_is_found_out(
    option: str, value: object, text: str
) -> None:
    kernel = broken(healthy_algorithms.tiles_16_16, lambda options: options.update({option: value}))
    case = Case.parse(text)
    assert attnproof.check(healthy_algorithms.tiles_16_16, case, device="cpu").verdict == "PASS"
    assert attnproof.check(kernel, case, device="cpu").verdict == "FAIL"
