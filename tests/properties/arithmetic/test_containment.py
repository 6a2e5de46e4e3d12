"""The exact result lies in every enclosure: by operation, for whole attention, at several precisions.

mpmath is the witness: its operations are rounded correctly, or nearly so, at a precision above the balls'.
More than 100,000 random elements are held against both arithmetics that claim a proof.
"""

from __future__ import annotations

import math
from itertools import permutations

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, Ball, EnclosureArithmetic, MpmathArithmetic
from tests.properties.arithmetic.containment import ball_contains, enclosure_contains, widest_ulps
from tests.properties.arithmetic.regimes import MODERATE, OPERATIONS, REGIMES, arguments, softmax_attention

# (mpmath digits, Arb bits): the balls are narrower than no mpmath error at the same line.
PRECISIONS = [
    pytest.param(30, 64, id="30-digits"),
    pytest.param(50, 128, id="50-digits"),
    pytest.param(100, 256, id="100-digits"),
]
ELEMENTWISE = (4, 300)


def shape_of(operation: str) -> tuple[int, int]:
    """Operations that reduce get more rows, so that each yields some hundred results."""
    return {"sum": (100, 7), "matmul": (20, 6)}.get(operation, ELEMENTWISE)


@pytest.mark.parametrize(("digits", "bits"), PRECISIONS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_encloses_the_exact_result(
    operation: str, regime: str, digits: int, bits: int
) -> None:
    inputs = arguments(operation, regime, shape_of(operation), seed=digits)
    apply = OPERATIONS[operation][1]
    exact, balls, fast = MpmathArithmetic(digits), ArbArithmetic(bits), EnclosureArithmetic()
    truth = apply(exact, *map(exact.exact, inputs))
    ball = apply(balls, *map(balls.exact, inputs))
    quick = fast.enclosure(apply(fast, *map(fast.exact, inputs)))
    known = torch.tensor([bool(exact.context.isfinite(x)) for x in truth.ravel()]).reshape(truth.shape)
    assert bool((ball_contains(ball, truth) | ~known).all())
    assert bool((enclosure_contains(balls.enclosure(ball), truth) | ~known).all())
    assert bool((enclosure_contains(quick, truth) | ~known).all())
    # Where the definition divides by zero nothing may be claimed.
    assert bool(quick.radius[~known].isinf().all())
    assert bool(balls.enclosure(ball).radius[~known].isinf().all())


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_radii_of_the_arguments_are_carried_on(operation: str, regime: str) -> None:
    """Each argument is a float64 ball with the exact number on its edge; the result must stay inside."""
    inputs = arguments(operation, regime, shape_of(operation), seed=7)
    apply = OPERATIONS[operation][1]
    exact, fast = MpmathArithmetic(50), EnclosureArithmetic()
    truth = apply(exact, *map(exact.exact, inputs))
    for relative in (2.0**-40, 2.0**-8, 0.75):
        result = fast.enclosure(apply(fast, *[edge_ball(a, relative, seed=i) for i, a in enumerate(inputs)]))
        known = torch.tensor([bool(exact.context.isfinite(x)) for x in truth.ravel()]).reshape(truth.shape)
        assert bool((enclosure_contains(result, truth) | ~known).all())
        assert bool(result.radius[~known].isinf().all())


@pytest.mark.parametrize(
    "regimes", list(permutations(("normal", "huge", "tiny", "subnormal"), 2)), ids="-".join
)
@pytest.mark.parametrize("operation", [name for name, (count, _) in OPERATIONS.items() if count == 2])
def test_bounds_that_underflow_on_the_way_still_hold(operation: str, regimes: tuple[str, ...]) -> None:
    """Arguments of unlike size: what a bound lost to underflow, the other argument may magnify."""
    apply = OPERATIONS[operation][1]
    exact, fast = MpmathArithmetic(50), EnclosureArithmetic()
    shape = (10, 6) if operation == "matmul" else (4, 50)
    a, b = (arguments(operation, regime, shape, seed=i)[0] for i, regime in enumerate(regimes))
    truth = apply(exact, exact.exact(a), exact.exact(b))
    known = torch.tensor([bool(exact.context.isfinite(x)) for x in truth.ravel()]).reshape(truth.shape)
    balls = [
        (Ball(a, torch.zeros_like(a)), Ball(b, torch.zeros_like(b))),
        (Ball(a), edge_ball(b, 0.75, seed=1)),
        (edge_ball(a, 0.75, seed=0), Ball(b)),
    ]
    for left, right in balls:
        stated = fast.enclosure(apply(fast, left, right))
        assert bool((enclosure_contains(stated, truth) | ~known).all())


def edge_ball(inside: torch.Tensor, relative: float, seed: int) -> Ball:
    """A float64 ball about a displaced centre whose edge is ``inside``, or a rounding beyond."""
    random = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, inside.shape, generator=random).to(torch.float64) - 1.0
    value = (inside * (1.0 + relative * signs)).clamp(
        -torch.finfo(torch.float64).max, torch.finfo(torch.float64).max
    )
    distance = (inside - value).abs()
    return Ball(value, torch.nextafter(distance, torch.full_like(distance, math.inf)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_radii_of_ordinary_numbers_are_a_few_ulps(operation: str) -> None:
    """An enclosure that holds because it is enormous would prove nothing."""
    fast = EnclosureArithmetic()
    inputs = [a.abs() + 0.5 for a in arguments(operation, "normal", shape_of(operation), seed=3)]
    result = fast.enclosure(OPERATIONS[operation][1](fast, *map(fast.exact, inputs)))
    if operation in ("sub", "log"):
        assert float(result.radius.max()) <= 2.0**-50
    else:
        assert widest_ulps(result) <= {"matmul": 12, "sum": 14, "sigmoid_slope": 9}.get(operation, 5)


WIDE_CENTRES = (*(sign * 2.0**e for sign in (-1, 1) for e in (-1070, -60, -3, 0, 2, 5, 9, 9.5, 1000)), 0.0)
WIDE_RADII = (0.0, *(2.0**e for e in (-1074, -300, -50, -20, -2, 0, 1, 4, 8, 9.6, 1023)))


@pytest.mark.parametrize("operation", ["sigmoid", "sigmoid_slope", "sqrt", "relu", "step"])
def test_wide_balls_hold_the_images_of_all_their_points(operation: str) -> None:
    """Balls of every width about every centre, on one side of 0, touching it and across it."""
    centres = torch.tensor(WIDE_CENTRES, dtype=torch.float64)[:, None]
    radii = torch.tensor(WIDE_RADII, dtype=torch.float64)
    centres, radii = torch.broadcast_tensors(torch.cat([centres, -centres * 0.7]), radii)
    touching = torch.stack([centres[:, 0], centres[:, 0].abs()])
    centres, radii = (torch.cat([a.flatten(), b]) for a, b in zip((centres, radii), touching, strict=True))
    # Digits enough for a point of a ball, from 2^1024 down to 2^-1104, to be exact.
    exact, balls, fast = MpmathArithmetic(700), ArbArithmetic(192), EnclosureArithmetic()
    apply = OPERATIONS[operation][1]
    quick = fast.enclosure(apply(fast, Ball(centres, radii)))
    about_zero = np.array([flint.arb(0, r) for r in radii.tolist()], dtype=object)
    proved = apply(balls, balls.add(balls.exact(centres), about_zero))
    across = torch.zeros_like(centres, dtype=torch.bool)
    for fraction in (-1.0, -0.875, -0.5, -(2.0**-30), 0.0, 2.0**-30, 0.25, 1.0):
        point = exact.add(exact.exact(centres), exact.exact(radii * fraction))
        truth = apply(exact, point)
        known = torch.tensor([bool(exact.context.isfinite(x)) for x in truth])
        across |= ~known
        assert bool((enclosure_contains(quick, truth) | ~known).all())
        assert bool((ball_contains(proved, truth) | ~known).all())
        assert bool((enclosure_contains(balls.enclosure(proved), truth) | ~known).all())
    assert bool(quick.radius[across].isinf().all())
    assert bool(balls.enclosure(proved).radius[across].isinf().all())
    if operation in ("sigmoid", "sigmoid_slope", "step"):
        for stated in (quick, balls.enclosure(proved)):
            assert float(stated.radius.max()) <= {"sigmoid_slope": 0.26}.get(operation, 1.01)
    if operation == "sqrt":
        assert bool(quick.radius[(centres >= radii)].isfinite().all())


@pytest.mark.parametrize("arithmetic", [ArbArithmetic(64), EnclosureArithmetic()], ids=lambda a: a.name)
@pytest.mark.parametrize(("operation", "tail"), [("sigmoid", (-1,)), ("sigmoid_slope", (-1, 1))])
def test_the_tails_of_the_sigmoid_keep_their_relative_accuracy(
    arithmetic: ArbArithmetic | EnclosureArithmetic, operation: str, tail: tuple[int, ...]
) -> None:
    for sign in tail:
        numbers = sign * torch.tensor([20.0, 40.0, 300.0, 700.0], dtype=torch.float64)
        stated = arithmetic.enclosure(OPERATIONS[operation][1](arithmetic, arithmetic.exact(numbers)))
        assert bool((stated.radius <= 2.0**-49 * stated.value).all())


@pytest.mark.parametrize(("digits", "bits"), PRECISIONS)
@pytest.mark.parametrize("regime", REGIMES)
def test_attention_and_its_logsumexp_are_enclosed(regime: str, digits: int, bits: int) -> None:
    exact, balls, fast = MpmathArithmetic(digits), ArbArithmetic(bits), EnclosureArithmetic()
    random = torch.Generator().manual_seed(digits)
    draw = REGIMES[regime]
    if regime in ("huge", "wide"):
        # Scores beyond the largest float64: only the values may be as large as that.
        q, k = (REGIMES["normal"](random, (2, 12, 8)) * 40.0 for _ in range(2))
        v = draw(random, (2, 12, 5))
    else:
        q, k, v = draw(random, (2, 9, 8)), draw(random, (2, 12, 8)), draw(random, (2, 12, 5))
    truths = softmax_attention(exact, q, k, v, 0.3)
    for truth, ball, quick in zip(
        truths, softmax_attention(balls, q, k, v, 0.3), softmax_attention(fast, q, k, v, 0.3), strict=True
    ):
        assert bool(enclosure_contains(balls.enclosure(ball), truth).all())
        assert bool(enclosure_contains(fast.enclosure(quick), truth).all())
        assert bool(fast.enclosure(quick).radius.isfinite().all()) or regime in ("huge", "wide")


@pytest.mark.parametrize("regime", MODERATE)
def test_twice_the_precision_moves_nothing_outside_the_radius(regime: str) -> None:
    random = torch.Generator().manual_seed(11)
    q, k, v = (REGIMES[regime](random, shape) for shape in ((16, 8), (20, 8), (20, 6)))
    for low, high in (
        (MpmathArithmetic(30), MpmathArithmetic(60)),
        (MpmathArithmetic(50), MpmathArithmetic(100)),
    ):
        for coarse, fine in zip(
            softmax_attention(low, q, k, v, 0.3), softmax_attention(high, q, k, v, 0.3), strict=True
        ):
            assert bool(enclosure_contains(low.enclosure(coarse), fine).all())
    for few, many in ((ArbArithmetic(64), ArbArithmetic(128)), (ArbArithmetic(128), ArbArithmetic(256))):
        for coarse, fine in zip(
            softmax_attention(few, q, k, v, 0.3), softmax_attention(many, q, k, v, 0.3), strict=True
        ):
            assert all(a.overlaps(b) for a, b in zip(coarse.ravel(), fine.ravel(), strict=True))
            assert bool((many.enclosure(fine).radius <= few.enclosure(coarse).radius).all())
