"""Claims about the table of gates of gated linear attention: Mamba's, Mamba-2's, RetNet's and others' as one.

Yang et al., arXiv 2312.06635, table 1. Gates are enclosed in balls; outputs are compared over the rationals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import flint
import numpy as np
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.gated_linear import gates
from attnproof.properties.forms import gated
from attnproof.properties.forms.base import Array, difference, each
from attnproof.properties.forms.numbers import Gaussian, rationals
from attnproof.properties.forms.parameterisations import ROWS, Activations, Balls, Parameterisation

__all__ = ["CLAIMS", "inside_in_floats", "outer_product", "table_of_gates"]

_BITS = 192
_GAMMA = flint.fmpq(31, 32)


def _rational(x: Any) -> Any:
    """The midpoint of an arb, or of both parts of a Gaussian one."""
    return Gaussian(x.re.mid().fmpq(), x.im.mid().fmpq()) if isinstance(x, Gaussian) else x.mid().fmpq()


def _activations(rng: np.random.Generator, length: int, width: int) -> Activations:
    def draw(*shape: int) -> Array:
        return each(flint.arb, rationals(rng, *shape))

    gamma, floor = flint.arb(_GAMMA), each(flint.arb, gates(rng, width))
    return Activations(
        keys=draw(length, width),
        values=draw(length, width),
        scalar=draw(length, 1),
        phase=draw(length, width),
        A=draw(width, width),
        a=flint.arb(1) / 3,
        gamma=gamma,
        floor=floor,
    )


def _at(x: float, other: float) -> Activations:
    """All pre-activations x, Mamba's logarithms A and a at ``other``."""
    one = np.array([[flint.arb(x)]], dtype=object)
    rate = flint.arb(other)
    floor = np.array([flint.arb(1) / 5], dtype=object)
    return Activations(one, one, one, one, np.array([[rate]], dtype=object), rate, flint.arb(_GAMMA), floor)


def _modulus(factors: Sequence[Array]) -> flint.arb:
    """|G| of the one gate that the factors give."""
    g = flint.arb(1)
    for factor in factors:
        x = factor.flat[0]
        g = g * ((x.re * x.re + x.im * x.im).sqrt() if isinstance(x, Gaussian) else x)
    return g


def _ends(model: Parameterisation, reach: float) -> list[flint.arb]:
    """|G| where every pre-activation is ±reach, Mamba's logarithms independently: bounds of those between."""
    return [_modulus(model.factors(Balls(), _at(*at))) for at in itertools.product((-reach, reach), repeat=2)]


def table_of_gates(
    models: Sequence[Parameterisation] = ROWS, length: int = 6, width: int = 3, reach: float = 30.0
) -> ClaimFinding:
    """Row by row: does each model's own recurrence equal the common one, and are its gates in (0, 1)?

    Gates are computed in balls and their midpoints taken as rationals, over which outputs are compared.
    The gates are monotone in each pre-activation, so that the ends of [−reach, reach] bound them.
    """
    rng = np.random.default_rng(15)
    with _precision(_BITS):
        chosen = _activations(rng, length, width)
        rows = []
        for model in models:
            gate = np.ones((1, 1, 1), dtype=object)
            for factor in model.factors(Balls(), chosen):
                gate = gate * each(_rational, factor)
            q, k, v = (rationals(rng, length, width) for _ in range(3))
            k = model.keys(gate) if model.keys else k
            common = gated.recurrent(q, k, v, gate)[0]
            common = each(lambda x: x.re if isinstance(x, Gaussian) else x, common)
            same = difference(common, model.own(q, k, v, gate)) == 0
            inside = all(bool(0 < end < 1) for end in _ends(model, reach))
            shape = "×".join("d" if n > 1 else "1" for n in gate.shape[1:])
            rows.append((model.model, model.formula, shape, same, inside))
    wrong = [r[0] for r in rows if not (r[3] and r[4])]
    titles = ("model", "G", "shape", "reduces exactly", "in (0, 1)")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{sum(r[3] for r in rows)} of {len(rows)} reduce exactly over rationals, "
        f"{sum(r[4] for r in rows)} have gates proved in (0, 1) for pre-activations in [−{reach:g}, "
        f"{reach:g}]" + (f"; not so: {wrong}" if wrong else ""),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=f"{wrong[0]}: see the table" if wrong else "",
        seed=15,
    )


def inside_in_floats(reach: float = 30.0) -> ClaimFinding:
    """Are the gates at pre-activations of ±reach still in (0, 1) once rounded to float32?"""
    rows = []
    with _precision(_BITS):
        for model in ROWS:
            floats = [float(torch.tensor(float(end.mid())).float()) for end in _ends(model, reach)]
            rows.append((model.model, min(floats), max(floats), all(0.0 < x < 1.0 for x in floats)))
    good, closed = [r for r in rows if r[3]], [r for r in rows if not r[3]]
    titles = ("model", "least in float32", "largest in float32", "in (0, 1)")
    return ClaimFinding(
        status="HOLDS" if not closed else "CONDITIONAL" if good else "REFUTED",
        evidence=f"gates at pre-activations of ±{reach:g}, rounded to float32, least and largest: "
        + ", ".join(f"{r[0]} {r[1]:.3g} to {r[2]:.3g}" for r in rows),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if not closed
        else "GLA's σ(30)^(1/16) = 1 − 5.8e-15 and mLSTM's σ(30) = 1 − 9.4e-14 are nearer to 1 than 2^-25 = "
        "3e-8 and round to 1; RWKV-6's exp(−e^30) = 10^(−4.6e12) rounds to 0, and its logarithm is lost. "
        "Condition: small pre-activations, or gates kept as logarithms.",
    )


def outer_product(exponents: Sequence[Sequence[int]] = ((1, 2, 1), (1, 1, 3), (2, 1, 1))) -> ClaimFinding:
    """Is Mamba's gate of rank 1? With softplus(x_e) = log w_e and exp(A) whole, G_de = w_e^(−n_de)."""
    w = (flint.fmpq(2), flint.fmpq(3), flint.fmpq(5))
    gate = [[1 / w[e] ** n for e, n in enumerate(line)] for line in exponents]
    rank = int(flint.fmpq_mat(gate).rank())
    minor = gate[0][0] * gate[1][1] - gate[0][1] * gate[1][0]
    return ClaimFinding(
        status="REFUTED" if rank > 1 else "HOLDS",
        evidence=f"with softplus(x) = log 2, log 3, log 5 and exp(A) = {[list(line) for line in exponents]} "
        f"the rank of G over the rationals is {rank}, its first minor {minor}",
        table={f"column {e}": [float(line[e]) for line in gate] for e in range(3)},
        counterexample=""
        if rank == 1
        else f"G's first two rows and columns: ({gate[0][0]}, {gate[0][1]}; {gate[1][0]}, {gate[1][1]}) with "
        f"the determinant {minor}, where α βᵀ has 0.",
    )


_TABLE = "Yang et al. 2023, arXiv 2312.06635, table 1"
_GROWING = replace(ROWS[2], factors=lambda e, p: (1 / ROWS[2].factors(e, p)[0],))

CLAIMS: Final = (
    Claim(
        id="GLA-1a",
        subject="gated linear attention",
        title="the table of gates",
        statement="Mamba, DFW, RetNet, Mamba-2, mLSTM, gated retention, GateLoop, HGRN2, RWKV-6 and GLA are "
        "gates in (0, 1) (GateLoop's modulus) of the one recurrence S_t = G_t ∘ S_{t−1} + k_t v_tᵀ, o_t = "
        "S_tᵀq_t: each model's own recurrence with the table's gate gives the same output (RWKV-6's only so "
        "read: see RWK-2b).",
        source=_TABLE,
        kind="enclosure",
        check=lambda lab: table_of_gates(length=lab.choose(4, 8)),
        control=lambda lab: table_of_gates((_GROWING,), 3),
    ),
    Claim(
        id="GLA-1b",
        subject="gated linear attention",
        title="Mamba's gate as an outer product",
        statement="Mamba's gate exp(−(1ᵀα) ∘ exp(A)) is of the form α βᵀ, as the form with matrix products "
        "asks.",
        source=f"{_TABLE} and section 4.1, if read as covering all rows",
        kind="exact",
        check=lambda lab: outer_product(),
        control=lambda lab: outer_product(((1, 1, 1), (1, 1, 1), (1, 1, 1))),
    ),
    Claim(
        id="GLA-1d",
        subject="gated linear attention",
        title="gates in float32",
        statement="The gates of the table lie in (0, 1) in float32 too.",
        source=f"{_TABLE}; formats derived",
        kind="enclosure",
        check=lambda lab: inside_in_floats(),
        control=lambda lab: inside_in_floats(2.0),
    ),
)
