"""Max–min polynomials and the ReLU encoders that compute them, over the rationals and over germs of lines.

Everything runs over any ordered ring: rationals (:class:`flint.fmpq`), or polynomials in an infinitesimal
ε > 0 (:class:`Germ`, ordered by the first non-zero coefficient). An encoder run at x₀ + ε u returns the
polynomial that it is on the cell that begins at x₀ in direction u.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.forms.base import Array, each
from attnproof.properties.forms.numbers import _Number

__all__ = [
    "Block",
    "Encoder",
    "Expression",
    "Form",
    "Germ",
    "Head",
    "compiled",
    "maximum",
    "minimum",
    "positive",
    "relu",
    "softmax",
    "variables",
]

Form = Mapping[int, Any]
"""A linear form: coefficient of every register that it reads."""

Weights = Callable[[Array], Array]
"""Attention weights (keys, queries) of scores (keys, queries)."""

ONE: Final = flint.fmpq(1)


@dataclass(frozen=True)
class Germ(_Number):
    """A rational polynomial in an infinitesimal ε > 0, as numpy would take a bare one for a sequence."""

    polynomial: flint.fmpq_poly

    @classmethod
    def of(cls, x: Any) -> Germ:
        return x if isinstance(x, Germ) else cls(flint.fmpq_poly([x]))

    def plus(self, other: Germ) -> Germ:
        return Germ(self.polynomial + other.polynomial)

    def times(self, other: Germ) -> Germ:
        return Germ(self.polynomial * other.polynomial)


def positive(x: Any) -> bool:
    """x > 0; a germ is as positive as its first coefficient that is not 0."""
    if isinstance(x, Germ):
        return bool(next((c for c in x.polynomial.coeffs() if c != 0), flint.fmpq(0)) > 0)
    return bool(x > 0)


def relu(scores: Array) -> Array:
    """max(s, 0) of every entry; a ball that holds 0 keeps its positive part."""

    def one(x: Any) -> Any:
        if isinstance(x, flint.arb):
            return x.max(flint.arb(0))
        return x if positive(x) else 0 * x

    return each(one, scores)


def softmax(scores: Array) -> Array:
    """Weights (keys, queries) in Arb balls, of sum 1 over the keys."""
    exponentials = each(lambda x: flint.arb(x).exp(), scores)
    return np.asarray(exponentials / exponentials.sum(axis=0))


@dataclass(frozen=True, eq=False)
class Expression:
    """A node of a max–min polynomial: a "variable", "one", a "sum", a "product" or a "maximum"."""

    kind: str
    operands: tuple[Expression, ...] = ()
    coefficients: tuple[Any, ...] = ()
    index: int = 0

    def __add__(self, other: Any) -> Expression:
        return _sum((self, ONE), (_node(other), ONE))

    def __sub__(self, other: Any) -> Expression:
        return _sum((self, ONE), (_node(other), -ONE))

    def __rsub__(self, other: Any) -> Expression:
        return _sum((_node(other), ONE), (self, -ONE))

    def __neg__(self) -> Expression:
        return _sum((self, -ONE))

    def __mul__(self, other: Any) -> Expression:
        if isinstance(other, Expression):
            return Expression("product", (self, other))
        return _sum((self, flint.fmpq(other)))

    __radd__, __rmul__ = __add__, __mul__

    def value(self, point: Sequence[Any], seen: list[Any] | None = None) -> Any:
        """At ``point``, by its definition. ``seen`` receives every difference whose sign was asked for."""
        known: dict[int, Any] = {}

        def of(node: Expression) -> Any:
            if id(node) not in known:
                known[id(node)] = self._rule(node, [of(x) for x in node.operands], point, seen)
            return known[id(node)]

        return of(self)

    @staticmethod
    def _rule(node: Expression, x: list[Any], point: Sequence[Any], seen: list[Any] | None) -> Any:
        if node.kind == "variable":
            return point[node.index]
        if node.kind == "one":
            return point[0] * 0 + 1
        if node.kind == "product":
            return x[0] * x[1]
        if node.kind == "sum":
            return sum((c * y for c, y in zip(node.coefficients, x, strict=True)), start=point[0] * 0)
        if seen is not None:
            seen.append(x[0] - x[1])
        return x[0] if positive(x[0] - x[1]) else x[1]


_ONE: Final = Expression("one")


def _node(x: Any) -> Expression:
    return x if isinstance(x, Expression) else _sum((_ONE, flint.fmpq(x)))


def _sum(*terms: tuple[Expression, Any]) -> Expression:
    return Expression("sum", tuple(x for x, _ in terms), tuple(c for _, c in terms))


def variables(count: int) -> tuple[Expression, ...]:
    """x_1 … x_count."""
    return tuple(Expression("variable", index=i) for i in range(count))


def maximum(*of: Any) -> Expression:
    """The largest of its arguments, two at a time."""
    first, *rest = map(_node, of)
    for other in rest:
        first = Expression("maximum", (first, other))
    return first


def minimum(*of: Any) -> Expression:
    """The smallest: −max of the negatives."""
    return -maximum(*(-_node(x) for x in of))


@dataclass(frozen=True)
class Head:
    """One head: register → Σ_j value(X)_j · weight_ji, weights from Σ_c key_c(X)_j · query_c(X)_i."""

    keys: tuple[Form, ...]
    queries: tuple[Form, ...]
    values: Mapping[int, Form]


@dataclass(frozen=True)
class Block:
    """An encoder block: heads, whose outputs add up in ``width`` registers; then outer·ReLU(inner·X)."""

    heads: tuple[Head, ...]
    width: int
    inner: tuple[Form, ...]
    outer: tuple[Form, ...]


@dataclass(frozen=True)
class Encoder:
    """Blocks on a sequence of ``tokens`` columns; column i enters as its one-hot position and the number x_i.

    All maps are linear without bias: the sum of a column's position registers is the constant 1.
    """

    tokens: int
    blocks: tuple[Block, ...]
    readout: Form

    def __call__(self, point: Sequence[Any], weights: Weights = relu, seen: list[Any] | None = None) -> Any:
        """The output at ``point`` (read from the first column).

        Args:
            point: tokens numbers of one ordered ring.
            weights: of the attention; ReLU unless said otherwise.
            seen: receives every score and every preactivation.
        """
        zero = point[0] * 0
        X = np.full((self.tokens + 1, self.tokens), zero, dtype=object)
        for i, x in enumerate(point):
            X[i, i], X[-1, i] = zero + 1, x
        for block in self.blocks:
            X = _feed_forward(block, _attend(block, X, weights, seen, zero), seen)
        return _apply(self.readout, X)[0]

    @property
    def size(self) -> tuple[int, int, int]:
        """Blocks, heads, hidden units: all of them together."""
        heads = sum(len(block.heads) for block in self.blocks)
        return len(self.blocks), heads, sum(len(block.inner) for block in self.blocks)


def _apply(form: Form, X: Array) -> Array:
    total = X[0] * 0
    for register, coefficient in form.items():
        total = total + coefficient * X[register]
    return np.asarray(total)


def _attend(block: Block, X: Array, weights: Weights, seen: list[Any] | None, zero: Any) -> Array:
    out = np.full((block.width, X.shape[1]), zero, dtype=object)
    for head in block.heads:
        K = np.stack([_apply(form, X) for form in head.keys])
        Q = np.stack([_apply(form, X) for form in head.queries])
        scores = K.T @ Q
        if seen is not None:
            seen.extend(scores.flat)
        A = weights(scores)
        for register, form in head.values.items():
            out[register] = out[register] + _apply(form, X) @ A
    return out


def _feed_forward(block: Block, X: Array, seen: list[Any] | None) -> Array:
    hidden = np.stack([_apply(form, X) for form in block.inner])
    if seen is not None:
        seen.extend(hidden.flat)
    hidden = relu(hidden)
    return np.stack([_apply(form, hidden) for form in block.outer])


@dataclass
class _Compiler:
    """Registers known so far. Registers 0 … tokens − 1 hold the column's position."""

    tokens: int
    registers: dict[int, int] = field(default_factory=dict)
    width: int = 0

    @property
    def one(self) -> Form:
        return dict.fromkeys(range(self.tokens), ONE)

    def form(self, node: Expression) -> Form | None:
        """The node as a linear form of what is known; None while something is missing."""
        if node.kind == "one":
            return self.one
        if node.kind != "sum":
            register = self.registers.get(id(node))
            return None if register is None else {register: ONE}
        total: dict[int, Any] = {}
        for coefficient, operand in zip(node.coefficients, node.operands, strict=True):
            part = self.form(operand)
            if part is None:
                return None
            for register, c in part.items():
                total[register] = total.get(register, flint.fmpq(0)) + coefficient * c
        return total

    def ready(self, nodes: Sequence[Expression], kind: str) -> list[tuple[Expression, Form, Form]]:
        """Nodes of a kind whose two operands are known, and which are not known themselves."""
        found = []
        for node in nodes:
            if node.kind == kind and id(node) not in self.registers:
                a, b = (self.form(x) for x in node.operands)
                if a is not None and b is not None:
                    found.append((node, a, b))
        return found

    def carry(self) -> Head:
        """Position against position: weight 1 at the own column, so that every register is copied."""
        positions = tuple({i: ONE} for i in range(self.tokens))
        return Head(positions, positions, {r: {r: ONE} for r in range(self.width)})

    def gather(self) -> tuple[Head, ...]:
        """A head for every token, which brings its number to all columns."""
        return tuple(
            Head(({j: ONE},), (self.one,), {self.tokens + j: {self.tokens: ONE}}) for j in range(self.tokens)
        )

    def product(self, node: Expression, a: Form, b: Form) -> tuple[Head, Head]:
        """ReLU(ab) − ReLU(−ab); the value is 1 in the first column only, as all columns hold the same."""
        register = self.registers[id(node)] = self.width
        self.width += 1
        negative = {r: -c for r, c in a.items()}
        return (
            Head((a,), (b,), {register: {0: ONE}}),
            Head((negative,), (b,), {register: {0: -ONE}}),
        )

    def feed_forward(self, heads: tuple[Head, ...], nodes: Sequence[Expression]) -> Block:
        """x = ReLU(x) − ReLU(−x) for every register, and max(a, b) = a + ReLU(b − a)."""
        width = self.width
        inner: list[Form] = [{r: sign} for r in range(width) for sign in (ONE, -ONE)]
        outer: list[Form] = [{2 * r: ONE, 2 * r + 1: -ONE} for r in range(width)]
        for node, a, b in self.ready(nodes, "maximum"):
            gap = dict(b)
            for r, c in a.items():
                gap[r] = gap.get(r, flint.fmpq(0)) - c
            kept = {2 * r + odd: -c if odd else c for r, c in a.items() for odd in (0, 1)}
            outer.append({**kept, len(inner): ONE})
            inner.append(gap)
            self.registers[id(node)] = self.width
            self.width += 1
        return Block(heads, width, tuple(inner), tuple(outer))


def _nodes(root: Expression) -> list[Expression]:
    """Every node once, operands first."""
    order: dict[int, Expression] = {}

    def visit(node: Expression) -> None:
        if id(node) not in order:
            for operand in node.operands:
                visit(operand)
            order[id(node)] = node

    visit(root)
    return list(order.values())


def compiled(expression: Expression, tokens: int) -> Encoder:
    """The encoder whose output is ``expression`` of its ``tokens`` numbers.

    One block computes all products that are ready, then all maxima that are; the first also brings the
    numbers of all tokens to all columns. Products come from two heads and maxima from the feed-forward part,
    as in Lai, Lim and Liu, arXiv 2408.09624, section 2.4, with positions in place of biases.
    """
    compiler = _Compiler(tokens)
    nodes = _nodes(expression)
    heads: tuple[Head, ...] = compiler.gather()
    positions = Head(compiler.carry().keys, compiler.carry().queries, {r: {r: ONE} for r in range(tokens)})
    for node in nodes:
        if node.kind == "variable":
            compiler.registers[id(node)] = tokens + node.index
    compiler.width = 2 * tokens
    blocks = [compiler.feed_forward((positions, *heads), nodes)]
    while (readout := compiler.form(expression)) is None:
        carry = compiler.carry()
        heads = tuple(h for x in compiler.ready(nodes, "product") for h in compiler.product(*x))
        blocks.append(compiler.feed_forward((carry, *heads), nodes))
    return Encoder(tokens, tuple(blocks), readout)
