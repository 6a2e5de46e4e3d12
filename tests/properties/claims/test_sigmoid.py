"""Claims about sigmoid attention, its norms, biases, rows and tanh: held against other computations.

Each check is also shown a world in which its claim is false.
"""

from __future__ import annotations

import math
from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims import sigmoid, sigmoid_rows, sigmoid_symmetries, sigmoid_tanh
from attnproof.properties.contract import Contract, Precision

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Norms and biases


def test_norms_at_zero_logits() -> None:
    finding = sigmoid.norm_at_zero_logits((16, 4096))
    assert finding.status == "HOLDS"
    assert finding.table["norm over softmax's, b = 0"] == [8.0, 2048.0]
    assert finding.table["norm over softmax's, b = −log n"] == [16 / 17, 4096 / 4097]


def test_norms_at_zero_logits_can_be_refuted() -> None:
    finding = sigmoid.norm_at_zero_logits((16, 65536), lambda w, n: Fraction(w, n + 2))
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


def test_the_bound_of_a_rounded_bias_can_be_broken() -> None:
    finding = sigmoid.biases_in_formats((4096, 65536), sigmoid.truncated)
    assert finding.status == "REFUTED"
    # 8 digits of 15.96875, which lies half-way between 15.9375 and 16.
    assert sigmoid.truncated(Fraction(239, 32), 8, -133) == Fraction(239, 32)
    assert sigmoid.truncated(Fraction(511, 32), 8, -133) == Fraction(255, 16)
    assert sigmoid._round(Fraction(511, 32), 8, -133) == 16


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
    finding = sigmoid.kernel_norms(_by_torch, (16, 300, 16384))
    assert finding.status == "SUPPORTED", finding.evidence
    assert len(finding.table["n"]) == 2 * 3 * 3


def test_a_kernel_with_a_bfloat16_bias_is_refuted_in_every_dtype() -> None:
    def rounded(q, k, v, *, scale, bias=None):
        b = -math.log(k.shape[2]) if bias is None else bias
        return _by_torch(q, k, v, scale=scale, bias=float(torch.tensor(b).bfloat16()))

    finding = sigmoid.kernel_norms(rounded, (16384,))
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


def test_rows_whose_mass_is_flat_in_float64() -> None:
    # Two logits 80 apart: Σ σ is 1 to 1e-17 over units of b around b* = 0.
    rows = [torch.tensor([40.0, -40.0], dtype=torch.float64), torch.tensor([60.0, -20.0, -70.0]).double()]
    finding = sigmoid_rows.row_normalising_bias(rows)
    assert finding.status == "SUPPORTED"
    assert finding.table["b*"][0] == pytest.approx(0, abs=2.0**-30)
    with mpmath.workdps(60):
        z = [mpmath.mpf(x) for x in rows[1].tolist()]
        mass = lambda b: mpmath.fsum(1 / (1 + mpmath.exp(-(x + b))) for x in z)
        assert mass(finding.table["b*"][1] - 1e-9) < 1 < mass(finding.table["b*"][1] + 1e-9)


def test_the_bracket_of_the_bias_can_be_broken() -> None:
    # Another function of the bias, whose root is elsewhere.
    rows = sigmoid_rows.normal_rows((17,), (1.0,), 2)
    assert (
        sigmoid_rows.row_normalising_bias(rows, lambda w, b: sigmoid_rows._mass(w, b) + 0.01).status
        == "REFUTED"
    )


def test_doubling() -> None:
    finding = sigmoid_symmetries.doubling()
    assert finding.status == "REFUTED"
    for w, n, ratio in zip(*finding.table.values(), strict=True):
        z = math.log(w)
        pair = 2 * torch.sigmoid(torch.tensor(z - math.log(2 * n), dtype=torch.float64))
        assert ratio == pytest.approx(
            float(pair / torch.sigmoid(torch.tensor(z - math.log(n)).double())), rel=1e-6
        )
    assert [f"{x:.5g}" for x in finding.table["weight of the pair over the key's"][:4]] == [
        "1.3333",
        "1.1111",
        "1.0078",
        "1.0001",
    ]
    assert "keeps it (factor 1)" in finding.evidence
    assert "doubles it (factor 2)" in finding.evidence


def test_the_exponent_of_doubling_against_float64() -> None:
    finding = sigmoid_symmetries.doubling_exponent()
    assert finding.status == "HOLDS"
    z = torch.log(torch.arange(1.0, 129.0, 2.0, dtype=torch.float64))
    for alpha, low, high, _ in zip(*finding.table.values(), strict=True):
        once = len(z) ** -alpha * torch.sigmoid(z).sum()
        twice = (2 * len(z)) ** -alpha * torch.sigmoid(torch.cat([z, z])).sum()
        assert low == pytest.approx(float(twice / once), rel=1e-12) == high


def test_a_bias_that_knows_the_length_has_no_exponent_of_doubling() -> None:
    assert sigmoid_symmetries.doubling_exponent(weigh=sigmoid.weight).status == "REFUTED"


@pytest.mark.parametrize("n", [2, 5])
def test_shifted_scores(n: int) -> None:
    finding = sigmoid_symmetries.shift(n)
    assert finding.status == "REFUTED"
    z = torch.tensor([0.0] * (n - 1) + [math.log(2.0)], dtype=torch.float64)
    expected = [float(torch.sigmoid(z + c - math.log(n))[-1]) for c in (0.0, math.log(2.0))]
    assert finding.table["weight"] == pytest.approx(expected, rel=1e-12)
    assert finding.table["oracle agrees"] == [True, True]


def test_an_oracle_of_another_family_is_noticed() -> None:
    assert sigmoid_symmetries.shift(3, sigmoid_symmetries.softmax, "sigmoid").status == "OPEN"


def test_alibi_in_float64() -> None:
    finding = sigmoid_symmetries.alibi((4,))
    assert finding.status == "REFUTED"
    j = torch.arange(4, dtype=torch.float64) * math.log(2.0)
    masses = [float(torch.sigmoid(s - math.log(4)).sum()) for s in (j - j[3], j)]
    assert [x[0] for x in list(finding.table.values())[1:]] == pytest.approx(masses, rel=1e-12)
    assert sigmoid_symmetries.alibi((4,), sigmoid_symmetries.softmax).status == "HOLDS"


def test_the_definition_against_torch() -> None:
    finding = sigmoid_rows.definition((7, 64))
    assert finding.status == "HOLDS"
    for n, exact, *_ in zip(*finding.table.values(), strict=True):
        k, v, _ = sigmoid_rows._logarithms(n)
        q = torch.tensor([math.log(2.0), 0.0, 0.0, 0.0], dtype=torch.float64)
        p = torch.sigmoid(k[0, 0] @ q / 2 - math.log(n))
        assert float(p @ v[0, 0, :, 0]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    "bias", [lambda n: -math.log2(n), lambda n: 0.0, lambda n: -math.log(n) * (1 + 1e-9)]
)
def test_another_bias_is_another_definition(bias) -> None:
    assert sigmoid_rows.definition((2, 7), bias).status == "REFUTED"


def test_causal_rows() -> None:
    finding = sigmoid_rows.causal_rows(16)
    assert finding.status == "HOLDS"
    assert finding.table["mass"] == [(i + 1) / 17 for i in range(16)]


def test_causal_rows_can_be_refuted() -> None:
    assert sigmoid_rows.causal_rows(16, lambda w, n: Fraction(1, n)).status == "REFUTED"


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


def test_what_instruction_is_used_decides() -> None:
    """The claim runs what the laboratory calls tanh.approx.f32."""

    class Bench:
        effort = "quick"

        def choose(self, quick, default, thorough=None):
            return quick

        def instruction(self, name):
            assert name == "tanh.approx.f32"
            return torch.tanh

    checks = {claim.id: claim.check for claim in sigmoid_tanh.CLAIMS}
    # Of float32, correctly rounded or nearly: no error of 1 %, but the documented bound would allow one.
    assert checks["SIG-11a"](Bench()).status == "CONDITIONAL"
    assert checks["SIG-11b"](Bench()).status == "SUPPORTED"


def test_the_absolute_error_of_sigma_by_tanh() -> None:
    worst = sigmoid_tanh.absolute_error(
        2001, lambda x: torch.tanh(x.double()) * (1 + 2.0**-11), "at the bound"
    )
    assert worst.status == "SUPPORTED"
    assert "1.0000·2⁻¹²" in worst.evidence
    beyond = sigmoid_tanh.absolute_error(2001, lambda x: torch.tanh(x.double()) * (1 + 2.0**-10), "beyond it")
    assert beyond.status == "REFUTED"
    assert sigmoid_tanh.absolute_error(11, lambda x: x * torch.nan, "not a number").status == "REFUTED"
