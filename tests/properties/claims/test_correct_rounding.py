"""Correct rounding against NumPy's and torch's formats and mpmath; first-order counts by hand."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims import correct_rounding
from attnproof.properties.claims.correct_rounding import BF16, FORMATS, FP16, FP32, Rounded, summed
from attnproof.properties.claims.rounding_counts import Counting, Form, Traced


def numbers() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000) * 2.0 ** rng.integers(-30, 18, 20000)
    ties = np.array(
        [1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, 65519.0, 65520.0, 2.0**-24, 0.0]
    )
    return np.concatenate([x, ties, -ties])


def test_fp16_and_fp32_round_as_numpy_does() -> None:
    x = numbers()
    with np.errstate(over="ignore"):
        assert (FP16.rounded(x) == x.astype(np.float16)).all()
        assert (FP32.rounded(x * 2.0**100) == (x * 2.0**100).astype(np.float32)).all()
        assert (FP32.rounded(x * 2.0**-130) == (x * 2.0**-130).astype(np.float32)).all()


def test_bf16_rounds_as_torch_does() -> None:
    # Through float32 torch rounds once: these are float32 numbers.
    x = torch.from_numpy(numbers()).float()
    assert (BF16.rounded(x.double().numpy()) == x.bfloat16().double().numpy()).all()


def test_limits_of_formats() -> None:
    for form, dtype in zip(FORMATS, (torch.float16, torch.bfloat16, torch.float32), strict=True):
        info = torch.finfo(dtype)
        assert form.largest == info.max
        assert 2.0**form.lowest == info.smallest_normal
        assert form.u == info.eps / 2
        assert form.smallest == info.smallest_normal * info.eps


def test_between_lists_every_number() -> None:
    halves = np.arange(2**15, dtype=np.uint16).view(np.float16).astype(np.float64)
    due = halves[(halves >= 2.0**-14) & (halves <= 3.5)]
    assert (FP16.between(2.0**-14, 3.5) == due).all()


@pytest.mark.parametrize("wide", [False, True])
def test_functions_are_rounded_correctly(monkeypatch, wide) -> None:
    """A bracket of half a unit roundoff leaves many results to Arb."""
    rng = np.random.default_rng(1)
    for form in FORMATS:
        if wide:
            monkeypatch.setattr(correct_rounding, "_BRACKET", form.u / 2)
        r = Rounded(form)
        x = form.rounded(rng.uniform(0.01, 8.0, 60))
        for name, found in (("exp", r.exp(-x)), ("log", r.log(x)), ("log1p", r.log1p(x))):
            sign = -1 if name == "exp" else 1
            with mpmath.workdps(60):
                due = [mpmath.nstr(getattr(mpmath, name)(sign * mpmath.mpf(float(a))), 40) for a in x]
                steps = [form.u * 2.0 ** (np.frexp(float(a))[1]) for a in found]
                for a, step, text in zip(found, steps, due, strict=True):
                    assert abs(mpmath.mpf(float(a)) - mpmath.mpf(text)) <= mpmath.mpf(float(step)) / 2


def test_a_result_beyond_the_largest_number() -> None:
    assert np.isinf(Rounded(FP16).exp(np.array([11.09375])))[0]
    assert np.isfinite(Rounded(FP16).exp(np.array([11.0859375])))[0]
    assert (Rounded(FP16).exp(np.array([-17.34375, -17.328125])) == [0.0, 2.0**-24]).all()


def test_sums_run_from_left_to_right() -> None:
    r = Rounded(FP16)
    terms = [np.array([x]) for x in (2048.0, 1.0, 1.0)]
    assert summed(terms, r)[0] == 2048.0
    assert summed(terms[::-1], r)[0] == 2050.0
    with pytest.raises(ValueError, match="at least one"):
        summed([], r)


def test_counts_by_hand() -> None:
    """(e^a + e^b) + e^c: one rounding each, then two additions for the first terms; then a logarithm."""
    r, entry = Counting(), Traced("entry")
    total = summed([r.exp(entry)] * 3, r)
    assert total.error == Form(one=3)
    assert r.log(total).error == Form(one=3, value=1)
    # e^(x − a): the difference's rounding is multiplied by its size.
    assert r.exp(r.sub(entry, entry)).error == Form(one=1, spread=1)
    with pytest.raises(TypeError, match="entry / entry"):
        r.div(entry, entry)


def test_forms_compare_by_coefficient() -> None:
    assert Form(one=2, off=1).within(Form(one=2, spread=1, log=1))
    assert not Form(one=3).within(Form(one=2, spread=5))
    assert str(Form(one=2, value=1)) == "2 + |y|"
