"""Linear, gated linear and RWKV-6 attention and RetNet: definition, gradients and budgets.

The definitions here are the recurrences, position by position and number by number; the code under test works
in blocks of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.families.additive_state import AdditiveStateProblem
from attnproof.properties.families.base import Family
from attnproof.properties.families.gated_linear import GATED_LINEAR
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.linear import LINEAR
from attnproof.properties.families.retention import RETENTION
from attnproof.properties.families.rwkv6 import RWKV6
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_relu_family import rational
from tests.properties.test_sigmoid_family import OWN_ERROR, exact

FAMILIES: dict[str, Family] = {f.name: f for f in (LINEAR, GATED_LINEAR, RETENTION, RWKV6)}
FEATURES = ("identity", "relu", "exp", "elu1", "squared", "taylor")


def phi(name: str, x: list[Any], number: Callable[[Any], Any]) -> list[Any]:
    """A feature map by its definition."""
    if name == "identity":
        return list(x)
    if name == "relu":
        return [max(t, number(0)) for t in x]
    if name == "exp":
        return [mpmath.exp(t) for t in x]
    if name == "elu1":
        return [t + 1 if t > 0 else mpmath.exp(t) for t in x]
    products = [s * t for s in x for t in x]
    if name == "squared":
        return products
    d = mpmath.mpf(len(x))
    linear = [t / mpmath.sqrt(mpmath.sqrt(d)) for t in x]
    return [number(1), *linear, *[p / mpmath.sqrt(2 * d) for p in products]]


def naive(
    family: str,
    t: Mapping[str, Any],
    number: Callable[[Any], Any],
    options: Mapping[str, Any],
    decay: Callable[[Any], Any] = mpmath.exp,
) -> dict[str, Any]:
    """o, state and z by the recurrence, from object arrays by name; loops over single numbers."""
    q, k, v = t["q"], t["k"], t["v"]
    batch, heads, length, width = q.shape
    values, cu = v.shape[3], options.get("cu")
    ends = () if cu is None else zip(cu, cu[1:], strict=False)
    spans = [(b, 0, length) for b in range(batch)] if cu is None else [(0, *pair) for pair in ends]
    name, normalize = options.get("feature_map", "identity"), options.get("normalize", False)
    scale = number(options.get("scale", 1.0))
    features = len(phi(name, [number(0)] * width, number))
    o = np.full(v.shape, number(0), dtype=object)
    states = np.full((len(spans), heads, features, values), number(0), dtype=object)
    sums = np.full((len(spans), heads, features), number(0), dtype=object)
    for (s, (b, start, stop)), h in ((x, h) for x in enumerate(spans) for h in range(heads)):
        state, z = states[s, h], sums[s, h]
        if "initial_state" in t:
            state += t["initial_state"][s, h]
        if "initial_z" in t:
            z += t["initial_z"][s, h]
        reads = []
        for i in range(start, stop):
            key, query = phi(name, list(k[b, h, i]), number), phi(name, list(q[b, h, i]), number)
            for c in range(features):
                if family == "retention":
                    a = 1 - number(2.0 ** (-5 - h))
                elif "g" in t:
                    g = t["g"][b, h, i] if t["g"].ndim == 3 else t["g"][b, h, i, c]
                    a = number(0) if g == -math.inf else decay(g)
                else:
                    a = number(1)
                for e in range(values):
                    if family == "rwkv6":
                        bonus = t["u"][h, c] * key[c] * v[b, h, i, e]
                        o[b, h, i, e] += scale * query[c] * (state[c, e] + bonus)
                    state[c, e] = a * state[c, e] + key[c] * v[b, h, i, e]
                z[c] = a * z[c] + key[c]
            reads.append((i, query))
            if family != "rwkv6" and options.get("causal", True):
                _read(o, (b, h), reads.pop(), state, z, scale if not normalize else None)
        for pair in reads if family != "rwkv6" else []:
            _read(o, (b, h), pair, state, z, scale if not normalize else None)
    return {"o": o, "state": states, "z": sums}


def _read(
    o: Any, place: tuple[int, int], read: tuple[int, list[Any]], state: Any, z: Any, scale: Any
) -> None:
    i, query = read
    below = 1 if scale is not None else sum(x * y for x, y in zip(query, z, strict=True))
    for e in range(state.shape[1]):
        total = sum(x * y for x, y in zip(query, state[:, e], strict=True))
        o[(*place, i, e)] = total * (1 if scale is None else scale) / below


def call(
    family: str,
    sizes: tuple[int, ...],
    options: Mapping[str, Any],
    seed: int,
    *,
    rational_gates: bool = False,
) -> tuple[dict[str, torch.Tensor], AdditiveStateProblem, dict[str, torch.Tensor]]:
    """Tensors by name, the problem, and cotangents of its outputs."""
    b, h, n, d, e = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    options = dict(options)
    t = {"q": normal(b, h, n, d), "k": normal(b, h, n, d), "v": normal(b, h, n, e)}
    if family in ("gated_linear", "rwkv6"):
        wide = options.pop("wide", True)
        g = -normal(b, h, n, d).abs() if wide else -normal(b, h, n).abs()
        if rational_gates:
            g = torch.zeros_like(g)
        g[torch.rand(g.shape, generator=generator) < 0.2] = -torch.inf
        t["g"] = g
    if family == "rwkv6":
        t["u"] = normal(h, d)
    cu = options.pop("cu", None)
    if cu is not None:
        options["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
    states, tensors = b if cu is None else len(cu) - 1, list(t.values())
    if options.pop("initial", False):
        width = len(phi(options.get("feature_map", "identity"), [mpmath.mpf(0)] * d, mpmath.mpf))
        t["initial_state"] = options["initial_state"] = normal(states, h, width, e)
        if options.get("normalize"):
            t["initial_z"] = normal(states, h, width)
            options["initial_state"] = (t["initial_state"], t["initial_z"])
    problem = FAMILIES[family].problem(*tensors, **options, return_state=True)
    return t, problem, {name: normal(*problem.shape(name)) for name in problem.outputs}


CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("gated_linear", (2, 2, 3, 2, 3), {"scale": 0.7, "initial": True}),
    ("gated_linear", (1, 2, 4, 2, 1), {"scale": -0.4, "wide": False, "initial": True}),
    ("gated_linear", (1, 1, 5, 2, 2), {"scale": 1.0, "cu": [0, 2, 2, 5], "initial": True}),
    ("gated_linear", (1, 2, 0, 2, 2), {"scale": 1.0, "initial": True}),
    ("gated_linear", (0, 2, 3, 2, 2), {"scale": 1.0}),
    ("gated_linear", (1, 1, 17, 1, 1), {"scale": 0.3}),
    ("retention", (2, 3, 4, 2, 2), {"scale": 0.7, "initial": True}),
    ("retention", (1, 1, 4, 1, 2), {"scale": 0.7, "cu": [0, 1, 4], "initial": True}),
    ("rwkv6", (2, 2, 3, 2, 2), {"scale": 0.7, "initial": True}),
    ("rwkv6", (1, 1, 5, 2, 1), {"scale": 0.7, "cu": [0, 3, 3, 5]}),
    *(
        ("linear", (1, 1, 3, 2, 2), {"feature_map": name, "normalize": False, "initial": True})
        for name in FEATURES
    ),
    *(("linear", (1, 1, 3, 2, 1), {"feature_map": name, "normalize": True}) for name in ("elu1", "taylor")),
    ("linear", (1, 1, 4, 2, 2), {"feature_map": "exp", "normalize": True, "cu": [0, 1, 4], "initial": True}),
    ("linear", (2, 1, 3, 2, 2), {"feature_map": "elu1", "normalize": True, "causal": False}),
    ("linear", (1, 2, 4, 2, 1), {"feature_map": "squared", "normalize": False, "causal": False}),
]


@pytest.mark.parametrize(("family", "sizes", "options"), CASES)
def test_definition_and_gradients_hold_against_the_recurrence(
    family: str, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    t, problem, cotangents = call(family, sizes, options, seed=sum(sizes))
    arrays = {name: exact(x) for name, x in t.items()}
    weights = {name: exact(x) for name, x in cotangents.items()}

    def loss(x: Mapping[str, Any]) -> Any:
        found = naive(family, x, mpmath.mpf, options)
        return sum(((found[name] * w).sum() for name, w in weights.items()), mpmath.mpf(0))

    with mpmath.workdps(60):
        expected = naive(family, arrays, mpmath.mpf, options)
    gradients = central_differences(loss, arrays) if math.prod(sizes) < 60 else {}
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60)):
        forward = evaluate(problem, arithmetic, gauges=True)
        for name in problem.outputs:
            assert tuple(forward[name].value.shape) == expected[name].shape
            assert enclosure_contains(forward[name], expected[name], OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((forward[name].radius <= 1e-9).all())
        found = evaluate(GradientProblem(problem, forward, cotangents), arithmetic)
        for name in gradients:
            numbers = gradients[name]
            if name == "g":
                numbers = np.where(t["g"].isinf().numpy(), mpmath.mpf(0), numbers)
            assert tuple(found[f"d{name}"].value.shape) == tuple(t[name].shape)
            assert enclosure_contains(found[f"d{name}"], numbers, 1e-28).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


RATIONAL: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("gated_linear", (1, 2, 37, 3, 2), {"scale": 0.5}),
    ("retention", (1, 3, 70, 2, 2), {"scale": 0.5, "initial": True}),
    ("rwkv6", (1, 1, 37, 2, 2), {"scale": 0.5, "cu": [0, 19, 37], "initial": True}),
    ("linear", (1, 1, 70, 2, 2), {"feature_map": "squared", "normalize": False}),
    ("linear", (1, 1, 70, 2, 2), {"feature_map": "relu", "normalize": False, "initial": True}),
    ("linear", (1, 1, 20, 2, 2), {"feature_map": "identity", "normalize": True}),
]


@pytest.mark.parametrize(("family", "sizes", "options"), RATIONAL)
def test_blocks_hold_the_recurrence_over_the_rationals(
    family: str, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    t, problem, _ = call(family, sizes, options, seed=3, rational_gates=True)
    arrays = {name: rational(torch.where(x.isfinite(), x, 0.0)) for name, x in t.items()}
    if "g" in t:
        arrays["g"] = np.where(t["g"].isinf().numpy(), -math.inf, arrays["g"])
    expected = naive(family, arrays, Fraction, options, decay=lambda _: Fraction(1))
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128)):
        found = evaluate(problem, arithmetic)
        for name in problem.outputs:
            for place in np.ndindex(*expected[name].shape):
                distance = abs(Fraction(float(found[name].value[place])) - expected[name][place])
                assert distance <= Fraction(float(found[name].radius[place])), (name, place)
