"""Max–min polynomials compiled to ReLU encoders, and the walk along a line, against plain computations."""

from __future__ import annotations

import random
from fractions import Fraction

import flint
import pytest

from attnproof.properties.claims import curved_partitions, spline_converse
from attnproof.properties.forms import line_cells, relu_encoder
from attnproof.properties.forms.relu_encoder import Germ, compiled, maximum, minimum, variables


def rational(x: Fraction) -> flint.fmpq:
    return flint.fmpq(x.numerator, x.denominator)


@pytest.mark.parametrize(
    ("build", "plain"),
    [
        (lambda x, y: x * y - 3, lambda x, y: x * y - 3),
        (lambda x, y: maximum(x, y) * minimum(x, y), lambda x, y: x * y),
        (
            lambda x, y: maximum(minimum(x * x, y), 1 - x * y, -2),
            lambda x, y: max(min(x * x, y), 1 - x * y, -2),
        ),
        (lambda x, y: maximum(x * maximum(y, 0), y * y * y), lambda x, y: max(x * max(y, 0), y**3)),
        (lambda x, y: maximum(x, x) + 0 * y, lambda x, y: x),
    ],
)
def test_an_encoder_computes_what_it_was_compiled_from(build, plain) -> None:
    draw = random.Random(3)
    encoder = compiled(build(*variables(2)), 2)
    for _ in range(30):
        point = [Fraction(draw.randint(-9, 9), draw.randint(1, 5)) for _ in range(2)]
        assert encoder([rational(x) for x in point]) == rational(Fraction(plain(*point)))


def test_germs_see_the_side_they_come_from() -> None:
    (t,) = variables(1)
    f = maximum(t * t - 1, 0)
    here = flint.fmpq_poly([1, 1])
    assert compiled(f, 1)([Germ(here)]).polynomial == flint.fmpq_poly([0, 2, 1])
    assert compiled(f, 1)([Germ(flint.fmpq_poly([1, -1]))]).polynomial == flint.fmpq_poly([])


def test_the_cells_of_a_known_function() -> None:
    # t² − 2 up to −√2 and from √2 on, 0 between; the walk meets both roots.
    (t,) = variables(1)
    f = maximum(t * t - 2, 0)
    found = line_cells.cells(lambda x, seen: (f.value([x], seen),))
    assert [str(cell.polynomials[0]) for cell in found] == ["x^2 + (-2)", "0", "x^2 + (-2)"]
    assert found[0].high is not None
    assert found[0].high.same(found[1].low)
    assert abs(float(found[1].high.ball.mid()) - 2**0.5) < 1e-12
    assert not found[0].high.same(found[1].high)


def test_rational_breakpoints_and_near_ones_are_told_apart() -> None:
    (t,) = variables(1)
    small = flint.fmpq(1, 10**6)
    f = maximum(t - 5, 0) + maximum(t - 5 - small, 0)
    found = line_cells.cells(lambda x, seen: (f.value([x], seen),))
    slopes = [int(cell.polynomials[0].degree() > 0 and cell.polynomials[0][1]) for cell in found]
    assert slopes == [0, 1, 2]


def test_a_compiler_that_forgets_the_second_head_is_found(monkeypatch) -> None:
    honest = relu_encoder._Compiler.product
    monkeypatch.setattr(relu_encoder._Compiler, "product", lambda *x: honest(*x)[:1])
    finding = spline_converse.compiler(4, 1, 0)
    assert finding.status == "REFUTED"
    assert " at (" in finding.counterexample


def test_a_difference_on_a_far_cell_is_found_by_the_walk() -> None:
    # The encoder of another function, equal at all points tried but those beyond 1000.
    (t,) = variables(1)
    right, wrong = maximum(t, 0), maximum(t, 0) + maximum(t - 1000, 0)
    found = spline_converse._equal_along(compiled(wrong, 1), right, [flint.fmpq(0)], [flint.fmpq(1)])
    unequal = [cell for cell in found if cell.polynomials[0] != cell.polynomials[1]]
    assert len(unequal) == 1
    assert float(unequal[0].low.ball.mid()) == 1000


def test_random_splines_are_as_smooth_as_they_say() -> None:
    breaks, pieces = spline_converse.random_spline(5, 3, 4, 2)
    for b, left, right in zip(breaks, pieces, pieces[1:], strict=False):
        for _ in range(3):
            assert left(b) == right(b)
            left, right = left.derivative(), right.derivative()
        assert left(b) != right(b)


def test_piece_and_encoder_of_a_spline() -> None:
    breaks, pieces = spline_converse.random_spline(2, 3, 2, 0)
    encoder = compiled(spline_converse._truncated((breaks, pieces)), 1)
    for i in range(-30, 60):
        t = flint.fmpq(i, 7)
        assert encoder([t]) == pieces[sum(bool(b <= t) for b in breaks)](t)


def test_the_constant_of_the_lattice_form_is_sharp() -> None:
    quarter = flint.fmpq(1, 4)
    assert spline_converse.head_as_lattice(1, bound=quarter).status == "HOLDS"
    assert spline_converse.head_as_lattice(1, bound=quarter - flint.fmpq(1, 100)).status == "REFUTED"


def test_a_weak_cap_is_seen_on_lines_too(monkeypatch) -> None:
    # c = −20 spoils the form on whole intervals, whatever the certificate says.
    finding = spline_converse.head_as_lattice(6, bound=-20)
    assert finding.table["line cells"] > finding.table["equal"]


def test_kinks_of_a_parabola_need_many_lines() -> None:
    finding = curved_partitions.encoders_beyond_hyperplanes(5)
    assert finding.table["y of the kink"] == ["0", "1", "4", "9", "16"]
    x, y = variables(2)
    smooth = curved_partitions.encoders_beyond_hyperplanes(3, x * x - y)
    assert smooth.status == "REFUTED"
