"""The containment tests can fail: each deliberate fault in an arithmetic is caught where it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import (
    ArbArithmetic,
    Arithmetic,
    Ball,
    EnclosureArithmetic,
    MpmathArithmetic,
)
from tests.properties.arithmetic.containment import ball_contains, enclosure_contains
from tests.properties.arithmetic.regimes import EXACT_OPERATIONS, OPERATIONS, arguments, softmax_attention
from tests.properties.arithmetic.test_containment import edge_ball, shape_of


class Sabotaged(EnclosureArithmetic):
    """float64 enclosures of which one operation is replaced."""

    def __init__(self, operation: str, fault: Callable[[Callable[..., Ball]], Callable[..., Ball]]) -> None:
        super().__init__()
        setattr(self, operation, fault(getattr(self, operation)))


def radius_times(factor: float) -> Callable[[Callable[..., Ball]], Callable[..., Ball]]:
    """The fault of a radius that is too small by a factor."""

    def fault(operation: Callable[..., Ball]) -> Callable[..., Ball]:
        def narrowed(*args: Any) -> Ball:
            right = operation(*args)
            return Ball(right.value, None if right.radius is None else right.radius * factor)

        return narrowed

    return fault


def arguments_taken_exactly(operation: Callable[..., Ball]) -> Callable[..., Ball]:
    """The fault of an operation that bounds its own rounding only and forgets its arguments' radii."""

    def forgetful(*args: Any) -> Ball:
        return operation(*[Ball(a.value) if isinstance(a, Ball) else a for a in args])

    return forgetful


def exact_arguments_hold(arithmetic: EnclosureArithmetic, operation: str) -> bool:
    inputs = arguments(operation, "normal", shape_of(operation), seed=5)
    exact, apply = MpmathArithmetic(50), OPERATIONS[operation][1]
    result = arithmetic.enclosure(apply(arithmetic, *map(arithmetic.exact, inputs)))
    return bool(enclosure_contains(result, apply(exact, *map(exact.exact, inputs))).all())


def inexact_arguments_hold(arithmetic: EnclosureArithmetic, operation: str) -> bool:
    inputs = [a.abs() + 0.5 for a in arguments(operation, "normal", shape_of(operation), seed=5)]
    exact, apply = MpmathArithmetic(50), OPERATIONS[operation][1]
    balls = [edge_ball(a, 2.0**-30, seed=i) for i, a in enumerate(inputs)]
    result = arithmetic.enclosure(apply(arithmetic, *balls))
    return bool(enclosure_contains(result, apply(exact, *map(exact.exact, inputs))).all())


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in EXACT_OPERATIONS])
def test_a_forgotten_rounding_is_caught(operation: str) -> None:
    assert exact_arguments_hold(EnclosureArithmetic(), operation)
    assert not exact_arguments_hold(Sabotaged(operation, radius_times(0.0)), operation)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "scaled"])
def test_a_quarter_of_the_radius_is_caught(operation: str) -> None:
    """The rounding bound is 2u·|v| where u·|v| is attained: half would still hold, a quarter must not."""
    assert not exact_arguments_hold(Sabotaged(operation, radius_times(0.25)), operation)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "step"])
def test_a_forgotten_argument_radius_is_caught(operation: str) -> None:
    assert inexact_arguments_hold(EnclosureArithmetic(), operation)
    assert not inexact_arguments_hold(Sabotaged(operation, arguments_taken_exactly), operation)


@pytest.mark.parametrize(
    "operation",
    [
        *("add", "sub", "mul", "div", "scaled", "exp", "log", "sigmoid", "sigmoid_slope", "sqrt", "relu"),
        *("reshape", "permute"),
    ],
)
def test_half_of_a_carried_radius_is_caught(operation: str) -> None:
    assert not inexact_arguments_hold(Sabotaged(operation, radius_times(0.5)), operation)


def ends_hold(arithmetic: EnclosureArithmetic, operation: str, centre: float, radius: float) -> bool:
    """Whether the image of the ball centre ± radius holds the images of its two ends and of its centre."""
    exact = MpmathArithmetic(50)
    ball = Ball(*(torch.tensor([x], dtype=torch.float64) for x in (centre, radius)))
    stated = arithmetic.enclosure(OPERATIONS[operation][1](arithmetic, ball))
    points = [torch.tensor([centre + s * radius], dtype=torch.float64) for s in (-1, 0, 1)]
    truths = [OPERATIONS[operation][1](exact, exact.exact(point)) for point in points]
    return all(bool(enclosure_contains(stated, truth).all()) for truth in truths)


@pytest.mark.parametrize(
    ("operation", "centre", "radius"),
    [
        *(
            ("sigmoid", centre, radius)
            for centre in (-40.0, -3.0, 0.0, 3.0, 20.0)
            for radius in (2.0**-20, 2.0)
        ),
        *(("sigmoid", centre, 100.0) for centre in (-40.0, -600.0, 40.0)),
        *(
            ("sigmoid_slope", centre, radius)
            for centre in (-40.0, -3.0, 3.0, 40.0)
            for radius in (2.0**-20, 1.0)
        ),
        *(("sigmoid_slope", centre, 2.0**-20) for centre in (-1.0, 0.5)),
        *(("sqrt", centre, radius) for centre in (3.0, 2.0**-1060) for radius in (centre, centre / 2**10)),
        *(("relu", centre, 1.0) for centre in (-0.5, 0.0, 0.5)),
        *(("step", centre, 1.0) for centre in (-0.5, 0.0, 0.5, 1.0)),
    ],
)
def test_bounds_of_wide_balls_hold_and_are_tight(operation: str, centre: float, radius: float) -> None:
    """Two fifths of the radius would no longer reach one of the ball's ends: the bounds are no wild guess.

    Where σ is 1 to within a rounding, the rounding is all there is to its radius: no ball there is taken.
    """
    assert ends_hold(EnclosureArithmetic(), operation, centre, radius)
    assert not ends_hold(Sabotaged(operation, radius_times(0.4)), operation, centre, radius)


def test_a_step_that_forgets_its_argument_radius_is_caught() -> None:
    assert not ends_hold(Sabotaged("step", arguments_taken_exactly), "step", -0.5, 1.0)


def test_a_sigmoid_by_cancellation_is_caught() -> None:
    """1 − σ(−a) is σ(a) in exact numbers, but keeps no digit of it where a ≪ 0."""

    def cancelled(operation: Callable[..., Ball]) -> Callable[..., Ball]:
        def one_minus(a: Ball) -> Ball:
            right = operation(a)
            return Ball(1.0 - torch.sigmoid(-a.value), right.radius)

        return one_minus

    numbers = torch.linspace(-30.0, -20.0, 50, dtype=torch.float64)
    exact = MpmathArithmetic(50)
    truth = exact.sigmoid(exact.exact(numbers))
    for arithmetic, holds in ((EnclosureArithmetic(), True), (Sabotaged("sigmoid", cancelled), False)):
        stated = arithmetic.enclosure(arithmetic.sigmoid(arithmetic.exact(numbers)))
        assert bool(enclosure_contains(stated, truth).all()) is holds


def test_one_faulty_operation_is_caught_in_whole_attention() -> None:
    """A float64 exponential that is wrong in its last digits leaves the enclosure of the whole formula."""
    random = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(24, 8, generator=random, dtype=torch.float64) for _ in range(3))
    exact = MpmathArithmetic(50)
    truth, _ = softmax_attention(exact, q, k, v, 0.3)

    def coarse(operation: Callable[..., Ball]) -> Callable[..., Ball]:
        def rounded(a: Ball) -> Ball:
            right = operation(a)
            return Ball(right.value.to(torch.float32).to(torch.float64), right.radius)

        return rounded

    for arithmetic, holds in ((EnclosureArithmetic(), True), (Sabotaged("exp", coarse), False)):
        output, _ = softmax_attention(arithmetic, q, k, v, 0.3)
        assert bool(enclosure_contains(arithmetic.enclosure(output), truth).all()) is holds


class CentresOnly(ArbArithmetic):
    """Arb balls whose radii are dropped after every exponential."""

    def exp(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        drop = np.frompyfunc(flint.arb.mid, 1, 1)
        return np.asarray(drop(super().exp(a)), dtype=object)


def test_arb_without_its_radii_is_caught() -> None:
    (inputs,) = arguments("exp", "normal", shape_of("exp"), seed=5)
    exact = MpmathArithmetic(50)
    truth = exact.exp(exact.exact(inputs))
    for balls, holds in ((ArbArithmetic(128), True), (CentresOnly(128), False)):
        assert bool(ball_contains(balls.exp(balls.exact(inputs)), truth).all()) is holds


def test_an_inexact_input_is_caught() -> None:
    """An input that passes through float32 is no longer the number that was stored."""
    (inputs,) = arguments("exp", "normal", shape_of("exp"), seed=5)
    exact = MpmathArithmetic(50)
    arithmetics: list[Arithmetic[Any]] = [ArbArithmetic(64), EnclosureArithmetic()]
    for balls in arithmetics:
        through = balls.enclosure(balls.exact(inputs.to(torch.float32)))
        assert not bool(enclosure_contains(through, exact.exact(inputs)).all())
