"""Claims about the layer that easy attention was published as: which axis its projection mixes, and its size.

The published code (KTH-FlowAI) takes x (B, S, d), multiplies W_V from the left, splits columns over heads and
multiplies each head by its scores α_h (S, S). Integers make every comparison exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch

from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = ["CLAIMS", "layer", "one_matrix", "parameters", "rows_of_values", "shapes", "sizes", "values"]

Side = Literal["left", "right"]

_SUBJECT = "easy attention"
_SOURCE = "Sanchis-Agudo et al., arXiv 2308.12874, {}"
_SEED = 2


def _integers(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED + seed)
    return torch.randint(-4, 5, shape, generator=generator)


def values(x: torch.Tensor, w: torch.Tensor, side: Side) -> torch.Tensor:
    """W_V·x with W from the left, as the code has it, or x·W, as self-attention has it; x (S, d)."""
    return w @ x if side == "left" else x @ w


def layer(x: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor, side: Side = "left") -> torch.Tensor:
    """Heads' outputs α_h·(values of the head's columns), side by side, (S, d); alpha (H, S, S)."""
    heads = values(x, w, side).chunk(alpha.shape[0], dim=1)
    return torch.cat([a @ v for a, v in zip(alpha, heads, strict=True)], dim=1)


def rows_of_values(length: int = 4, side: Side = "left") -> ClaimFinding:
    """Does a token's value depend on that token alone?"""
    x, w = _integers(length, length, seed=1), _integers(length, length, seed=2)
    moved = x.clone()
    moved[0] += 1
    changed = (values(moved, w, side) != values(x, w, side)).any(dim=1)
    others = [i for i in range(1, length) if changed[i]]
    swap = torch.tensor([[0, 1], [1, 0]])
    token = torch.tensor([[1, 2], [3, 4]])
    return ClaimFinding(
        status="REFUTED" if others else "HOLDS",
        evidence=f"S = d = {length}, W_V from the {side}: changing token 0 changes the values of tokens "
        f"{[i for i in range(length) if changed[i]]}",
        table={"token": list(range(length)), "its value changes with token 0": changed.tolist()},
        counterexample=""
        if not others
        else f"W_V = {swap.tolist()}, x = {token.tolist()} (a token a row): W_V·x = "
        f"{values(token, swap, 'left').tolist()} swaps the tokens; x·W_V = "
        f"{values(token, swap, 'right').tolist()} swaps their features.",
        seed=_SEED,
    )


def one_matrix(length: int = 6, heads: int = 2, side: Side = "left") -> ClaimFinding:
    """Is each head α_h·W_V, one matrix over time, on its own columns of the input?"""
    x, w = _integers(length, length, seed=3), _integers(length, length, seed=4)
    alpha = _integers(heads, length, length, seed=5)
    found = layer(x, w, alpha, side)
    columns = x.chunk(heads, dim=1)
    single = torch.cat([a @ w @ part for a, part in zip(alpha, columns, strict=True)], dim=1)
    wrong = int((found != single).sum())
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"S = d = {length}, {heads} heads, W_V from the {side}: {wrong} of {found.numel()} integers "
        "differ "
        "from α_h·W_V applied to the head's own columns",
        counterexample=f"{wrong} entries differ" if wrong else "",
        seed=_SEED,
    )


def shapes(tried: Sequence[tuple[int, int]], side: Side = "left") -> ClaimFinding:
    """Does the layer run for every sequence length and width (S, d), with W_V (d, d)?"""
    rows = []
    for length, width in tried:
        x, w = torch.zeros(length, width), torch.zeros(width, width)
        try:
            layer(x, w, torch.zeros(1, length, length), side)
        except RuntimeError:
            runs = False
        else:
            runs = True
        rows.append((length, width, runs))
    refused = [(n, d) for n, d, runs in rows if not runs]
    return ClaimFinding(
        status="REFUTED" if refused else "HOLDS",
        evidence=f"W_V (d, d) from the {side}: runs at (S, d) = {[(n, d) for n, d, runs in rows if runs]}"
        + (f", shapes do not fit at {refused}: only S = d runs" if refused else ""),
        table={title: [row[i] for row in rows] for i, title in enumerate(("S", "d", "runs"))},
        counterexample=f"S = {refused[0][0]}, d = {refused[0][1]}: W_V ({refused[0][1]}, {refused[0][1]}) "
        "times x "
        f"({refused[0][0]}, {refused[0][1]}) is no product of matrices."
        if refused
        else "",
    )


def parameters(length: int, width: int, heads: int) -> tuple[int, int]:
    """Learned numbers of easy attention, H·S² + S·d, and of softmax attention's Q, K and V, 3d²."""
    return heads * length**2 + length * width, 3 * width**2


def sizes(configurations: Sequence[tuple[int, int, int]]) -> ClaimFinding:
    """Has easy attention fewer parameters? For (S, d, H)."""
    rows = [(*c, *parameters(*c)) for c in configurations]
    more = [row for row in rows if row[3] >= row[4]]
    fewer = [row for row in rows if row[3] < row[4]]
    if more:
        status = "CONDITIONAL" if fewer else "REFUTED"
    else:
        status = "HOLDS"
    told = ""
    if more:
        n, d, h, easy, softmax = more[0]
        told = (
            f"S = {n}, d = {d}, H = {h}: easy attention H·S² + S·d = {easy}, softmax attention 3d² = "
            f"{softmax}."
        )
    return ClaimFinding(
        status=status,
        evidence=f"H·S² + S·d against 3d²: fewer in {len(fewer)} of {len(rows)} configurations, those with "
        "H·S² + S·d < 3d²; the published one (S = d = 64, H = 4) has 20480 against 12288",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("S", "d", "H", "easy attention", "softmax attention"))
        },
        counterexample=told,
    )


def published_numbers() -> ClaimFinding:
    """What the paper measured, which is not at hand."""
    return ClaimFinding(
        status="OPEN",
        evidence="The tables of errors for the Lorenz system, the reactor and the shear flow, the sparse "
        "variant and "
        "the trained weights are not at hand, and training at the published size (64 wide, 4 blocks, 100 "
        "epochs) "
        "would not say what was measured there. Needed: the paper's tables or its checkpoints. Checked here "
        "instead: small networks on the Lorenz system (EASY-4b), the layer's algebra (EASY-1, EASY-2).",
    )


_ALL = ((64, 64, 4), (2, 2, 1), (8, 64, 4), (16, 64, 4), (32, 64, 4), (64, 256, 4))

CLAIMS: Final = (
    Claim(
        id="EASY-1a",
        subject=_SUBJECT,
        title="what the value projection mixes",
        statement="In x̂ = α·W_V·x the projection W_V gives each token a value of its own, as in "
        "self-attention.",
        source=_SOURCE.format("definition and code"),
        kind="exact",
        check=lambda _: rows_of_values(),
        control=lambda _: rows_of_values(side="right"),
    ),
    Claim(
        id="EASY-1b",
        subject=_SUBJECT,
        title="one matrix a head",
        statement="With W_V from the left each head is the single time-mixing matrix α_h·W_V on its own "
        "columns of "
        "the input.",
        source=_SOURCE.format("code"),
        kind="exact",
        check=lambda lab: one_matrix(lab.choose(6, 16)),
        control=lambda _: one_matrix(side="right"),
    ),
    Claim(
        id="EASY-1c",
        subject=_SUBJECT,
        title="sizes that the layer takes",
        statement="The layer, with W_V (d, d) from the left, takes sequences of any length S, such as its "
        "example "
        "with 72 and 64.",
        source=_SOURCE.format("code, second copy (read, not run)"),
        kind="exact",
        check=lambda _: shapes(((64, 64), (72, 64), (3, 2), (2, 3))),
        control=lambda _: shapes(((64, 64), (72, 64), (3, 2), (2, 3)), side="right"),
    ),
    Claim(
        id="EASY-2e",
        subject=_SUBJECT,
        title="fewer parameters",
        statement="Easy attention is less complex than self-attention: H·S² + S·d learned numbers in place "
        "of 3d².",
        source=_SOURCE.format("abstract; counts from the code's shapes"),
        kind="count",
        check=lambda _: sizes(_ALL),
        control=lambda _: sizes([c for c in _ALL if 4 * c[0] <= c[1]]),
    ),
    Claim(
        id="EASY-4a",
        subject=_SUBJECT,
        title="published errors",
        statement="Easy attention predicts the Lorenz system, a reactor and a shear flow with the errors "
        "printed, and "
        "its sparse variant too.",
        source=_SOURCE.format("results"),
        kind="none",
        check=lambda _: published_numbers(),
        control=None,
    ),
)
