"""Splines of ReLU attention: pieces against naive loops and Sturm's theorem, and claims made false."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.claims import (
    spline_cells,
    spline_check,
    spline_layers,
    spline_networks,
    spline_pieces,
    spline_smoothness,
    splines,
)
from attnproof.properties.claims.spline_networks import (
    RELU,
    Activation,
    Attention,
    Decoder,
    Encoder,
    line,
    on,
)
from attnproof.properties.claims.spline_pieces import (
    UNKNOWN,
    OnBoundary,
    Trace,
    contacts,
    decompose,
    inside,
    interpolated,
    newton,
    order_of_contact,
    real_roots,
)
from attnproof.properties.forms.base import each, filled


def fractions(x):
    return [[Fraction(int(e.p), int(e.q)) for e in row] for row in x]


def naive_affine(x, affine):
    weight, bias = fractions(affine.weight), fractions([affine.bias])[0]
    out = []
    for token in x:
        out.append(
            [bias[e] + sum(token[a] * weight[a][e] for a in range(len(token))) for e in range(len(bias))]
        )
    return out


def naive_attention(attention, source, target):
    q = naive_affine(target, attention.query)
    k, v = naive_affine(source, attention.key), naive_affine(source, attention.value)
    out = []
    for i in range(len(q)):
        row = [Fraction(0)] * len(v[0])
        for j in range(len(k)):
            if attention.causal and j > i:
                continue
            score = sum(a * b for a, b in zip(q[i], k[j], strict=True))
            if score > 0:
                row = [r + score * e for r, e in zip(row, v[j], strict=True)]
        out.append(row)
    return out


def plus(x, y):
    return [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(x, y, strict=True)]


def naive_block(block, x):
    mixed = naive_attention(block.attention, x, x)
    x = plus(x, mixed) if block.residual else mixed
    if block.forward is not None:
        hidden = [[max(e, Fraction(0)) for e in row] for row in naive_affine(x, block.forward[0])]
        fed = naive_affine(hidden, block.forward[1])
        x = plus(x, fed) if block.residual else fed
    return x


def sturm(p, low=None, high=None):
    """Distinct real roots of p in (low, high], by Sturm's theorem; the line if no ends are given."""
    p = p // p.gcd(p.derivative())
    chain = [p, p.derivative()]
    while chain[-1].degree() > 0:
        chain.append(-(chain[-2] % chain[-1]))

    def changes(end, minus):
        if end is None:
            signs = [q.leading_coefficient() * (-1) ** (q.degree() * minus) for q in chain if q.degree() >= 0]
        else:
            signs = [q(end) for q in chain]
        signs = [s > 0 for s in signs if s != 0]
        return sum(a != b for a, b in itertools.pairwise(signs))

    return changes(low, 1) - changes(high, 0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("wide", [0, 3])
def test_pieces_of_encoders_are_what_loops_over_fractions_give(residual, wide) -> None:
    rng = np.random.default_rng(wide + residual)
    network, directions = Encoder.random(rng, 2, 2, wide=wide, residual=residual), line(rng, 2, 2)
    pieces = decompose(network, directions)
    assert len(pieces) > 3
    for piece in pieces:
        for t in inside(piece, 3):
            x = fractions(on(directions, t))
            for block in network.blocks:
                x = naive_block(block, x)
            expected = [flint.fmpq(e.numerator, e.denominator) for row in x for e in row]
            assert expected == [p(t) for p in piece.values]
            assert expected == list(network(on(directions, t), RELU).flat)


def test_pieces_of_a_decoder_are_what_loops_over_fractions_give() -> None:
    rng = np.random.default_rng(5)
    encoder = Encoder.random(rng, 2, 1, residual=True)
    block = spline_networks.Block(Attention.random(rng, 2, causal=True), residual=True)
    network = Decoder(encoder, block, Attention.random(rng, 2), split=2, residual=True)
    directions = line(rng, 4, 2)
    for piece in decompose(network, directions):
        x = fractions(on(directions, piece.point))
        source, target = naive_block(encoder.blocks[0], x[:2]), naive_block(block, x[2:])
        out = plus(target, naive_attention(network.cross, source, target))
        expected = [flint.fmpq(e.numerator, e.denominator) for row in out for e in row]
        assert expected == [p(piece.point) for p in piece.values]


@pytest.mark.parametrize("seed", range(6))
def test_no_breakpoint_is_missed(seed) -> None:
    """The ends of cells are the sign changes of scores: as many as Sturm's theorem counts, where it does."""
    rng = np.random.default_rng(seed)
    attention, directions = Attention.random(rng, 2), line(rng, 3, 2)
    scores = attention.scores(*[on(directions, UNKNOWN)] * 2)
    product = flint.fmpq_poly([1])
    for score in scores.flat:
        if score.discriminant() != 0:  # a square changes no sign
            product = product * score // product.gcd(score)
    pieces = decompose(splines.SelfAttention(attention), directions)
    assert len(pieces) - 1 == sturm(product)
    for left, right in itertools.pairwise(pieces):
        assert sturm(product, left.point, right.point) == 1


def test_roots_of_known_polynomials() -> None:
    for n in (2, 3, 5, 8, 12):
        roots = sorted(float(r) for f, _ in flint.fmpz_poly.chebyshev_t(n).factor()[1] for r in real_roots(f))
        assert roots == pytest.approx(sorted(np.cos((2 * np.arange(n) + 1) * np.pi / (2 * n))), abs=1e-14)
    assert real_roots(flint.fmpz_poly([1, 0, 1])) == []
    (third,) = real_roots(flint.fmpz_poly([-1, 3]))
    assert third.low == third.high == flint.fmpq(1, 3)
    for p in (flint.fmpz_poly.swinnerton_dyer(4), flint.fmpz_poly([-3, 0, 0, 1, 0, 0, 7])):
        assert len(real_roots(p)) == sturm(flint.fmpq_poly(p))


def test_roots_that_floats_cannot_tell_apart_are_ordered() -> None:
    root = real_roots(flint.fmpz_poly([-2, 0, 1]))[1]
    # A convergent of √2 from below: p² − 2q² = −1, closer than 10⁻⁶⁰ but not equal.
    p, q = 1, 1
    for _ in range(80):
        p, q = 3 * p + 4 * q, 2 * p + 3 * q
    (near,) = real_roots(flint.fmpz_poly([-p, q]))
    assert float(near) == float(root)
    assert spline_pieces._below(near, root)
    assert not spline_pieces._below(root, near)


def test_the_example_by_hand() -> None:
    one = splines.identity()
    directions = (filled((2, 1), map(flint.fmpq, (0, 1))), filled((2, 1), map(flint.fmpq, (1, 0))))
    left, right = decompose(splines.SelfAttention(Attention(one, one, one)), directions)
    assert left.values == (UNKNOWN**3, flint.fmpq_poly([1]))
    assert right.values == (UNKNOWN**3 + UNKNOWN, UNKNOWN**2 + 1)
    assert contacts(left, right) == [1, 2]
    assert order_of_contact(left, right) == 1


def test_even_roots_end_no_cell() -> None:
    @dataclass(frozen=True)
    class Rectified:
        def __call__(self, x, activation):
            return activation.rectify(each(lambda t: (t - 1) ** 2 * (t * t - 2), x))

    line_of_t = (filled((1, 1), [flint.fmpq(0)]), filled((1, 1), [flint.fmpq(1)]))
    pieces = decompose(Rectified(), line_of_t)
    assert [float(piece.right) for piece in pieces[:-1]] == pytest.approx([-(2**0.5), 2**0.5])
    assert [p.degree for p in pieces] == [4, -1, 4]


def test_a_trace_on_a_boundary_is_refused() -> None:
    trace = Trace((flint.fmpq(1),))
    with pytest.raises(OnBoundary, match="vanishes at"):
        trace(filled((1,), [UNKNOWN - 1]))


def test_interpolation() -> None:
    points = [flint.fmpq(k, 3) for k in range(5)]
    p = flint.fmpq_poly([1, -2, 0, 5])
    assert interpolated(points, [p(t) for t in points]) == p
    assert newton(points, [p(t) for t in points])[3:] == [5, 0]


def test_a_jump_is_found() -> None:
    @dataclass(frozen=True)
    class Step:
        """relu(t)/t: 0, then 1."""

        def __call__(self, x, activation):
            return each(lambda p: p // UNKNOWN, activation.rectify(x))

    line_of_t = (filled((1, 1), [flint.fmpq(0)]), filled((1, 1), [flint.fmpq(1)]))
    found = spline_check.examine(
        spline_check.Case(
            "step", Step(), line_of_t, 0, evaluated=lambda x, _: x * 0 + (1 if x[0, 0] > 0 else 0)
        )
    )
    assert found.contacts == [0]
    assert "a jump at t ≈ 0" in found.problem


def test_wrong_pieces_are_found(monkeypatch) -> None:
    """Each piece in its neighbour's place."""
    honest = decompose

    def exchanged(*arguments):
        pieces = honest(*arguments)
        others = [*pieces[1:], pieces[0]]
        return [
            spline_pieces.Piece(a.left, a.right, a.point, b.values, a.conditions)
            for a, b in zip(pieces, others, strict=True)
        ]

    monkeypatch.setattr(spline_check, "decompose", exchanged)
    finding = splines.cubic(1)
    assert finding.status == "REFUTED"
    assert "another polynomial" in finding.evidence


@pytest.mark.parametrize("degree", [2, 4])
def test_a_wrong_degree_is_found(degree) -> None:
    cases = splines._self_attention(2, degree=degree)
    assert spline_check.splines(cases).status == "REFUTED"


def test_a_missed_breakpoint_is_found(monkeypatch) -> None:
    """Roots of one polynomial forgotten: the interpolation on the cell that is too long must differ."""
    honest = spline_pieces.Isolation.sign_changes
    forgotten = []

    def forgetful(self, p):
        forgotten.append(str(p))
        return [] if str(p) == forgotten[0] else honest(self, p)

    monkeypatch.setattr(spline_pieces.Isolation, "sign_changes", forgetful)
    assert splines.cubic(1).status == "REFUTED"


def test_cubic_needs_every_pattern(monkeypatch) -> None:
    monkeypatch.setattr(splines, "_pattern_degrees", lambda n, d: [0, 3, 2])
    assert splines.cubic(1).status == "REFUTED"
    monkeypatch.undo()
    assert splines._pattern_degrees(2, 1) == [0] + [3] * 15


def test_causality_needs_the_mask() -> None:
    assert splines.causality(4, 2).status == "HOLDS"
    finding = splines.causality(4, 2, causal=False)
    assert finding.status == "REFUTED"
    assert finding.table["rows moved"][0] > 0


def test_normalisation_is_torchs() -> None:
    x = np.random.default_rng(0).integers(-9, 10, (4, 3))
    ours = spline_layers.layer_normalised(each(lambda e: flint.fmpq(int(e), 4), x))
    theirs = torch.nn.functional.layer_norm(torch.tensor(x / 4), (3,))
    assert np.asarray(ours.astype(float)) == pytest.approx(theirs.numpy(), abs=1e-14)


def test_softmax_weights_are_torchs() -> None:
    scores = np.random.default_rng(0).integers(-9, 10, (3, 3))
    exact = each(lambda e: flint.fmpq(int(e), 4), scores)
    keep = np.tril(np.ones((3, 3), dtype=bool))
    theirs = torch.softmax(torch.tensor(scores / 4).masked_fill(~torch.tensor(keep), -torch.inf), 1)
    assert spline_networks.softmax(exact, keep).astype(float) == pytest.approx(theirs.numpy(), abs=1e-14)
    relus = RELU.weigh(exact, keep).astype(float)
    assert np.array_equal(relus, np.maximum(scores / 4, 0) * keep)


def test_bounds_of_the_numbers_of_breakpoints() -> None:
    assert [spline_cells.bound(1, n) for n in (1, 2, 3)] == [2, 8, 18]
    assert [spline_cells.bound(t, 2) for t in (2, 3)] == [8 + 9 * 24, 224 + 225 * 72]
    assert spline_cells.bound(1, 2, wide=2) == 8 + 9 * 12
    finding = spline_cells.counts(((1, 2, 0),), 4)
    assert finding.status == "HOLDS"
    assert finding.table["most breakpoints"] == finding.table["bound"] == [8]


def test_conics() -> None:
    s, t = flint.fmpq_mpoly_ctx.get(["s", "t"], "lex").gens()
    for p, regular in ((s * s - t, True), (s * s + t * t - 1, True), (s * t, False), (s * s - 1, False)):
        assert (spline_cells._conic(p).det() != 0) is regular
    two = spline_cells._conic(s * s - 3 * s * t + 5 * t - 7)
    assert [two[0, 0], two[0, 1], two[1, 2], two[2, 2]] == [1, flint.fmpq(-3, 2), flint.fmpq(5, 2), -7]


def test_planes_and_lines_agree() -> None:
    """A line within a plane: the plane's polynomial of a point, restricted, is the line's piece."""
    rng = np.random.default_rng(3)
    network, directions = Encoder.random(rng, 2, 1), line(rng, 2, 2, unknowns=2)
    plane = spline_cells.Plane.of(network, directions, side=6)
    for (s, t), pattern in list(zip(plane.points, plane.patterns, strict=True))[::7]:
        pieces = decompose(
            network, (directions[0] + each(lambda e, s=s: e * s, directions[1]), directions[2])
        )
        (piece,) = [
            p
            for p in pieces
            if (p.left is None or spline_pieces._apart(p.left, t).high < t)
            and (p.right is None or t < spline_pieces._apart(p.right, t).low)
        ]
        assert [p(s, t) for p in plane.values[pattern]] == [p(t) for p in piece.values]
        assert any(p != 0 for p in piece.values) or all(p == 0 for p in plane.values[pattern])


def test_smoothness_is_told() -> None:
    """relu(t)^p at 0: p − 1 continuous derivatives."""

    @dataclass(frozen=True)
    class Power:
        p: int

        def __call__(self, x, activation):
            return activation.rectify(x) ** self.p

    line_of_t = (filled((1, 1), [flint.fmpq(0)]), filled((1, 1), [flint.fmpq(1)]))
    for p in (1, 2, 3, 4):
        case = spline_check.Case("power", Power(p), line_of_t, p)
        assert order_of_contact(*decompose(case.network, case.directions)) == p
        for derivatives in (0, 1, 2):
            status = spline_smoothness.smoothness([case], derivatives).status
            assert status == ("HOLDS" if p > derivatives else "REFUTED")


def test_the_counterexample_to_two_derivatives_says_which() -> None:
    finding = spline_smoothness.smoothness(spline_smoothness._attention_cases(0))
    assert finding.status == "REFUTED"
    assert "x^3 left of t = 0, x^3 + x right" in finding.counterexample
    assert "derivatives of order 1 are 0 and 1" in finding.counterexample
    assert finding.table["breakpoints"] == [1, 0]


def test_findings_are_plain() -> None:
    one = splines.softmax_is_cubic(RELU)
    for finding in (
        one,
        spline_cells.boundaries(1),
        spline_smoothness.jumps(1),
        spline_layers.decoders(((0, 1),), 1),
    ):
        tables = [finding.table, *(plot.columns for plot in finding.plots)]
        for table in tables:
            (length,) = {len(column) for column in table.values()}
            assert 0 < length <= 400
            assert all(isinstance(x, (bool, int, float, str)) for column in table.values() for x in column)
        for plot in finding.plots:
            assert {plot.x, plot.y, plot.color} <= {"", *plot.columns}


def test_undecided_differences_are_open() -> None:
    """Balls that hold 0 prove nothing: exact values, blown up to balls."""
    case = splines._self_attention(1)[0]

    def blurred(scores, keep):
        return each(lambda e: flint.arb(e, 1e-3), RELU.weigh(scores, keep))

    assert spline_check.splines([case], Activation(weights=blurred)).status == "OPEN"


def test_only_the_network_whose_pieces_are_found_is_drawn() -> None:
    for found in (splines.softmax_is_cubic(splines.SOFTMAX), spline_layers.layer_normalisation(1)):
        assert found.plots == ()
        assert "of the network with ReLU and nothing after it" in found.evidence
    for found in (splines.softmax_is_cubic(RELU), spline_layers.layer_normalisation(1, normalised=False)):
        assert found.plots
        assert "nothing after it" not in found.evidence
