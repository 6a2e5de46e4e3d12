"""Claims about sigmoid, batch-normalised, scaled-head and easy attention: held against other computations.

Each check is also shown a world in which its claim is false.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from fractions import Fraction
from itertools import permutations as orders

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims import (
    batch_normalised,
    easy,
    scaled_head,
    sigmoid,
    sigmoid_rows,
    sigmoid_tanh,
)
from attnproof.properties.contract import Contract, Precision

MODULES = (sigmoid, sigmoid_rows, sigmoid_tanh, batch_normalised, scaled_head, easy)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def test_every_run_can_afford_all_of_them() -> None:
    began = time.process_time()
    found = [finding for module in MODULES for finding in module.findings()]
    assert time.process_time() - began < 3.0
    assert len({finding.name for finding in found}) == len(found)
    for finding in found:
        assert finding.status in ("HOLDS", "SUPPORTED", "REFUTED", "CONDITIONAL")
        assert len({len(column) for column in finding.table.values()}) == 1
        plain = (bool, int, float, str)
        assert all(isinstance(x, plain) for column in finding.table.values() for x in column)


# Norms and biases


def test_norms_at_zero_logits() -> None:
    finding = sigmoid.norm_at_zero_logits((16, 4096))
    assert finding.status == "HOLDS"
    assert finding.table["norm over softmax's, b = 0"] == [8.0, 2048.0]
    assert finding.table["norm over softmax's, b = −log n"] == [16 / 17, 4096 / 4097]


def test_norms_at_zero_logits_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid, "weight", lambda w, n: Fraction(w, n + 2))
    finding = sigmoid.norm_at_zero_logits((16, 65536))
    assert finding.status == "REFUTED"
    assert "[16, 65536]" in finding.evidence


@pytest.mark.parametrize("name", DTYPES)
def test_formats_round_as_torch_does(name: str) -> None:
    torch_dtype = DTYPES[name]
    # 24 bits at most: torch goes from float64 to the narrow formats by float32.
    numbers = [math.ldexp(m, e) for m in (1.0, -1.00390625, 1.0009765625, 1.998, 1.5) for e in range(-30, 5)]
    numbers += [float(x) for x in torch.rand(200).tolist()] + [5.0 * 2.0**-26, 6.1e-5, 0.0]
    for number in torch.tensor(numbers).tolist():
        assert float(sigmoid.held(flint.arb(number), name)) == float(torch.tensor(number).to(torch_dtype))


def test_a_ball_across_a_rounding_boundary_is_told() -> None:
    with pytest.raises(ArithmeticError, match="rounding boundary of bfloat16"):
        sigmoid.held(flint.arb(1.00390625, 1e-9), "bfloat16")


def test_a_rounded_bias_moves_the_norm() -> None:
    finding = sigmoid.biases_in_formats()
    assert finding.status == "HOLDS"
    for n, name, mass, change, bound, stored in zip(*finding.table.values(), strict=True):
        bias = torch.tensor(-math.log(n), dtype=torch.float64).float().to(DTYPES[name]).double()
        p = torch.sigmoid(bias)
        assert mass == pytest.approx(n * float(p), rel=1e-12)
        assert change == pytest.approx(float(p) * (n + 1) - 1, abs=1e-12)
        assert abs(change) <= bound
        assert stored == n * float(p.float().to(DTYPES[name]))
    worst = max(abs(x) for x in finding.table["relative change"])
    assert 0.028 < worst < 0.029


def test_the_worst_lengths_for_bfloat16_are_among_those_tried() -> None:
    n = torch.arange(16, 65537, dtype=torch.float64)
    # Torch goes from float64 to bfloat16 by float32: near a midpoint it may round twice.
    mantissa, exponent = torch.frexp(-n.log())
    held = torch.ldexp(torch.round(mantissa * 2.0**8) / 2.0**8, exponent)
    change = (torch.sigmoid(held) * (n + 1) - 1).abs()
    assert f"bfloat16 {float(change.max()):.2g} (n = {int(n[change.argmax()])}," in (
        sigmoid.biases_in_formats().evidence
    )


def test_the_bound_of_a_rounded_bias_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    # One digit fewer than the format is said to have.
    monkeypatch.setattr(sigmoid, "_round", lambda x, digits, smallest: _truncated(x, digits))
    assert sigmoid.biases_in_formats((4096, 65536)).status == "REFUTED"


def _truncated(x: Fraction, digits: int) -> Fraction:
    mantissa, exponent = math.frexp(float(x))
    return Fraction(math.trunc(mantissa * 2**digits)) / 2**digits * Fraction(2) ** exponent


@pytest.mark.parametrize(("deviation", "n"), [(0.5, 16), (1.0, 4096), (3.0, 1024)])
def test_mean_mass_against_quadrature_and_chance(deviation: float, n: int) -> None:
    ball = sigmoid.mean_mass(deviation, n)
    with mpmath.workdps(30):
        truth = mpmath.quad(
            lambda x: mpmath.npdf(x) * n / (1 + n * mpmath.exp(-deviation * x)), mpmath.linspace(-30, 30, 31)
        )
    assert abs(float(ball.mid()) - float(truth)) < 1e-14 * float(truth)
    assert float(ball.rad()) < 1e-15
    x = deviation * np.random.default_rng(0).standard_normal(400_000)
    sample = n / (1 + n * np.exp(-x))
    assert abs(sample.mean() - float(truth)) < 5 * sample.std() / math.sqrt(len(x))


def test_mean_mass_is_half_the_limit_where_n_is_exp_of_the_variance() -> None:
    for s in (1.0, 2.0):
        half = math.exp(s * s / 2) / 2
        assert float(sigmoid.mean_mass(s, math.exp(s * s)).mid()) == pytest.approx(half, rel=1e-14)


def test_the_mass_of_random_logits_is_conditional_on_their_size() -> None:
    assert sigmoid.random_logits().status == "CONDITIONAL"
    assert sigmoid.random_logits((0.0, 0.1), (1024, 65536)).status == "HOLDS"
    assert sigmoid.random_logits((2.0,), (65536,)).status == "REFUTED"
    table = sigmoid.random_logits((1.0,), (4096,)).table
    assert table["mean mass"] == pytest.approx([1.6469226], abs=1e-6)
    assert table["mean mass"][0] < table["e^(s²/2)"][0]


def test_a_wrong_mean_mass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid, "mean_mass", lambda s, n: flint.arb(1.0005))
    assert sigmoid.random_logits((0.01,), (65536,)).status == "REFUTED"


def _by_torch(q, k, v, *, scale, bias=None, sigma=torch.sigmoid):
    b = -math.log(max(k.shape[2], 1)) if bias is None else bias
    p = sigma(q.float() @ k.float().mT * scale + b)
    return (p.to(q.dtype).float() @ v.float()).to(q.dtype)


def test_a_kernels_norms_are_judged_in_every_dtype() -> None:
    finding = sigmoid.kernel_norms(_by_torch, (16, 300, 65536))
    assert finding.status == "SUPPORTED", finding.evidence
    assert len(finding.table["n"]) == 2 * 3 * 3


def test_a_kernel_with_a_bfloat16_bias_is_refuted_in_every_dtype() -> None:
    def rounded(q, k, v, *, scale, bias=None):
        b = -math.log(k.shape[2]) if bias is None else bias
        return _by_torch(q, k, v, scale=scale, bias=float(torch.tensor(b).bfloat16()))

    finding = sigmoid.kernel_norms(rounded, (32768,))
    assert finding.status == "REFUTED"
    over = zip(finding.table["dtype"], finding.table["error over budget"], strict=True)
    assert {dtype for dtype, ratio in over if ratio > 1} == set(DTYPES)


def test_a_kernel_whose_bias_is_a_base_two_logarithm_is_refuted() -> None:
    def other(q, k, v, *, scale, bias=None):
        return _by_torch(q, k, v, scale=scale, bias=-math.log2(k.shape[2]) if bias is None else bias)

    assert sigmoid.kernel_norms(other, (16,)).status == "REFUTED"


def test_a_nan_is_no_small_ratio() -> None:
    finding = sigmoid.kernel_norms(lambda q, k, v, **_: torch.full_like(q, torch.nan), (16,))
    assert finding.status == "REFUTED"


def test_a_kernel_is_judged_by_what_it_declares() -> None:
    def coarse(q, k, v, *, scale, bias=None):
        return _by_torch(q, k, v, scale=scale, bias=bias, sigma=lambda s: torch.sigmoid(s).bfloat16().float())

    loose = Contract("sigmoid", precision=Precision(probabilities="bfloat16"))
    assert sigmoid.kernel_norms(coarse, (16,), (torch.float32,)).status == "REFUTED"
    assert sigmoid.kernel_norms(coarse, (16,), (torch.float32,), loose).status == "SUPPORTED"


# Rows


def test_the_bias_that_normalises_rows() -> None:
    finding = sigmoid_rows.row_normalising_bias()
    assert finding.status == "SUPPORTED"
    rows = sigmoid_rows.normal_rows()
    columns = finding.table
    for z, low, lse, b, high in zip(
        rows, columns["lower end"], columns["−LSE"], columns["b*"], columns["upper end"], strict=True
    ):
        with mpmath.workdps(30):
            root = mpmath.findroot(
                lambda x, z=z: mpmath.fsum(1 / (1 + mpmath.exp(-(t + x))) for t in z.tolist()) - 1, b
            )
        assert abs(float(root) - b) < 1e-10
        assert lse == pytest.approx(-float(torch.logsumexp(z, 0)), abs=1e-12)
        assert low - 1e-12 <= b <= high + 1e-12
        assert b > lse
        assert (high - low < 1e-12) == bool((z == z[0]).all())


def test_the_bracket_of_the_bias_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    mass = sigmoid_rows._mass
    # Another function of the bias, whose root is elsewhere.
    monkeypatch.setattr(
        sigmoid_rows, "_mass", lambda weights, factor: mass(weights, factor) + flint.arb(0.01)
    )
    assert sigmoid_rows.row_normalising_bias(sigmoid_rows.normal_rows((17,), (1.0,), 2)).status == "REFUTED"


def test_doubling() -> None:
    finding = sigmoid_rows.doubling()
    assert finding.status == "REFUTED"
    for w, n, ratio in zip(*finding.table.values(), strict=True):
        z = math.log(w)
        pair = 2 * torch.sigmoid(torch.tensor(z - math.log(2 * n), dtype=torch.float64))
        assert ratio == pytest.approx(
            float(pair / torch.sigmoid(torch.tensor(z - math.log(n)).double())), rel=1e-6
        )
    assert [f"{x:.5g}" for x in finding.table["weight of the pair over the key's"][:3]] == [
        "1.1111",
        "1.0078",
        "1.0001",
    ]
    assert "keeps it (factor 1)" in finding.evidence
    assert "doubles it (factor 2)" in finding.evidence


def test_doubling_would_hold_for_a_weight_that_divides_by_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid_rows, "weight", lambda w, n: Fraction(w) / (Fraction(w) + 1) / n)
    assert sigmoid_rows.doubling().status == "HOLDS"


def test_shifted_scores() -> None:
    finding = sigmoid_rows.shift(4)
    assert finding.status == "REFUTED"
    j = torch.arange(4, dtype=torch.float64) * math.log(2.0)
    masses = [torch.sigmoid(s - math.log(4)).sum() for s in (j * 0, j * 0 + math.log(2.0), j - j[3], j)]
    assert finding.table["output"] == pytest.approx([float(x) for x in masses], rel=1e-12)


def test_shifted_scores_would_be_open_for_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid_rows, "weight", lambda w, n: Fraction(1, n))
    assert sigmoid_rows.shift(4).status == "OPEN"


def test_causal_rows() -> None:
    finding = sigmoid_rows.causal_rows(16)
    assert finding.status == "HOLDS"
    assert finding.table["mass"] == [(i + 1) / 17 for i in range(16)]


def test_causal_rows_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid_rows, "weight", lambda w, n: Fraction(1, n))
    assert sigmoid_rows.causal_rows(16).status == "REFUTED"


# tanh.approx


def test_what_the_documented_bound_allows() -> None:
    for n, percent in ((64, 1.5), (256, 6.2), (1024, 25.0), (2048, 50.0), (4096, 100.0), (16384, 400.0)):
        tanh = mpmath.tanh(-mpmath.log(n) / 2)
        error = abs(tanh) * mpmath.mpf(2) ** -11 / 2 / (1 / (1 + mpmath.mpf(n)))
        assert float(sigmoid_tanh.allowed(n)) == pytest.approx(float(error), rel=1e-12)
        assert float(sigmoid_tanh.allowed(n)) * 100 == pytest.approx(percent, abs=0.1)
    assert sigmoid_tanh.first_zero() == 4097


def test_a_tanh_of_eleven_digits_keeps_the_documented_bound() -> None:
    x = torch.linspace(-12.0, 12.0, 20_001)
    error = (sigmoid_tanh.rounded_tanh(x) / torch.tanh(x.double()) - 1.0).abs()
    assert float(error.nan_to_num().max()) <= 2.0**-11
    assert float(error[x.abs() > 1].max()) > 2.0**-13


def test_sigma_by_tanh_of_eleven_digits_against_rationals() -> None:
    table = sigmoid_tanh.tanh_form((64, 100, 1000, 3000, 10000)).table
    for n, at in zip(table["n"], table["a tanh rounded to 11 digits, at n"], strict=True):
        # tanh(−log n / 2) = (1 − n)/(1 + n); 11 digits below 1 are multiples of 2⁻¹¹.
        tanh = Fraction(round(Fraction(1 - n, 1 + n) * 2**11), 2**11)
        assert at == pytest.approx(float(abs((1 + tanh) / 2 * (n + 1) - 1)), abs=1e-9)


def test_sigma_by_tanh_approx() -> None:
    finding = sigmoid_tanh.tanh_form()
    assert finding.status == "REFUTED"
    worst = finding.table["a tanh rounded to 11 digits, largest up to n"]
    limits = finding.table["allowed by the bound of tanh.approx"]
    # σ = 0 is an error of 1, whatever n; before that half of what the bound allows.
    assert all(error <= limit for error, limit in zip(worst, limits, strict=True))
    assert worst == sorted(worst)
    assert worst[-1] == 1.0
    exact = lambda x: torch.tanh(x.double())
    assert sigmoid_tanh.tanh_form(tanh=exact, name="tanh").status == "CONDITIONAL"
    assert sigmoid_tanh.tanh_form((16, 32), tanh=exact, name="tanh").status == "HOLDS"


def test_the_exponential_form_keeps_its_bound() -> None:
    n = torch.arange(16, 65537, 7)
    x = (-n.double().log()).float()
    sigma = 1.0 / (1.0 + torch.exp2(-x * math.log2(math.e)))
    error = (sigma.double() * (n + 1) - 1.0).abs()
    assert float(error.max()) < max(sigmoid_tanh.exponential(int(k)) for k in n[-2:])


# Attention-BN


def test_centring() -> None:
    assert batch_normalised.centring().status == "HOLDS"
    draw = next(iter(batch_normalised.draws(1)))
    q, k = draw.q[0, 0], draw.k[0, 0]
    beta, mean = float(draw.beta), k.mean(0)
    expected = (q - beta * mean) @ (k - 0.5 * mean).T
    found = torch.tensor([[float(x) for x in row] for row in draw.scores(draw.beta, Fraction(1, 2))]).double()
    torch.testing.assert_close(found, expected)
    assert not batch_normalised.same_softmax(draw.scores(draw.beta, 0), draw.scores(0, 0))


def test_attention_bn_is_softmax_with_a_key_bias_in_plain_torch() -> None:
    for draw in batch_normalised.draws():
        bias = torch.tensor([float(x) for x in draw.key_bias()], dtype=torch.float64)
        plain = torch.softmax(draw.q @ draw.k.mT + bias, -1) @ draw.v
        torch.testing.assert_close(draw.normalised(variance=False).value, plain, atol=1e-12, rtol=1e-12)


def test_centring_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = batch_normalised.Draw.key_bias
    monkeypatch.setattr(batch_normalised.Draw, "key_bias", lambda self: [2 * x for x in bias(self)])
    finding = batch_normalised.centring()
    assert finding.status == "REFUTED"
    assert "keys centred alone 4, key bias −βμ·k_j 0, oracle, key bias 0" in finding.evidence


def test_a_common_shift_needs_beta_one() -> None:
    assert batch_normalised.common_shift().status == "CONDITIONAL"
    ones = [replace(draw, beta=Fraction(1)) for draw in batch_normalised.draws()]
    assert batch_normalised.common_shift(ones).status == "HOLDS"


def test_a_common_shift_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Softmax attention in the family's place.
    monkeypatch.setattr(
        batch_normalised.Draw, "normalised", lambda self, shift=0.0, *, variance=True: self.softmax(shift)
    )
    assert batch_normalised.common_shift().status == "REFUTED"


# Attention-SH


def test_constant_windows() -> None:
    finding = scaled_head.constant_windows()
    assert finding.status == "CONDITIONAL"
    assert scaled_head.constant_windows((1, 2, 3, 4), 12, 24).status == "HOLDS"


def test_a_shorter_last_window_weighs_as_much_as_the_others() -> None:
    # Three keys alike in windows of 2: half for the last one, which has a third in softmax attention.
    q, k = torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 3, 1).double()
    v = torch.tensor([0.0, 0.0, 1.0]).double().reshape(1, 1, 3, 1)
    pooled = batch_normalised.outputs("scaled_head", q, k, v, scale=1.0, pool=(2,))
    softmax = batch_normalised.outputs("softmax", q, k, v, scale=1.0)
    assert float(pooled.value) == 0.5
    assert float(softmax.value) == pytest.approx(1 / 3)
    assert batch_normalised.apart(pooled, softmax) == pytest.approx(1 / 6)


def test_windows_are_constant_where_asked_only() -> None:
    _, k, _ = scaled_head.in_windows(12, (1, 3), constant=True)
    assert torch.equal(k[0, 1, 0], k[0, 1, 2])
    assert not torch.equal(k[0, 1, 2], k[0, 1, 3])
    assert not torch.equal(k[0, 0, 0], k[0, 0, 1])
    _, k, _ = scaled_head.in_windows(12, (1, 3), constant=False)
    assert not torch.equal(k[0, 1, 0], k[0, 1, 2])


def test_constant_windows_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = scaled_head.in_windows
    monkeypatch.setattr(
        scaled_head, "in_windows", lambda n, pool, *, constant: drawn(n, pool, constant=False)
    )
    assert scaled_head.constant_windows().status == "REFUTED"


# Easy attention


def test_easy_attention_superposes() -> None:
    assert easy.linearity().status == "HOLDS"


def test_superposition_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = easy._easy
    monkeypatch.setattr(easy, "_easy", lambda alpha, v, band: outputs(alpha, v, band).clamp(min=0.0))
    assert easy.linearity().status == "REFUTED"


def test_a_frozen_softmax_is_easy_attention() -> None:
    assert easy.frozen_softmax().status == "HOLDS"


def test_a_frozen_softmax_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = easy.outputs

    def other(family, *tensors, **options):
        found = outputs(family, *tensors, **options)
        return replace(found, value=found.value + 1e-9) if family == "easy" else found

    monkeypatch.setattr(easy, "outputs", other)
    assert easy.frozen_softmax().status == "REFUTED"


def test_easy_attention_belongs_to_positions() -> None:
    finding = easy.permutations()
    assert finding.status == "REFUTED"
    assert finding.table["equivariant"] == [False, True, True, True]


def test_only_a_constant_off_the_diagonal_commutes_with_all_permutations() -> None:
    # The commutant of all permutation matrices of 4 tokens: dimension 2, spanned by I and 11ᵀ.
    conditions = []
    for order in orders(range(4)):
        p = torch.eye(4, dtype=torch.float64)[list(order)]
        conditions.append(
            torch.kron(p, torch.eye(4).double()) - torch.kron(torch.eye(4).double(), p.T.contiguous())
        )
    assert 16 - int(torch.linalg.matrix_rank(torch.cat(conditions))) == 2


def test_permuted_tokens_would_be_open_for_a_symmetric_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = easy._integers
    monkeypatch.setattr(
        easy,
        "_integers",
        lambda *shape, seed: drawn(*shape, seed=seed) if len(shape) == 4 else torch.ones(shape).double(),
    )
    assert easy.permutations().status == "OPEN"


def test_ranks() -> None:
    finding = easy.ranks()
    assert finding.status == "CONDITIONAL"
    assert finding.table == {"matrix": ["QKᵀ", "α", "P"], "rank": [4, 24, 24]}
    q, k = (easy._integers(24, 4, seed=seed) for seed in (12, 13))
    assert int(torch.linalg.matrix_rank(q @ k.T)) == 4
    with mpmath.workdps(60):
        p = mpmath.matrix((q @ k.T / 4).tolist()).apply(mpmath.exp)
        assert abs(mpmath.det(p)) > 1e-30


def test_ranks_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy, "_integers", lambda *shape, seed: torch.ones(shape).double())
    assert easy.ranks().status == "REFUTED"
