"""Long calls of families with a state: a sample of positions is judged, and every final state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.contract import Contract
from attnproof.properties.families import family_of, state_layout
from attnproof.properties.families.base import Problem
from attnproof.properties.families.state_layout import Layout, grouping, sampled_rows
from attnproof.properties.oracle import certify, evaluate

SAMPLED = "position not sampled"
CALLS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "channel gates": ("gated_linear", {"scale": 0.3}),
    "scalar gates": ("gated_linear", {"scale": 0.3}),
    "packed": ("gated_linear", {"scale": 0.3, "cu_seqlens": (0, 40, 40, 61, 600)}),
    "retention": ("retention", {"scale": 0.3}),
    "rwkv6": ("rwkv6", {"scale": 0.3}),
    "normalised": ("linear", {"feature_map": "elu1", "normalize": True}),
    "not causal": ("linear", {"feature_map": "relu", "normalize": False, "causal": False}),
    "mlstm": ("mlstm", {"scale": 0.3}),
    "packed mlstm": ("mlstm", {"scale": 0.3, "cu_seqlens": (0, 40, 40, 61, 600)}),
    "delta": ("delta", {"scale": 0.3}),
    "packed delta": ("delta", {"scale": 0.3, "cu_seqlens": (0, 40, 40, 61, 600)}),
}


def problem_of(name: str, length: int, dtype: torch.dtype = torch.float32, decay: float = 0.1) -> Problem:
    """A call of one batch entry, two heads, D = 4 and E = 3; some gates are −∞."""
    family, given = CALLS[name]
    options, generator = dict(given), torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, 2, length, *shape, generator=generator)

    tensors = [normal(4).to(dtype), normal(4).to(dtype), normal(3).to(dtype)]
    if name in ("channel gates", "rwkv6", "packed", "scalar gates"):
        g = -decay * (normal() if name == "scalar gates" else normal(4)).abs()
        if decay >= 0.1:
            g[torch.rand(g.shape, generator=generator) < 0.01] = -torch.inf
        tensors.append(g)
    if family == "rwkv6":
        tensors.append(torch.randn(2, 4, generator=generator).to(dtype))
    if family == "delta":
        tensors[1] = tensors[1] / (1.1 * torch.linalg.vector_norm(tensors[1].float(), dim=-1, keepdim=True))
        beta = torch.rand(1, 2, length, generator=generator)
        tensors[1:] = [tensors[1].to(dtype), tensors[2], beta, -0.01 * normal().abs()]
    if family == "mlstm":
        tensors += [normal(), normal() + 4.0]
    if name == "packed mlstm":
        drawn = (torch.randn(4, 2, 4, 4, generator=generator) + 1.0).unbind(-1)
        options["initial_state"] = (torch.stack(drawn[:3], -1), drawn[3], drawn[0][..., 0] + 3.0)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    return family_of(family).problem(*tensors, **options, return_state=True)


@pytest.mark.parametrize("name", CALLS)
def test_sampled_rows_are_those_of_the_whole_evaluation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference and budgets of sampled rows and of states are those of all rows; others are open."""
    a, contract = EnclosureArithmetic(), Contract(CALLS[name][0])
    dtype = torch.bfloat16 if name in ("packed mlstm", "mlstm", "retention") else torch.float32
    whole = problem_of(name, 600, dtype)
    monkeypatch.setattr(state_layout, "LONGEST", 100)
    sampled = problem_of(name, 600, dtype)
    rows = sampled_rows(600, ((0, 0, 600),))
    assert whole.differentiated
    assert not sampled.differentiated
    every, some = evaluate(whole, a, gauges=True), evaluate(sampled, a, gauges=True)
    allowed, found = whole.budgets(every, contract), sampled.budgets(some, contract)
    judged = ~found["o"].open
    assert rows is not None
    assert bool(judged[:, :, 0].all() and judged[:, :, -1].all())
    assert 0 < int(judged[0, 0, :, 0].sum()) <= 96
    assert found["o"].reasons[SAMPLED] == int((~judged).sum()) - int((allowed["o"].open & judged).sum())
    # The delta rule's steps are taken one by one: its reference knows every row.
    assert CALLS[name][0] == "delta" or bool(some["o"].radius[~judged].isinf().all())
    for output in sampled.outputs:
        here = judged if output == "o" else ~found[output].open
        apart = (some[output].value - every[output].value).abs()[here]
        assert bool((apart <= (some[output].radius + every[output].radius)[here]).all())
        assert bool((some[output].radius[here] <= 64.0 * every[output].radius[here] + 1e-300).all())
        for field in ("certain", "probable"):
            ours, theirs = (getattr(x[output], field)[here] for x in (found, allowed))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-300)


@pytest.mark.parametrize("name", ["channel gates", "normalised", "mlstm", "packed delta"])
def test_errors_are_found_where_positions_are_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at a sampled position or in the final state is beyond its budget, elsewhere it is open."""
    monkeypatch.setattr(state_layout, "LONGEST", 100)
    problem = problem_of(name, 600)
    reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(reference, Contract(CALLS[name][0]))

    def accused(output: str, place: tuple[int, ...]) -> bool:
        exact, budget = reference[output], budgets[output]
        wrong = exact.value.clone()
        wrong[place] += 0.01 * (1.0 + wrong[place].abs())
        beyond = (wrong - exact.value).abs() - exact.radius > budget.certain
        return bool((beyond & ~budget.open).any())

    row = int((~budgets["o"].open)[0, 1, :, 0].nonzero()[5])
    left = int(budgets["o"].open[0, 1, :, 0].nonzero()[5])
    assert accused("o", (0, 1, row, 2))
    assert accused("state", (0, 1, 3, 2))
    assert not accused("o", (0, 1, left, 2))


@pytest.mark.parametrize("count", [0, 1, 16, 17, 255, 256, 300, 5000])
def test_groups_hold_all_blocks(count: int) -> None:
    """Groups are of at most 16, and hold few more blocks than there are."""
    sizes = grouping(count)
    held = int(torch.tensor(sizes).prod())
    assert max(sizes) <= 16
    assert count <= held <= 1.3 * count


def test_blocks_of_a_sample_hold_every_position_once() -> None:
    """Each position is written in one block, and each sampled one read in a block that begins with one."""
    rows = torch.tensor([0, 3, 4, 255, 256, 511, 700])
    layout = Layout.sampled(701, rows)
    assert layout.writes[layout.writes >= 0].tolist() == list(range(701))
    assert set(rows.tolist()) <= set(layout.reads.flatten().tolist())
    assert layout.chosen is not None
    begins = layout.writes[:, 0][layout.chosen.argmax(-1)]
    assert begins.tolist() == layout.reads[:, 0].tolist()


def test_what_a_sample_holds() -> None:
    """Both ends, both sides of multiples of chunk lengths, and of packed sequences' ends; at most 96."""
    assert sampled_rows(4096, ((0, 0, 4096),)) is None
    rows = sampled_rows(65_536, ((0, 0, 65_536),))
    assert rows is not None
    held = set(rows.tolist())
    assert {0, 65_535} <= held
    assert 64 <= len(held) <= 96
    for multiple in (16, 64, 128, 4096):
        assert sum(row % multiple == 0 and row - 1 in held for row in held) >= 3
    packed = sampled_rows(5000, ((0, 0, 10), (0, 10, 10), (0, 10, 5000)))
    assert packed is not None
    assert len({9, 10} & set(packed.tolist())) == 2


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float) -> Any:
    """Gated linear attention in chunks of 64 in float32, with products of operands in the inputs' dtype."""
    dtype, state, rows = q.dtype, torch.zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    below = torch.ones(64, 64, dtype=torch.bool).tril()

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float() @ y.to(dtype).float()

    for start in range(0, q.shape[2], 64):
        i, j, w, gates = (x[:, :, start : start + 64].float() for x in (q, k, v, g))
        b = gates.cumsum(2)
        middle = b[:, :, 32:33]
        p = product(i * (b - middle).exp(), (j * (middle - b).exp()).mT).masked_fill(~below, 0.0)
        rows.append(product(i * b.exp(), state) + product(p, w))
        last = b[:, :, -1:]
        state = last.exp().mT * state + product((j * (last - b).exp()).mT, w)
    return {"o": (scale * torch.cat(rows, 2)).to(dtype), "state": state}


def judged(problem: Problem, outputs: Mapping[str, torch.Tensor]) -> tuple[float, int]:
    """The largest error over its certain budget, and how many elements of o were judged."""
    contract, latest = Contract("gated_linear"), {}

    def targets(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        latest.update(problem.budgets(found, contract))
        return {name: torch.where(b.open, torch.inf, 0.02 * b.certain) for name, b in latest.items()}

    reference, worst = certify(problem, targets), 0.0
    assert set(reference.arithmetic) == {"float64"}
    for name, got in outputs.items():
        exact, budget = reference.outputs[name], latest[name]
        error = (got.double() - exact.value).abs() - exact.radius
        worst = max(worst, float((error / budget.certain)[~budget.open].max()))
    return worst, int((~latest["o"].open).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slow_decays_over_16384_positions(dtype: torch.dtype) -> None:
    """A chunkwise form with a float32 state is within its budgets; one that forgets its state is not."""
    problem: Any = problem_of("channel gates", 16_384, dtype, decay=1e-4)
    tensors = (problem.q, problem.k, problem.v)
    worst, count = judged(problem, chunked(*tensors, problem.g, 0.3))
    assert count >= 64 * 2 * 3
    assert 0.0 < worst <= 1.0
    gates = problem.g.clone()
    gates[:, :, 8192:8256] = -1.0
    wrong, _ = judged(problem, chunked(*tensors, gates, 0.3))
    assert wrong > 1.0


def test_65536_positions_take_seconds() -> None:
    """Linear cost: 2 s of CPU time with D = 4 and two heads, 11 s with D = E = 64 and one."""
    begun = time.process_time()
    problem: Any = problem_of("channel gates", 65_536, decay=1e-4)
    worst, _ = judged(problem, chunked(problem.q, problem.k, problem.v, problem.g, 0.3))
    assert worst <= 1.0
    assert time.process_time() - begun < 30.0
