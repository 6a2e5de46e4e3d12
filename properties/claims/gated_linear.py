"""Claims about gated linear attention's forms: S_t = G_t ∘ S_{t−1} + k_t v_tᵀ in parallel and in chunks.

Yang et al., arXiv 2312.06635. Equality is over the rationals, for complex gates over the Gaussian rationals.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import LENGTH, Row, Run, compared, equality, row
from attnproof.properties.forms import gated
from attnproof.properties.forms.base import Array, each, filled
from attnproof.properties.forms.numbers import Gaussian, generic

__all__ = ["CLAIMS", "chunkwise_form", "complex_gates", "gated_run", "gates", "parallel_form"]


def gates(rng: np.random.Generator, *shape: int) -> Array:
    """Generic factors between 1/9 and 8/9."""
    return generic(rng, *shape, low=1, high=8, denominator=9)


def gated_run(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array | None = None,
    *,
    bonus: Array | None = None,
    block: int | None = None,
    others: Array | None = None,
) -> Run:
    """The family's forms over these inputs.

    Args:
        others: gates that the forms other than the recurrence are given instead of ``alpha``.
    """

    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        x, y, z = q[piece], k[piece], v[piece]
        b = None if beta is None else beta[piece]
        if form == "recurrent":
            return gated.recurrent(x, y, z, gated.gates(alpha[piece], b), state, bonus=bonus)
        a = (alpha if others is None else others)[piece]
        if isinstance(form, int):
            return gated.chunkwise(x, y, z, a, b, state, chunk=form, bonus=bonus, block=block)
        return gated.parallel(x, y, z, a, b, state, bonus=bonus)

    return run


def _inputs(length: int) -> tuple[Array, Array, Array, dict[str, tuple[Array, Array | None, int | None]]]:
    """q, k (N, 4), v (N, 3), and by variant α, β and the length of secondary chunks."""
    rng = np.random.default_rng(11)
    q, k, v = (generic(rng, length, width) for width in (4, 4, 3))
    vector, values = gates(rng, length, 4), gates(rng, length, 3)
    alternating = vector.copy()
    alternating[::2], alternating[1::2] = flint.fmpq(0), flint.fmpq(1)
    return (
        q,
        k,
        v,
        {
            "vector": (vector, None, None),
            "vector, secondary chunks of 4": (vector, None, 4),
            "scalar": (vector[:, :1], None, None),
            "α βᵀ": (vector, values, None),
            "alternating 0 and 1": (alternating, None, 4),
        },
    )


def _shifted(alpha: Array) -> Array:
    """Every gate one position late: α_{t−1} in place of α_t."""
    return np.concatenate([alpha[:1], alpha[:-1]])


_EXAMPLE = (
    "N = 2, q = k = v = 1, gates α_1, α_2: o_2 = α_2 + 1. With every gate one position late it would be α_1 "
    "+ 1."
)


def parallel_form(length: int = LENGTH, *, late: bool = False) -> ClaimFinding:
    """The recurrence against GLA-2: by products over segments, and factored, (Q∘B)(K⊘B)ᵀ.

    Args:
        late: the parallel forms get every gate one position late.
    """
    q, k, v, variants = _inputs(length)
    rows: list[Row] = []
    for name, (alpha, beta, block) in variants.items():
        others = _shifted(alpha) if late else alpha
        run = gated_run(q, k, v, alpha, beta, block=block, others=others)
        rows += compared(name, run, length, chunked=False)
        if name in ("vector", "α βᵀ"):
            reference = run("recurrent", slice(None), None)[0]
            rows.append(row(name, "factored", reference, [gated.factored(q, k, v, others, beta)]))
    return equality(rows, seed=11, example=_EXAMPLE)


def chunkwise_form(length: int = LENGTH, *, late: bool = False) -> ClaimFinding:
    """The recurrence against GLA-3: chunks of any length, ragged too, secondary chunks, states handed over.

    Args:
        late: the chunks get every gate one position late.
    """
    q, k, v, variants = _inputs(length)
    rows: list[Row] = []
    for name, (alpha, beta, block) in variants.items():
        others = _shifted(alpha) if late else None
        run = gated_run(q, k, v, alpha, beta, block=block, others=others)
        rows += compared(name, run, length, parallel=False)
    return equality(rows, seed=11, example=_EXAMPLE)


def complex_gates(length: int = LENGTH, *, real_decays: bool = False) -> ClaimFinding:
    """GateLoop: complex gates a + bi, a and b of their own, over Gaussian rationals.

    Args:
        real_decays: the forms other than the recurrence get the gates' real parts only.
    """
    rng = np.random.default_rng(13)
    q, k, v = (generic(rng, length, width) for width in (3, 3, 2))
    parts = zip(gates(rng, length, 3).flat, gates(rng, length, 3).flat, strict=True)
    alpha = filled((length, 3), itertools.starmap(Gaussian, parts))
    others = each(lambda x: replace(x, im=flint.fmpq(0)), alpha) if real_decays else alpha
    real = Gaussian(flint.fmpq(1))
    run = gated_run(q * real, k * real, v * real, alpha, others=others)
    rows = compared("α = a + bi", run, length)
    reference = run("recurrent", slice(None), None)[0]
    rows.append(
        row("α = a + bi", "factored", reference, [gated.factored(q * real, k * real, v * real, others)])
    )
    return equality(
        rows, seed=13, example="N = 2, q = k = v = 1, α_2 = i/2: o_2 = 1 + i/2; with the real part alone 1."
    )


_SOURCE = "Yang et al. 2023, arXiv 2312.06635"

CLAIMS: Final = (
    Claim(
        id="GLA-1c",
        subject="gated linear attention",
        title="complex gates",
        statement="With complex gates (GateLoop) the recurrent, parallel, factored and chunkwise forms are "
        "equal, in their real and imaginary parts.",
        source="Katsch 2023, arXiv 2311.01927, as in table 1 of arXiv 2312.06635",
        kind="exact",
        check=lambda lab: complex_gates(lab.choose(9, LENGTH)),
        control=lambda lab: complex_gates(5, real_decays=True),
    ),
    Claim(
        id="GLA-2a",
        subject="gated linear attention",
        title="parallel form",
        statement="The recurrence with G_t = α_t β_tᵀ equals its parallel form, with the decays as products "
        "over segments or factored: O = [((Q∘B)(K⊘B)ᵀ ∘ M)(V⊘B̃)] ∘ B̃, where no gate is 0.",
        source=f"{_SOURCE}, section 4.1 and appendix",
        kind="exact",
        check=lambda lab: parallel_form(lab.choose(11, LENGTH)),
        control=lambda lab: parallel_form(7, late=True),
    ),
    Claim(
        id="GLA-3a",
        subject="gated linear attention",
        title="chunkwise form",
        statement="The recurrence equals its chunkwise form for every chunk length, with a ragged last "
        "chunk, with secondary chunks, with gates of 0 and 1, and with a state handed over anywhere.",
        source=f"{_SOURCE}, sections 4.2 and 4.3",
        kind="exact",
        check=lambda lab: chunkwise_form(lab.choose(11, LENGTH)),
        control=lambda lab: chunkwise_form(7, late=True),
    ),
)
