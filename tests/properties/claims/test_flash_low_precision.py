"""FlashAttention-3's claims, float8, tied maxima: formats and roundings against torch and by hand."""

from __future__ import annotations

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.claims import (
    flash_attention_3,
    flash_errors,
    float8_underflow,
    small_formats,
    tied_maxima,
)
from attnproof.properties.claims.small_formats import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32

TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def exact(x: float) -> flint.fmpq:
    return flint.fmpq(*float(x).as_integer_ratio())


@pytest.mark.parametrize("form", [E4M3, E5M2, BFLOAT16, FLOAT16, FLOAT32], ids=lambda form: form.name)
def test_rounding_as_torch_does(form) -> None:
    rng = np.random.default_rng(0)
    # Within the range, subnormal numbers and ties included; float32 operands, so that torch rounds once.
    x = np.ldexp(rng.integers(1, 2**6, 300), rng.integers(-26, 2, 300)).astype(np.float32)
    x = np.concatenate([x, -x, [0.0]]).astype(float)
    due = torch.tensor(x).float().to(TORCH[form.name]).double().numpy()
    if form.digits <= 26:
        np.testing.assert_array_equal(form.array(x), due)
    assert [float(form.nearest(exact(a)).p) / float(form.nearest(exact(a)).q) for a in x] == list(due)


def test_truncation_and_exponents() -> None:
    for p, q in ((1, 1), (7, 8), (-9, 8), (1, 3), (1023, 1), (1024, 1)):
        x = flint.fmpq(p, q)
        e = small_formats.exponent(x)
        assert flint.fmpq(2) ** e <= abs(x) < flint.fmpq(2) ** (e + 1)
    assert E4M3.truncated(flint.fmpq(-31, 16)) == flint.fmpq(-15, 8)
    assert E4M3.nearest(flint.fmpq(-31, 16)) == -2
    assert E4M3.nearest(10**6) == 448


def test_every_e4m3_number() -> None:
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
    assert [float(x.p) / float(x.q) for x in E4M3.positives()] == codes


def test_hadamard_against_scipy() -> None:
    from scipy.linalg import hadamard

    np.testing.assert_array_equal(flash_attention_3.hadamard(16).astype(int), hadamard(16))
    x = np.array([[flint.fmpq(i * i - 5, 3) for i in range(8)]])
    assert (flash_attention_3.transform(x) == x @ flash_attention_3.hadamard(8)).all()


def test_quantised_blocks() -> None:
    scale, numbers = flash_attention_3.quantised(np.array([[flint.fmpq(3), flint.fmpq(-6)]]))
    assert scale == flint.fmpq(6, 448)
    assert list(numbers[0]) == [224, -448]
    assert flash_attention_3.quantised(np.array([[flint.fmpq(0)]]))[0] == 1


def test_spread_of_outliers_by_kind_of_row() -> None:
    assert flash_attention_3.spread_of_outliers(16, aligned=False, draws=10).status == "SUPPORTED"
    assert flash_attention_3.spread_of_outliers(16, draws=10, outliers=False).status == "REFUTED"


def test_fused_exponent_by_fractions() -> None:
    finding = flash_attention_3.peak_of_p(largest=7)
    assert finding.status == "REFUTED"
    # m = 7 of the counterexample: 2^(−3/2^26) = 1 − 2.07·2⁻²⁶, nearest 1 − 2⁻²⁴ and not 1.
    assert flash_attention_3.peak_of_p(largest=6).status == "HOLDS"
    assert "-3/67108864" in finding.counterexample


def test_attention_in_blocks_is_attention() -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 20, 4))
    due = flash_errors.reference(q, k, v)
    p = np.exp(q @ k.T / 2)
    np.testing.assert_allclose(due, p @ v / p.sum(axis=1, keepdims=True), rtol=1e-12)
    for block in (3, 20):
        found = flash_errors.in_blocks(q, k, v, block, flash_errors.exact, flash_errors.exact)
        np.testing.assert_allclose(found, due, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        flash_errors.baseline(q, k, v, flash_errors.exact), due, rtol=1e-12, atol=1e-14
    )


def test_float8_attention_is_attention_to_its_digits() -> None:
    rng = np.random.default_rng(4)
    q, k, v = (flash_errors.inputs(rng, 64, 16, 0.0) for _ in range(3))
    due = flash_errors.reference(q, k, v)
    turn = flash_errors._hadamard(16) / 4
    for options in ({}, {"block": 16}, {"rotation": turn}, {"naive": True}):
        error = flash_errors.rms(flash_errors.float8(q, k, v, **options) - due)
        assert 1e-3 < error / flash_errors.rms(due) < 0.15, options


def test_counterexample_of_baseline_attention() -> None:
    q, k, v = np.zeros((1, 1)), np.zeros((255, 1)), np.full((255, 1), 1.5)
    store = BFLOAT16.array
    assert flash_errors.in_blocks(q, k, v, 64, store, flash_errors.exact)[0, 0] == 1.5
    assert flash_errors.baseline(q, k, v, store)[0, 0] == 193 / 128


def test_where_accumulators_are_rounded_decides() -> None:
    finding = flash_errors.isolated_forward(((256, 16),))
    assert finding.status == "CONDITIONAL"
    assert finding.table["ratio, S, m, ℓ, O in bfloat16"][0] > 1.3
    assert finding.table["ratio, in float32"][0] < 0.7


def test_gap_and_forward_of_float8() -> None:
    assert float(float8_underflow.gap().mid()) == pytest.approx(6.931471805599453, abs=1e-12)
    s = np.array([[0.0, -6.93, -6.94, -8.0]])
    out, lost, elsewhere = float8_underflow.forward(s, np.ones_like(s), 1, reverse=False, block=4)
    assert (lost, elsewhere) == (0.5, 0.0)
    # In blocks of 2 the second block's two keys, of which −6.94 and −8 vanish, stand elsewhere.
    assert float8_underflow.forward(s, np.ones_like(s), 1, reverse=False, block=2)[2] == 0.5
    assert out[0] == pytest.approx((1 + 2**-9) / np.exp(s).sum(), rel=1e-12)
    assert float8_underflow.forward(s, np.ones_like(s), 256, reverse=False)[1] == 0.0
    assert float8_underflow.normal(1.0) == pytest.approx(0.8413447460685429)


def test_a_formula_off_by_one_is_refuted() -> None:
    assert float8_underflow.fractions(24, shift=-1.0).status == "REFUTED"
    # Within the tolerance of the mean sink, and not of each row's own.
    small = float8_underflow.fractions(48, shift=0.1)
    assert small.status == "REFUTED"


def test_without_a_scale_keys_vanish_outside_the_sinks_block() -> None:
    table = float8_underflow.fractions(24, heights=(10,)).table
    assert table["in reverse, elsewhere"][1] == 0.0
    assert 0.0 < table["in reverse"][1] < 0.01


def test_mean_error_by_hand() -> None:
    # 5, 6, 7 over 4: to 4, 8 (tie, to even), 8.
    assert tied_maxima.mean_error([5], lambda _: 4, 0) == flint.fmpq(-1, 4)
    assert tied_maxima.mean_error([6], lambda _: 4, 0) == flint.fmpq(1, 2)
    assert tied_maxima.mean_error([6], lambda _: 4, -1) == flint.fmpq(-1, 2)
    assert tied_maxima.mean_error([2], lambda _: 4, 0) == flint.fmpq(-1, 2)
    assert tied_maxima.mean_error([7], lambda _: 4, 0) == flint.fmpq(1, 4)


def test_bias_of_pairs_by_torch() -> None:
    a = torch.arange(128, 256) / 64.0
    sums = a[:, None] + a[None, :]
    rest = 2.0**-16
    error = ((sums + rest).bfloat16().float() - sums) * 32
    assert float(error.double().mean()) == 0.25
    assert float((sums.bfloat16().float() - sums).double().mean()) == 0.0
    assert tied_maxima.bias_of_pairs().status == "HOLDS"


def test_bias_by_signs_by_torch() -> None:
    a = torch.arange(128, 256).double() / 64.0
    means = {}
    for first, second in ((1, 1), (-1, -1), (1, -1)):
        sums = first * a[:, None] + second * a[None, :]
        # The rest opposes the sum and is far below half a unit; a float32 holds the sum with it.
        held = (sums - sums.sign() * 2.0**-16).float().bfloat16().double()
        means[first, second] = float(((held - sums) * 32).mean())
    assert means == {(1, 1): -0.25, (-1, -1): 0.25, (1, -1): 0.0}
    table = tied_maxima.bias_by_signs().table
    assert table["mean error, units"] == ["-1/4", "1/4", "0", "0", "0", "0"]
    assert tied_maxima.bias_by_signs(follows=False).table["mean error, units"][1] == "-1/4"


def test_weighted_pairs_by_torch() -> None:
    a = torch.arange(128, 256) / 64.0
    sums = ((a[:, None] + a[None, :]) * (192 / 256)).double()
    held = (sums + 2.0**-16).float().bfloat16().double()
    unit = torch.ldexp(torch.ones_like(sums), torch.frexp(sums)[1] - 8)
    bias = float(((held - sums) / unit).mean())
    assert bias == pytest.approx(0.07530, abs=1e-4)
    assert tied_maxima.weighted_pairs(flint.fmpq(753, 10000)).status == "REFUTED"
    assert tied_maxima.weighted_pairs(flint.fmpq(754, 10000)).status == "HOLDS"


def test_the_adjusted_constant() -> None:
    assert [tied_maxima.adjusted(m) for m in (3.0, -2.0, 0.0)] == [6.0, 0.0, 0.0]
    held = tied_maxima.largest_p((0.0019, 0.0020, 103.9, 104.0)).table["as held"]
    assert held == ["1", "between", "between", "0"]
