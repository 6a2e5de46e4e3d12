"""What all three arithmetics promise alike: exact inputs and masks, shapes, edges, errors."""

from __future__ import annotations

import math
from typing import Any

import flint
import mpmath
import pytest
import torch

from attnproof.properties.arithmetic import (
    ArbArithmetic,
    Arithmetic,
    Enclosure,
    EnclosureArithmetic,
    MpmathArithmetic,
)
from tests.properties.arithmetic.regimes import OPERATIONS, REGIMES

ALL = pytest.mark.parametrize(
    "arithmetic",
    [MpmathArithmetic(), ArbArithmetic(), EnclosureArithmetic()],
    ids=lambda arithmetic: arithmetic.name,
)
PROVED = pytest.mark.parametrize(
    "arithmetic", [ArbArithmetic(), EnclosureArithmetic()], ids=lambda arithmetic: arithmetic.name
)
LARGEST = torch.finfo(torch.float64).max
EXTREMES = torch.tensor(
    [0.0, -0.0, 5e-324, -2.5e-310, 2.0**-1022, 1e-300, 1.0, -700.0, 709.9, 1e154, -1e300, LARGEST, -LARGEST],
    dtype=torch.float64,
)


@ALL
@pytest.mark.parametrize("regime", REGIMES)
def test_inputs_are_taken_exactly(arithmetic: Arithmetic[Any], regime: str) -> None:
    numbers = REGIMES[regime](torch.Generator().manual_seed(0), (5, 40))
    stated = arithmetic.enclosure(arithmetic.exact(numbers))
    assert torch.equal(stated.value, numbers)
    assert torch.equal(arithmetic.midpoint(arithmetic.exact(numbers)), numbers)
    if arithmetic.name != "mpmath":
        assert not bool(stated.radius.any())


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_is_taken(arithmetic: Arithmetic[Any], dtype: torch.dtype) -> None:
    numbers = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(arithmetic.enclosure(arithmetic.exact(numbers)).value, numbers.double())


@ALL
@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (torch.tensor([1.0, torch.nan]), ValueError),
        (torch.tensor([1.0, -torch.inf]), ValueError),
        (torch.tensor([1, 2]), TypeError),
        ([1.0, 2.0], TypeError),
    ],
    ids=["nan", "inf", "int", "list"],
)
def test_other_inputs_are_refused(arithmetic: Arithmetic[Any], argument: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"exact\(tensor\)"):
        arithmetic.exact(argument)


@ALL
def test_a_mask_that_is_not_bool_is_refused(arithmetic: Arithmetic[Any]) -> None:
    with pytest.raises(TypeError, match=r"masked\(a, keep\): keep is torch.int64"):
        arithmetic.masked(arithmetic.exact(torch.ones(2)), torch.tensor([0, 1]))


@ALL
def test_masked_entries_are_exact_whatever_they_hid(arithmetic: Arithmetic[Any]) -> None:
    hidden = arithmetic.exp(arithmetic.exact(torch.tensor([1e300, 2.0, -3.0], dtype=torch.float64)))
    keep = torch.tensor([[False, True, False], [False, False, False]])
    stated = arithmetic.enclosure(arithmetic.masked(hidden, keep))
    assert stated.value[~keep].eq(0).all()
    assert float(stated.radius[~keep].max()) <= (2e-323 if arithmetic.name == "mpmath" else 0.0)
    assert abs(float(stated.value[0, 1]) - math.exp(2)) < 1e-14
    filled = arithmetic.enclosure(arithmetic.masked(hidden, keep, fill=-math.inf))
    assert filled.value[~keep].eq(-math.inf).all()
    assert filled.radius[~keep].eq(0).all()


@ALL
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_nan_escapes_at_the_ends_of_float64(arithmetic: Arithmetic[Any], operation: str) -> None:
    count, apply = OPERATIONS[operation]
    if count == 1:
        value = apply(arithmetic, arithmetic.exact(torch.stack([EXTREMES, EXTREMES])))
    elif operation == "matmul":
        pairs = torch.cartesian_prod(EXTREMES, EXTREMES)
        value = apply(arithmetic, arithmetic.exact(pairs), arithmetic.exact(pairs[:20]))
    else:
        value = apply(arithmetic, arithmetic.exact(EXTREMES[:, None]), arithmetic.exact(EXTREMES))
    once = arithmetic.enclosure(value)
    again = arithmetic.enclosure(arithmetic.mul(arithmetic.sub(value, value), value))
    for stated in (once, again):
        assert stated.value.isfinite().all()
        assert not stated.radius.isnan().any()
        assert (stated.radius >= 0).all()


@PROVED
def test_nothing_is_known_past_a_division_by_zero_or_a_logarithm_of_it(arithmetic: Arithmetic[Any]) -> None:
    numbers = arithmetic.exact(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))
    zero = arithmetic.sub(numbers, numbers)
    assert arithmetic.enclosure(arithmetic.div(numbers, zero)).radius.isinf().all()
    assert arithmetic.enclosure(arithmetic.log(numbers)).radius.isinf().tolist() == [True, False, True]


@ALL
def test_shapes_broadcast_as_in_torch(arithmetic: Arithmetic[Any]) -> None:
    a, b = torch.ones(2, 1, 3, 4), torch.ones(5, 4, 2)
    assert arithmetic.shape(arithmetic.matmul(arithmetic.exact(a), arithmetic.exact(b))) == (2, 5, 3, 2)
    assert arithmetic.shape(arithmetic.add(arithmetic.exact(a), arithmetic.exact(torch.ones(5, 1, 4)))) == (
        2,
        5,
        3,
        4,
    )
    assert arithmetic.shape(arithmetic.transpose(arithmetic.exact(a))) == (2, 1, 4, 3)
    assert arithmetic.shape(arithmetic.sum(arithmetic.exact(a))) == (2, 1, 3, 1)
    everything = torch.ones(5, 3, 4, dtype=torch.bool)
    assert arithmetic.shape(arithmetic.masked(arithmetic.exact(a), everything)) == (2, 5, 3, 4)
    scalar = arithmetic.exact(torch.tensor(3.0))
    six = arithmetic.enclosure(arithmetic.scaled(arithmetic.exp(arithmetic.sub(scalar, scalar)), 6.0))
    assert six.value.shape == ()
    assert abs(float(six.value) - 6.0) <= float(six.radius) + 1e-15


@ALL
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["matrix", "batch"])
def test_empty_axes(arithmetic: Arithmetic[Any], batch: tuple[int, ...]) -> None:
    inner = arithmetic.matmul(
        arithmetic.exact(torch.zeros(*batch, 2, 0)), arithmetic.exact(torch.zeros(*batch, 0, 3))
    )
    stated = arithmetic.enclosure(inner)
    assert stated.value.shape == (*batch, 2, 3)
    assert stated.value.eq(0).all()
    total = arithmetic.enclosure(arithmetic.sum(arithmetic.exact(torch.zeros(*batch, 2, 0))))
    assert total.value.shape == (*batch, 2, 1)
    assert total.value.eq(0).all()
    nothing = arithmetic.enclosure(arithmetic.exp(arithmetic.exact(torch.zeros(*batch, 0, 4))))
    assert nothing.radius.shape == (*batch, 0, 4)


@ALL
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_elements_are_taken_by_every_operation(arithmetic: Arithmetic[Any], operation: str) -> None:
    count, apply = OPERATIONS[operation]
    for shape in ((0, 4), (0, 0) if operation == "matmul" else (0, 2)):
        nothing = arithmetic.exact(torch.zeros(shape))
        # Beside an exact value also one that has been computed, and so carries a radius.
        for value in (nothing, arithmetic.exp(nothing)):
            assert arithmetic.enclosure(apply(arithmetic, *[value] * count)).radius.numel() == 0


@ALL
def test_reshape_and_permute_move_elements_as_torch_does(arithmetic: Arithmetic[Any]) -> None:
    numbers = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value, centres in (
        (arithmetic.exact(numbers), numbers),
        (arithmetic.scaled(arithmetic.exact(numbers), 1.0), numbers),
    ):
        radii = arithmetic.enclosure(value).radius
        for shape in ((6, 20), (-1,), (2, 3, -1, 1), (2, -1, 5), (120, 1)):
            stated = arithmetic.enclosure(arithmetic.reshape(value, shape))
            assert torch.equal(stated.value, centres.reshape(shape))
            assert torch.equal(stated.radius, radii.reshape(shape))
        for axes in ((0, 2, 1, 3), (3, 0, 1, 2), (-1, 0, -2, 1), (0, 1, 2, 3)):
            permuted = arithmetic.permute(value, axes)
            stated = arithmetic.enclosure(permuted)
            assert torch.equal(stated.value, centres.permute(axes))
            assert torch.equal(stated.radius, radii.permute(axes))
            again = arithmetic.enclosure(arithmetic.reshape(permuted, (12, 10)))
            assert torch.equal(again.value, centres.permute(axes).reshape(12, 10))
    scalar = arithmetic.reshape(arithmetic.exact(torch.ones(1, 1)), ())
    assert arithmetic.shape(scalar) == arithmetic.shape(arithmetic.permute(scalar, ())) == ()
    nothing = arithmetic.exact(torch.zeros(0, 3))
    assert arithmetic.shape(arithmetic.reshape(nothing, (2, 0, 7))) == (2, 0, 7)
    assert arithmetic.shape(arithmetic.reshape(nothing, (-1, 3))) == (0, 3)


@ALL
@pytest.mark.parametrize("shape", [(5,), (4, -1), (-1, -1), (-2, -3), (0, -1), (7, 0)])
def test_reshape_names_a_shape_that_does_not_fit(arithmetic: Arithmetic[Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"reshape\(a, shape\): shape is \(.*\), a's is \(2, 3\)"):
        arithmetic.reshape(arithmetic.exact(torch.ones(2, 3)), shape)


@ALL
def test_reshape_of_nothing_does_not_guess_a_length(arithmetic: Arithmetic[Any]) -> None:
    with pytest.raises(ValueError, match=r"reshape\(a, shape\)"):
        arithmetic.reshape(arithmetic.exact(torch.ones(2, 0)), (0, -1))


@ALL
@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 2), (1, -1), (0, -3), (0, 1, 2)])
def test_permute_names_axes_that_do_not_fit(arithmetic: Arithmetic[Any], axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"permute\(a, axes\): axes is .*each of the 2 axes"):
        arithmetic.permute(arithmetic.exact(torch.ones(2, 3)), axes)


@ALL
def test_step_and_relu_take_zero_as_pytorch_does(arithmetic: Arithmetic[Any]) -> None:
    numbers = torch.tensor([-1e300, -5e-324, -0.0, 0.0, 5e-324, 3.0], dtype=torch.float64)
    value = arithmetic.exact(numbers)
    assert arithmetic.enclosure(arithmetic.step(value)).value.tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.equal(arithmetic.enclosure(arithmetic.relu(value)).value, numbers.clamp(min=0))


@PROVED
def test_what_is_known_of_a_function_of_the_unknown(arithmetic: Arithmetic[Any]) -> None:
    """A sigmoid, its slope and a step are bounded whatever their argument is; a root and a relu are not."""
    zero = arithmetic.exact(torch.zeros(3, dtype=torch.float64))
    unknown = arithmetic.div(zero, zero)
    for name, low, high in (("sigmoid", 0.0, 1.0), ("sigmoid_slope", 0.0, 0.25), ("step", 0.0, 1.0)):
        stated = arithmetic.enclosure(OPERATIONS[name][1](arithmetic, unknown))
        assert bool((stated.value - stated.radius <= low).all())
        assert bool((stated.value + stated.radius >= high).all())
        assert bool((stated.radius <= 1.01 * (high - low)).all())
    for name in ("sqrt", "relu"):
        assert bool(arithmetic.enclosure(OPERATIONS[name][1](arithmetic, unknown)).radius.isinf().all())
    negative = arithmetic.exact(torch.tensor([-5e-324, 0.0, 4.0], dtype=torch.float64))
    roots = arithmetic.enclosure(arithmetic.sqrt(negative))
    assert roots.radius.isinf().tolist() == [True, False, False]
    assert roots.value[1:].tolist() == [0.0, 2.0]


@ALL
def test_what_is_stored_is_not_rounded_in_exact_arithmetics(arithmetic: Arithmetic[Any]) -> None:
    value = arithmetic.exact(torch.tensor([0.1], dtype=torch.float64))
    for kind in ("scores", "probabilities", "dscores", "lse", "state", "output", "operand"):
        assert arithmetic.store(value, kind) is value


@ALL
def test_matmul_names_the_shapes_that_do_not_fit(arithmetic: Arithmetic[Any]) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"matmul\(a, b\): shapes \(2, 3\) and \(2, 3\)"):
        arithmetic.matmul(arithmetic.exact(torch.ones(2, 3)), arithmetic.exact(torch.ones(2, 3)))


def test_global_precisions_are_left_alone() -> None:
    flint.ctx.prec, mpmath.mp.dps = 77, 23
    try:
        for arithmetic in (MpmathArithmetic(40), ArbArithmetic(200)):
            one: Any = arithmetic.exact(torch.ones(2, 2))
            operated: Any = arithmetic.matmul(one, arithmetic.log(arithmetic.exp(one)))
            arithmetic.enclosure(operated)
            with pytest.raises(ValueError, match="shapes"):
                arithmetic.matmul(one, arithmetic.exact(torch.ones(3, 3)))
        assert (flint.ctx.prec, mpmath.mp.dps) == (77, 23)
    finally:
        flint.ctx.prec, mpmath.mp.dps = 53, 15


def test_too_little_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="digits is 10"):
        MpmathArithmetic(10)
    with pytest.raises(ValueError, match="bits is 24"):
        ArbArithmetic(24)


def test_a_thread_that_flushes_subnormals_is_refused() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(RuntimeError, match="flushes subnormal"):
            EnclosureArithmetic()
    finally:
        torch.set_flush_denormal(False)


def test_values_are_not_changed_by_what_is_computed_from_them() -> None:
    arithmetic = EnclosureArithmetic()
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 6, generator=random, dtype=torch.float64)
    ball = arithmetic.exp(arithmetic.exact(numbers))
    assert ball.radius is not None
    before = (ball.value.clone(), ball.radius.clone(), numbers.clone())
    for count, apply in OPERATIONS.values():
        apply(arithmetic, *[ball] * count)
        apply(arithmetic, *[arithmetic.exact(numbers)] * count)
    assert torch.equal(ball.value, before[0])
    assert torch.equal(ball.radius, before[1])
    assert torch.equal(numbers, before[2])


def test_an_enclosure_is_printed_with_its_radius() -> None:
    value = torch.ones(2, dtype=torch.float64)
    assert repr(Enclosure(value[:1], value[:1] / 8)) == "Enclosure(1 ± 0.12)"
    assert "largest radius 0.12" in repr(Enclosure(value, value / 8))
