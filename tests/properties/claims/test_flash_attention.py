"""FlashAttention's claims: recurrences, counted traffic, masks and sentinels, by independent means."""

from __future__ import annotations

import math
from fractions import Fraction

import flint
import numpy as np
import pytest

from attnproof.properties.claims import (
    flash_attention,
    flash_attention_2,
    flash_masks,
    flash_sentinels,
    flash_traffic,
    slow_memory,
)


def plain(x) -> Fraction:
    return Fraction(int(x.p), int(x.q))


def softmax(w: list[list[Fraction]], v: list[list[Fraction]]) -> list[list[Fraction]]:
    return [
        [sum(a * row[c] for a, row in zip(line, v, strict=True)) / sum(line) for c in range(len(v[0]))]
        for line in w
    ]


def test_algorithm_1_by_fractions() -> None:
    rng = np.random.default_rng(0)
    w, v = flash_attention.weights(rng, 3, 5), flash_attention.weights(rng, 5, 2)
    *_, (done, out) = flash_attention.algorithm_1(w, v, 2, 2)
    due = softmax([[plain(x) for x in row] for row in w], [[plain(x) for x in row] for row in v])
    assert done == 5
    assert [[plain(x) for x in row] for row in out] == due


def test_what_is_held_on_chip_by_hand() -> None:
    # d = 4, M = 40: B_c = 3, B_r = 3; 4 tiles of 12 numbers, 9 of S, 6 of ℓ and m.
    assert flash_attention.block_sizes(40, 4) == (3, 3)
    assert flash_attention.on_chip(40, 4) == 4 * 12 + 9 + 6
    assert flash_attention.fits(flint.fmpq(7)).status == "HOLDS"
    assert flash_attention.fits(flint.fmpq(69, 10)).status == "REFUTED"


def test_gradients_against_finite_differences() -> None:
    rng = np.random.default_rng(1)
    s, v, do = rng.standard_normal(4), rng.standard_normal((4, 3)), rng.standard_normal(3)

    def loss(x: np.ndarray) -> float:
        p = np.exp(x - x.max())
        return float(do @ (p @ v) / p.sum())

    p = np.exp(s) / np.exp(s).sum()
    ds = p * (v @ do - do @ (p @ v))
    step = 1e-6
    for j in range(4):
        moved = np.eye(4)[j] * step
        assert (loss(s + moved) - loss(s - moved)) / (2 * step) == pytest.approx(ds[j], abs=1e-8)
    assert flash_attention.gradients_of_a_row(2, 1).status == "HOLDS"
    finding = flash_attention.gradients_of_a_row(3, 2, subtracts="mean")
    assert finding.table["holds"] == [True, False, False, True]


def test_traffic_by_hand() -> None:
    # N = 4, d = 2, M = 16: B_c = 2, so two passes of 3Nd + 4N = 40 numbers, and K and V once.
    assert slow_memory.flash_traffic(4, 2, 16) == 16 + 2 * 40
    memory = slow_memory.flash(4, 2, 16)
    assert memory.moved == 96
    assert memory.read["Q"] == 16
    assert memory.written["m"] == 8
    assert slow_memory.standard(4, 2).moved == slow_memory.standard_traffic(4, 2) == 32 + 64


def test_every_way_of_walking_computes_attention() -> None:
    for walk in (slow_memory.flash, slow_memory.standard, slow_memory.standard_in_tiles):
        memory = walk(10, 3, 17)
        s = memory.arrays["Q"] @ memory.arrays["K"].T
        p = np.exp(s)
        due = p @ memory.arrays["V"] / p.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(memory.arrays["O"], due, rtol=1e-13, atol=1e-15)


def test_crossover_is_where_the_counts_cross() -> None:
    for n, d in ((1024, 16), (16384, 32)):
        m = flash_traffic.crossover(n, d)
        assert slow_memory.flash_traffic(n, d, m) < slow_memory.standard_traffic(n, d)
        assert slow_memory.flash_traffic(n, d, m - 1) >= slow_memory.standard_traffic(n, d)
        assert abs(m - d * (3 * d + 4)) <= 4 * d


def test_square_tiles_fit() -> None:
    for size in range(3, 200):
        t = slow_memory.side(size)
        assert t * t + 2 * t <= size < (t + 1) ** 2 + 2 * (t + 1)


def test_printed_rescaling_needs_a_maximum_that_moves() -> None:
    w = np.array([[flint.fmpq(x) for x in (9, 3, 2, 1)]])
    v = np.array([[flint.fmpq(x)] for x in (1, 2, 3, 4)])
    wrong = flash_attention_2.accumulated(w, v, 1, lambda drop: 1 / drop)
    assert (wrong == flash_attention.attention(w, v)).all()
    rising = w[:, ::-1]
    wrong = flash_attention_2.accumulated(rising, v, 1, lambda drop: 1 / drop)
    assert (wrong != flash_attention.attention(rising, v)).any()


def test_rules_of_unmasked_blocks() -> None:
    assert flash_attention_2.RULES["corrected"](range(4, 6), range(2, 5))
    assert not flash_attention_2.RULES["corrected"](range(4, 6), range(4, 6))
    assert flash_attention_2.unmasked_blocks(lambda r, c: False).status == "REFUTED"
    assert flash_attention_2.unmasked_blocks(lambda r, c: max(c) < min(r)).status == "REFUTED"


def test_products_of_the_backward() -> None:
    assert "2.5 times" in flash_attention_2.matrix_products(3, 5).evidence


def test_causal_rows_against_a_naive_loop() -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 7, 2))
    due = np.empty_like(v)
    for i in range(7):
        p = np.exp([float(q[i] @ k[j]) for j in range(i + 1)])
        due[i] = p @ v[: i + 1] / p.sum()
    for block in (1, 2, 3, 8):
        np.testing.assert_allclose(flash_masks.causal_rows(q, k, v, block), due, rtol=1e-13)


def test_a_window_is_a_band() -> None:
    kept = [[flash_masks.kept(i, j, 3, 5, 1, 0) for j in range(5)] for i in range(3)]
    assert kept == [[j in (i + 1, i + 2) for j in range(5)] for i in range(3)]


def test_merging_by_hand() -> None:
    parts = [(flint.fmpq(3), 1.0), (flint.fmpq(0), -math.inf), (flint.fmpq(1), 0.0)]
    # Masses 2 and 1: (2·3 + 1)/3.
    assert flash_sentinels.merged(parts) == (flint.fmpq(7, 3), flint.fmpq(3, 2))
    assert flash_sentinels.merged([(flint.fmpq(0), -math.inf)] * 2) == (0, 0)
    assert flash_sentinels.merged([*parts, (flint.fmpq(0), math.inf)]) is None


def test_finalisers() -> None:
    for kind in ("FA2", "FA2 split", "FA3"):
        factor, lse = flash_sentinels.finalised(2.0, 1.0, kind)
        assert (factor, lse) == (0.5, 1.0 + math.log(2))
    assert flash_sentinels.finalised(0.0, -math.inf, "FA2") == (1.0, math.inf)
    assert flash_sentinels.finalised(math.nan, 0.0, "FA3") == (0.0, -math.inf)


def test_backward_sum_with_exact_arguments() -> None:
    # Equal logits 0: m·scale = 0, L = ln 8 is rounded, and nothing else is.
    delta, explained = flash_sentinels.backward_sum(np.zeros(8), 0.125)
    assert abs(delta) <= explained
    assert explained == pytest.approx(math.log(8) * 2**-23 + 2**-22, rel=1e-6)
