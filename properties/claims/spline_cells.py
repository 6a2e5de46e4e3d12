"""Claims about the cells of ReLU attention: how many on a line, which boundaries, one polynomial each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.spline_networks import (
    RELU,
    Activation,
    Affine,
    Attention,
    Block,
    Encoder,
    Network,
    line,
    on,
    relu,
    row_normalised,
)
from attnproof.properties.claims.spline_pieces import OnBoundary, Trace, decompose, order_of_contact
from attnproof.properties.claims.splines import SOURCE, SUBJECT, SelfAttention, identity
from attnproof.properties.forms.base import Array, filled

__all__ = ["CLAIMS", "Plane", "bound", "boundaries", "counts", "one_polynomial_a_pattern"]

POINTS: Final = 18
"""A side of the grid on a plane: 324 points, as many as a picture shows."""


@dataclass
class _Signs:
    """A ReLU of rationals that keeps the signs of all that it rectifies."""

    signs: list[bool] = field(default_factory=list)

    def __call__(self, x: Array) -> Array:
        if (x == 0).any():
            raise OnBoundary("a rectified number is 0")
        self.signs += [bool(entry > 0) for entry in x.flat]
        return relu(x)


@dataclass(frozen=True)
class Plane:
    """A network on X₀ + sX₁ + tX₂ at the points of a grid.

    Attributes:
        points: rational (s, t), none on a boundary.
        patterns: the signs of all that is rectified there.
        conditions: the rectified polynomials by pattern, in s and t.
        values: the outputs by pattern, as polynomials in s and t.
    """

    points: list[tuple[flint.fmpq, flint.fmpq]]
    patterns: list[tuple[bool, ...]]
    conditions: dict[tuple[bool, ...], list[Any]]
    values: dict[tuple[bool, ...], list[Any]]

    @classmethod
    def of(cls, network: Network, directions: tuple[Array, ...], side: int = POINTS) -> Plane:
        """Signs at the points of [−2, 2]², a polynomial for every pattern that occurs."""
        unknowns = flint.fmpq_mpoly_ctx.get(["s", "t"], "lex").gens()
        plane = cls([], [], {}, {})
        # An odd denominator of its own: boundaries through points of the grid are no habit.
        steps = [flint.fmpq(4 * i, side - 1) - 2 + flint.fmpq(1, 1009) for i in range(side)]
        for point in itertools.product(steps, steps):
            recorded = _Signs()
            try:
                network(on(directions, *point), Activation(recorded))
            except OnBoundary:
                continue
            pattern = tuple(recorded.signs)
            plane.points.append(point)
            plane.patterns.append(pattern)
            if pattern not in plane.values:
                trace = Trace(point)
                values = network(on(directions, *unknowns), Activation(trace))
                plane.values[pattern] = [p + 0 * unknowns[0] for p in values.flat]
                plane.conditions[pattern] = trace.conditions
        return plane

    def picture(self, title: str) -> Plot:
        """The points, coloured by the number of their pattern."""
        numbers = {pattern: i + 1 for i, pattern in enumerate(self.values)}
        columns: dict[str, list[Any]] = {
            "s": [int(s.p) / int(s.q) for s, _ in self.points],
            "t": [int(t.p) / int(t.q) for _, t in self.points],
            "cell": [numbers[pattern] for pattern in self.patterns],
        }
        return Plot(title, "scatter", columns, x="s", y="t", color="cell")


def one_polynomial_a_pattern(layers: Sequence[int], activation: Activation = RELU) -> ClaimFinding:
    """SPL-1d: all points of a grid with the same signs against one bivariate polynomial.

    Args:
        layers: t of the encoder on each plane.
        activation: what is compared with the polynomials.
    """
    plots: list[Plot] = []
    rows, example = [], ""
    for seed, t in enumerate(layers):
        rng = np.random.default_rng([12, seed])
        network, directions = Encoder.random(rng, 2, t), line(rng, 2, 2, unknowns=2)
        plane = Plane.of(network, directions)
        wrong = 0
        for point, pattern in zip(plane.points, plane.patterns, strict=True):
            exact = list(network(on(directions, *point), activation).flat)
            expected = [p(*point) for p in plane.values[pattern]]
            wrong += exact != expected
            if exact != expected and not example:
                example = (
                    f"plane {seed + 1}, (s, t) = ({point[0]}, {point[1]}): the first output is "
                    f"{exact[0]}, that of its cell's polynomial {expected[0]}"
                )
        degree = int(max(p.total_degree() for values in plane.values.values() for p in values))
        rows.append((seed + 1, t, len(plane.points), len(plane.values), degree, 3**t, wrong))
        if t not in [row[1] for row in rows[:-1]]:
            plots.append(
                plane.picture(f"cells of {t} layers of ReLU attention on a rational plane, n = d = 2")
            )
    above = [row for row in rows if row[4] > row[5]]
    missed = set(layers) - {row[1] for row in rows if row[4] == row[5]}
    good = not (example or above or missed)
    titles = ("plane", "layers", "points", "patterns of signs", "total degree", "3^t", "points that differ")
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{len(rows)} rational planes, {sum(row[2] for row in rows)} rational points with "
        f"{sum(row[3] for row in rows)} patterns of signs: {sum(row[6] for row in rows)} differ from the "
        "bivariate polynomial of their pattern; largest total degrees "
        + ", ".join(f"{row[4]} (t = {row[1]})" for row in rows)
        + (
            ". For all: with its signs given every relu is 0 or the identity, wherever the inputs lie, "
            "so that "
            "the network is one composition of polynomials, and a layer triples the degree at most (SPL-4c)"
            if good
            else ""
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=tuple(plots),
        counterexample="" if good else example or f"largest total degrees {[row[4] for row in rows]}",
        seed=12,
    )


def _conic(p: Any) -> flint.fmpq_mat:
    """The symmetric 3 × 3 matrix of a polynomial of degree 2 in two unknowns."""
    half, matrix = flint.fmpq(1, 2), flint.fmpq_mat(3, 3)
    for (a, b), coefficient in p.to_dict().items():
        places = [0] * a + [1] * b + [2] * (2 - a - b)
        matrix[places[0], places[1]] += coefficient * half
        matrix[places[1], places[0]] += coefficient * half
    return matrix


def _parabola() -> tuple[Network, tuple[Array, ...]]:
    """Tokens (s, t) and (s, −1) of width 2, all weights the identity: their score is s² − t."""
    start, s, t = ([0, 0, 0, -1], [1, 0, 1, 0], [0, 1, 0, 0])
    one = identity(2)
    rational = [filled((2, 2), map(flint.fmpq, entries)) for entries in (start, s, t)]
    return SelfAttention(Attention(one, one, one)), tuple(rational)


def _planes(planes: int, *, attention: bool) -> list[tuple[str, Network, tuple[Array, ...]]]:
    """The example by hand and random ones; or feed-forward networks of one hidden layer."""
    out: list[tuple[str, Network, tuple[Array, ...]]] = []
    if attention:
        out.append(("tokens (s, t), (s, −1)", *_parabola()))
    for seed in range(planes):
        rng = np.random.default_rng([13, seed])
        network: Network = SelfAttention(Attention.random(rng, 2))
        if not attention:
            network = Block(None, (Affine.random(rng, 2, 4), Affine.random(rng, 4, 2)))
        out.append((f"plane {seed + 1}", network, line(rng, 2, 2, unknowns=2)))
    return out


_PARABOLA = """n = 2, d = 2, W_Q = W_K = W_V = identity, tokens (s, t) and (s, −1): the score of the two is
s·s − t·1, so relu(s² − t) weighs them and the boundary of the cells is the parabola t = s²,
which contains no segment. The points (0, 1) and (2, 1) of the plane, for instance, lie on its two sides.
"""


def boundaries(planes: int, *, attention: bool = True) -> ClaimFinding:
    """SPL-1e: are all boundaries that the grid crosses pieces of straight lines?

    A condition of degree 2 whose 3 × 3 matrix is regular, and which has both signs on the grid, is a conic
    without a straight segment, and a boundary.
    """
    plots: list[Plot] = []
    rows, example = [], ""
    for name, network, directions in _planes(planes, attention=attention):
        plane = Plane.of(network, directions)
        first = plane.patterns[0]
        straight = curved = 0
        # One layer: the conditions are the same everywhere.
        for number, condition in enumerate(plane.conditions[first]):
            if len({pattern[number] for pattern in plane.patterns}) < 2:
                continue
            bent = condition.total_degree() == 2 and _conic(condition).det() != 0
            curved, straight = curved + bent, straight + (not bent)
            if bent and not example:
                example = f"{name}: a boundary is {condition} = 0."
        rows.append((name, len(plane.values), curved, straight))
        if not plots:
            plots.append(plane.picture(f"{name}: cells"))
    titles = ("plane", "patterns of signs", "curved boundaries", "other boundaries")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{len(rows)} planes: of the scores with both signs, {sum(row[2] for row in rows)} "
        f"vanish on a conic without a straight segment (regular matrix), {sum(row[3] for row in rows)} on "
        "others",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=tuple(plots),
        counterexample=(_PARABOLA + example) if example and attention else example,
        seed=13,
    )


def bound(layers: int, n: int, *, wide: int = 0, degree: int = 2) -> int:
    """Most breakpoints of t layers of self-attention of n tokens on a line.

    B₀ = 0 and B_s = A + (A + 1)·n·wide·3^s with A = B_{s−1} + (B_{s−1} + 1)·n²·degree·3^(s−1): each cell is
    cut by n² scores of degree 2·3^(s−1), then by n·wide hidden units of degree 3^s.
    """
    most = 0
    for s in range(1, layers + 1):
        most += (most + 1) * n * n * degree * 3 ** (s - 1)
        most += (most + 1) * n * wide * 3**s
    return most


_COUNT_PROOF: Final = (
    "For all: on each of the B_{s−1} + 1 cells of the layers before, layer s has n² scores, polynomials of "
    "degree at most 2·3^(s−1) in t (SPL-4c), each of which changes its sign at most that often; on each "
    "of the "
    "A + 1 cells that this leaves n·h hidden units are polynomials of degree at most 3^s. Nothing else has a "
    "breakpoint"
)


def counts(sizes: Sequence[tuple[int, int, int]], lines: int, *, degree: int = 2) -> ClaimFinding:
    """SPL-10: exact numbers of breakpoints against the bound.

    Args:
        sizes: (layers, tokens, width of the feed-forward network, 0 for none).
        lines: for each size.
        degree: of a layer's scores in its input, 2 in truth.
    """
    rows, over = [], []
    for layers, n, wide in sizes:
        found, kinks = [], []
        for seed in range(lines):
            rng = np.random.default_rng([14, layers, n, wide, seed])
            network = Encoder.random(rng, 3 if layers == 1 else 2, layers, wide=wide, residual=True)
            pieces = decompose(network, line(rng, n, 3 if layers == 1 else 2))
            found.append(len(pieces) - 1)
            kinks.append(sum(order_of_contact(a, b) is not None for a, b in itertools.pairwise(pieces)))
        most = bound(layers, n, wide=wide, degree=degree)
        rows.append((layers, n, wide, min(found), max(found), max(kinks), most))
        if max(found) > most:
            over.append(
                f"t = {layers}, n = {n}, line {found.index(max(found)) + 1}: {max(found)} breakpoints > "
                f"{most}"
            )
    attained = [f"n = {row[1]}" for row in rows if row[0] == 1 and not row[2] and row[4] == row[6]]
    titles = (
        "layers",
        "tokens",
        "hidden units",
        "fewest breakpoints",
        "most breakpoints",
        "most at which the function changes",
        "bound",
    )
    table = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    two = [row for row in rows if row[1] == 2]
    return ClaimFinding(
        status="REFUTED" if over else "HOLDS",
        evidence=f"{lines} random rational lines for each of {len(rows)} sizes, every breakpoint "
        "isolated: most "
        + ", ".join(f"{row[4]} of {row[6]} (t = {row[0]}, n = {row[1]})" for row in rows)
        + (f"; the bound is attained for t = 1, {', '.join(attained)}" if attained else "")
        + (f"; exceeded: {over[0]}" if over else f". {_COUNT_PROOF}"),
        table=table,
        plots=(
            Plot(
                "breakpoints of two tokens on a line: the most found, and the bound",
                "line",
                {
                    "layers": [row[0] for row in two] * 2,
                    "breakpoints": [row[k] for k in (4, 6) for row in two],
                    "which": [name for name in ("found", "bound") for row in two],
                },
                x="layers",
                y="breakpoints",
                color="which",
                log=("breakpoints",),
            ),
        ),
        counterexample="\n".join(over[:3]),
        seed=14,
    )


_PLAIN = ((1, 1, 0), (1, 2, 0), (1, 3, 0), (2, 2, 0), (3, 2, 0))
_BLOCKS = ((1, 2, 2), (1, 3, 2), (2, 2, 2))

CLAIMS: Final = (
    Claim(
        id="SPL-1d",
        subject=SUBJECT,
        title="a pattern of signs is one polynomial",
        statement="All inputs with the same signs of everything rectified, connected or not, share one "
        "polynomial of total degree at most 3^t, t layers, attained; shown on planes X₀ + sX₁ + tX₂.",
        source=SOURCE + "section 2 (numbering from memory); derived",
        kind="exact",
        check=lambda lab: one_polynomial_a_pattern(lab.choose((1, 2), (1, 2) * 6)),
        control=lambda lab: one_polynomial_a_pattern((1,), Activation(weights=row_normalised)),
    ),
    Claim(
        id="SPL-1e",
        subject=SUBJECT,
        title="the cells are polyhedra",
        statement="As for feed-forward networks, the cells of ReLU attention are polyhedra, bounded by "
        "hyperplanes.",
        source="a reading of 'piecewise' that arXiv 2408.09624 does not make; derived",
        kind="exact",
        check=lambda lab: boundaries(lab.choose(1, 8)),
        control=lambda lab: boundaries(1, attention=False),
    ),
    Claim(
        id="SPL-10a",
        subject=SUBJECT,
        title="number of breakpoints on a line",
        statement="t layers of ReLU self-attention of n tokens have on a line at most B_t breakpoints, "
        "B_0 = 0, "
        "B_s = B_{s−1} + (B_{s−1} + 1)·n²·2·3^(s−1); one layer has at most 2n².",
        source="derived; cells as in arXiv 2408.09624",
        kind="exact",
        check=lambda lab: counts(_PLAIN, lab.choose(4, 40)),
        control=lambda lab: counts(_PLAIN[1:3], 4, degree=1),
        covers=("SPL-10",),
    ),
    Claim(
        id="SPL-10b",
        subject=SUBJECT,
        title="number of breakpoints of encoder blocks on a line",
        statement="With a feed-forward network of h hidden units after the attention, A = B_{s−1} + "
        "(B_{s−1} + "
        "1)·n²·2·3^(s−1) and B_s = A + (A + 1)·n·h·3^s bound the breakpoints.",
        source="derived; cells as in arXiv 2408.09624",
        kind="exact",
        check=lambda lab: counts(_BLOCKS, lab.choose(2, 12)),
        control=lambda lab: counts(_BLOCKS[:2], 2, degree=0),
    ),
)
