"""Regimes for families that carry a state: gates, keys and decays where recurrences and chunks go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.regime import STATE_FAMILIES, Builder, Regime

__all__ = ["STATES", "states"]

_GATED = ("gated_linear", "rwkv6", "delta")
_DELTA = ("delta",)
Gates = Callable[[Draw, tuple[int, ...]], Float64]


def _gate_shape(draw: Draw) -> tuple[int, ...]:
    """(B, H, N, D), or (B, H, N) for one gate a head."""
    head = (draw["B"], draw["H"], draw["N"])
    default = "head" if draw.family == "delta" else "channel"
    return head if draw.options.get("gate", default) == "head" else (*head, draw["D"])


def _keys(draw: Draw) -> tuple[int, int, int]:
    """The leading axes of k and v; (1, 1, N) where they are shared."""
    return (1, 1, draw["N"]) if draw.shared else (draw["B"], draw["H"], draw["N"])


def _usual(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """log σ(3 + N(0, 1)): some 5 % is forgotten at each step."""
    gate: Float64 = -np.log1p(np.exp(-3.0 - draw.normal("g", *shape)))
    return gate


def _constant(value: float) -> Gates:
    return lambda draw, shape: np.full(shape, value)


def _slow(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """log(1 − 2^(−5 − h)) for head h, the decays of RetNet."""
    decay = np.log1p(-(2.0 ** -(5.0 + np.arange(draw["H"]))))
    return np.broadcast_to(decay.reshape((1, -1) + (1,) * (len(shape) - 2)), shape).copy()


def _strong(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """One step in four decays by 10 to 1000, in log; the others hardly."""
    chosen = draw.integers("strong", 0, 4, *shape) == 0
    depth = 10.0 ** (1.0 + 2.0 * draw.uniform("depth", *shape))
    return np.where(chosen, -depth, -(2.0**-8) * draw.uniform("rest", *shape))


def _alternating(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """0 and −∞ in turn over stretches of 1 to 5 steps: a kept and a forgotten state."""
    stretch = 1 + np.arange(draw["N"]) // 5 % 5
    closed = (np.arange(draw["N"]) % (stretch + 1)) == stretch
    gate = np.where(closed, -np.inf, 0.0).reshape((1, 1, -1) + (1,) * (len(shape) - 3))
    return np.broadcast_to(gate, shape).copy()


def _mixed(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """Each gate by itself 0, a usual decay, −100 or −∞."""
    kind = draw.integers("kind", 0, 8, *shape)
    return np.where(
        kind == 0, -np.inf, np.where(kind == 1, -100.0, np.where(kind < 4, 0.0, _usual(draw, shape)))
    )


def _unit(keys: Float64) -> Float64:
    """Keys of length just below 1, so that β‖k‖² ≤ 2 holds after rounding as well."""
    length = np.sqrt((keys * keys).sum(-1, keepdims=True))
    found: Float64 = keys / np.maximum(length, 1e-30) * (1.0 - 2.0**-6)
    return found


def states(
    *,
    gates: Gates = _usual,
    keys: float = 1.0,
    values: float = 1.0,
    value_mean: float = 0.0,
    queries: float = 1.0,
    gate_input: float = 1.0,
) -> Builder:
    """Normal queries, keys and values of these sizes, with ``gates``; unit keys for the delta rule.

    ``gate_input`` is the size of mLSTM's pre-activations.
    """

    def build(draw: Draw) -> dict[str, Any]:
        k = draw.normal("k", *_keys(draw), draw["D"])
        found: dict[str, Any] = {
            "q": draw.normal("q", draw["B"], draw["H"], draw["N"], draw["D"]) * queries,
            "k": (_unit(k) if draw.family == "delta" else k) * keys,
            "v": draw.normal("v", *_keys(draw), draw["E"]) * values + value_mean,
        }
        return {**found, **_gating(draw, gates, gate_input)}

    return build


def _gating(draw: Draw, gates: Gates, gate_input: float) -> dict[str, Float64]:
    """g, β, or the pre-activations of mLSTM, as the family has them."""
    head = (draw["B"], draw["H"], draw["N"])
    if draw.family == "mlstm":
        return {
            "i": gate_input * draw.normal("i", *head),
            "f": 3.0 + gate_input * draw.normal("f", *head),
        }
    found = {}
    if draw.family == "delta":
        found["beta"] = 1.0 / (1.0 + np.exp(-draw.normal("beta", *head)))
    if draw.family in _GATED:
        found["g"] = gates(draw, _gate_shape(draw))
    return found


def _changed(**changes: Callable[[Draw], Float64]) -> Builder:
    """The usual inputs with some tensors replaced."""

    def build(draw: Draw) -> dict[str, Any]:
        made = states()(draw)
        return {**made, **{name: change(draw) for name, change in changes.items() if name in made}}

    return build


def _per_step(value: float) -> Callable[[Draw], Float64]:
    return lambda draw: np.full((draw["B"], draw["H"], draw["N"]), value)


def _correlated(draw: Draw) -> Float64:
    """Unit keys within a few degrees of one another."""
    centre = draw.normal("centre", 1, 1, 1, draw["D"])
    return _unit(centre + 0.125 * draw.normal("k", *_keys(draw), draw["D"]))


def _basis(draw: Draw) -> Float64:
    """Unit vectors of the axes: with β = 1 the state returns the last value written, exactly."""
    chosen = draw.integers("axis", 0, draw["D"], *_keys(draw), 1)
    found: Float64 = (chosen == np.arange(draw["D"])).astype(np.float64)
    return found


def _long_keys(draw: Draw) -> Float64:
    """Keys of length √3 in the first steps: with β = 1 the transition doubles what it should shrink."""
    k = _unit(draw.normal("k", *_keys(draw), draw["D"]))
    grown = (np.arange(draw["N"]) < 6)[:, None]
    return np.where(grown, math.sqrt(3.0) * k, k)


def _one_sign(draw: Draw) -> dict[str, Any]:
    """q, k and v in [0, 1): sums without cancellation, and errors of one sign."""
    made = states()(draw)
    k = draw.uniform("k", *_keys(draw), draw["D"])
    return {
        **made,
        "q": draw.uniform("q", draw["B"], draw["H"], draw["N"], draw["D"]),
        "k": _unit(k) if draw.family == "delta" else k,
        "v": draw.uniform("v", *_keys(draw), draw["E"]),
    }


def _last_nonfinite(draw: Draw) -> dict[str, Any]:
    """A NaN in the value and an infinity in the key of the last position, which no earlier one sees."""
    made = states()(draw)
    v, k = made["v"].copy(), made["k"].copy()
    if draw["N"]:
        v[:, :, -1, 0], k[:, :, -1, 0] = np.nan, np.inf
    return {**made, "v": v, "k": k}


def _seen_nonfinite(draw: Draw) -> dict[str, Any]:
    """A NaN in a key of the middle, which all later positions of its sequence see."""
    made = states()(draw)
    k = made["k"].copy()
    if draw["N"]:
        k[:, :, draw["N"] // 2, 0] = np.nan
    return {**made, "k": k}


def _small_keys(draw: Draw) -> dict[str, Any]:
    """Keys 2⁻¹⁰ in size: a constant added to the normaliser shows."""
    made = states()(draw)
    return {**made, "k": made["k"] * 2.0**-10}


def _negative(draw: Draw) -> dict[str, Any]:
    """Queries and keys about −8: features of elu + 1 are exponentials, down to e⁻²⁰."""
    made = states()(draw)
    return {**made, "q": 2.0 * made["q"] - 8.0, "k": 2.0 * made["k"] - 8.0}


def _kinks(draw: Draw) -> dict[str, Any]:
    """q and k of −1, 0 and 1: features at the kinks of their maps."""
    made = states()(draw)
    shapes = {"q": (draw["B"], draw["H"], draw["N"], draw["D"]), "k": (*_keys(draw), draw["D"])}
    return {
        **made,
        **{n: draw.integers(n, -1, 2, *shape).astype(np.float64) for n, shape in shapes.items()},
    }


def _vanishing(draw: Draw) -> dict[str, Any]:
    """Keys that come in pairs k, −k: the normaliser of the identity map is 0 after each pair."""
    made = states()(draw)
    k = made["k"].copy()
    pairs = draw["N"] // 2
    k[:, :, 1 : 2 * pairs : 2] = -k[:, :, 0 : 2 * pairs : 2]
    return {**made, "k": k}


def _extreme_pre_activations(draw: Draw) -> dict[str, Any]:
    """Input gates e^±100 and forget gates from σ(−100) to σ(100)."""
    made = states()(draw)
    head = (draw["B"], draw["H"], draw["N"])
    i = 100.0 * (2.0 * draw.uniform("i", *head) - 1.0)
    return {**made, "i": i, "f": 100.0 * (2.0 * draw.uniform("f", *head) - 1.0)}


def _mixed_forgetting(draw: Draw) -> Float64:
    """Forget gates of mLSTM, each by itself −∞, −100, 100 or usual."""
    head = (draw["B"], draw["H"], draw["N"])
    kind, usual = draw.integers("kind", 0, 8, *head), 3.0 + draw.normal("f", *head)
    return np.where(kind == 0, -np.inf, np.where(kind == 1, -100.0, np.where(kind < 4, 100.0, usual)))


def _rare_inputs(draw: Draw) -> dict[str, Any]:
    """Input gates so small that the denominator is 1, and it is e^−m after stabilisation."""
    made = states()(draw)
    return {**made, "i": made["i"] - 8.0}


def _all(builder: Builder, *families: str) -> dict[str, Builder]:
    return dict.fromkeys(families or STATE_FAMILIES, builder)


STATES = (
    Regime("normal", "", "plain", _all(states())),
    Regime("uniform", "", "plain", _all(_one_sign)),
    Regime("large-values", "", "extreme", _all(states(values=1024.0))),
    Regime(
        "subnormal-values",
        "",
        "extreme",
        _all(lambda draw: states(values=float(draw.finfo.tiny) / 8.0)(draw)),
    ),
    Regime("one-sign-values", "", "plain", _all(states(value_mean=4.0))),
    Regime(
        "future-nonfinite",
        "NaN and inf at the last position: no earlier one may see it",
        "nonfinite",
        _all(_last_nonfinite),
    ),
    Regime(
        "past-nonfinite",
        "NaN in the middle: later positions of its sequence may be anything, other sequences may not",
        "nonfinite",
        _all(_seen_nonfinite),
    ),
    Regime(
        "open-gates",
        "all gates 1: nothing is forgotten, and the state grows like a sum",
        "plain",
        _all(states(gates=_constant(0.0)), *_GATED),
    ),
    Regime(
        "closed-gates",
        "all gates 0: nothing is remembered, and -inf - (-inf) must not come up",
        "extreme",
        {
            **_all(states(gates=_constant(-math.inf)), *_GATED),
            **_all(_changed(f=_per_step(-math.inf)), "mlstm"),
        },
    ),
    Regime(
        "slow-decay",
        "the decays of RetNet: gates so near 1 that a bfloat16 product of them stands still",
        "plain",
        _all(states(gates=_slow), *_GATED),
    ),
    Regime(
        "strong-decay",
        "decays that add up past 88, 104 and 1000 within a chunk: 1/b overflows (GLA-2, bugs B42 to B45)",
        "extreme",
        _all(states(gates=_strong), *_GATED),
    ),
    Regime(
        "alternating-gates",
        "gates of 0 and 1 in turn: a state is forgotten whole, and kept whole",
        "extreme",
        _all(states(gates=_alternating), *_GATED),
    ),
    Regime(
        "mixed-gates",
        "gates of 0, 1, exp(-100) and usual ones side by side",
        "extreme",
        {**_all(states(gates=_mixed), *_GATED), **_all(_changed(f=_mixed_forgetting), "mlstm")},
    ),
    Regime(
        "no-writing",
        "beta is 0: the state only decays",
        "exact",
        _all(_changed(beta=_per_step(0.0)), *_DELTA),
    ),
    Regime(
        "exact-recall",
        "beta is 1 and keys are unit vectors of the axes: the state holds the last value of each, exactly",
        "exact",
        _all(_changed(beta=_per_step(1.0), k=_basis), *_DELTA),
    ),
    Regime(
        "correlated-keys",
        "nearly parallel keys with beta 2: the triangular system of a chunk is as ill-conditioned as can be",
        "tied",
        _all(_changed(beta=_per_step(2.0), k=_correlated), *_DELTA),
    ),
    Regime(
        "growing-state",
        "beta times the squared key is 3 for a few steps: the transition is no contraction",
        "extreme",
        _all(_changed(beta=_per_step(1.0), k=_long_keys), *_DELTA),
    ),
    Regime(
        "vanishing-normaliser",
        "keys in pairs k, -k: the normaliser of a map without positive features is 0 (LIN-7)",
        "extreme",
        _all(_vanishing, "linear"),
    ),
    Regime(
        "small-keys",
        "keys of 2^-10: a constant that a kernel adds to its normaliser shows",
        "plain",
        _all(_small_keys, "linear"),
    ),
    Regime(
        "negative-keys",
        "queries and keys about -8: elu + 1 is an exponential, which (e^x - 1) + 1 loses",
        "plain",
        _all(_negative, "linear"),
    ),
    Regime("exact-kinks", "", "exact", _all(_kinks, "linear")),
    Regime(
        "extreme-gates",
        "input gates of exp(100) and exp(-100), beyond float32: the running maximum keeps them apart",
        "extreme",
        _all(_extreme_pre_activations, "mlstm"),
    ),
    Regime(
        "small-input-gates",
        "the denominator is its lower bound: 1, and exp(-m) once it is stabilised",
        "plain",
        _all(_rare_inputs, "mlstm"),
    ),
)
