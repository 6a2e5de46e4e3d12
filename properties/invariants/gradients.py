"""Invariants of gradients: linear in the cotangent, blind to what a forward pass is blind to.

With P the weights and dP = dO Vᵀ, softmax attention has dS = P ∘ (dP − δ), δ_i = Σ_j P_ij dP_ij, whose rows
sum to 0; what a query does not see gets nothing from it, and where all weight is on one key, dO goes to its
value. They apply to cases that have cotangents, and only to kernels that return gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.families.visibility import visible
from attnproof.properties.invariants.base import Balance, Plan, Recipe, Select, Term, generator
from attnproof.properties.invariants.calls import (
    as_it_is,
    attention_call,
    changed,
    differentiated,
    takes_masks,
)

__all__ = ["EASY_GRADIENTS", "GRADIENTS", "LINEARITY"]

# A key whose score is larger than all others by this much has all weight: e⁻⁵¹² is 0 in every format.
_APART = 512.0
# The square of an entry is a score before scaling, which float32 holds with room to spare.
_LARGEST = 2.0**60
# What is e⁻⁵¹² times numbers of any format's size, 2¹²⁸ at most, and sums of them.
_NOTHING = 1e-100


def _has_gradients(case: Case, contract: Contract) -> bool:
    return case.option("cotangents") is not None and contract.differentiable is not False


def _linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """The cotangent split element by element in two, so that the parts add up to it exactly."""
    random = generator(case, "gradient-linearity")
    masks = {
        name: torch.randint(0, 2, x.shape, generator=random).bool() for name, x in inputs.cotangents.items()
    }
    calls = [as_it_is(case, inputs)]
    for words, wanted in (("part of the cotangent", True), ("the rest of the cotangent", False)):
        part = {name: torch.where(masks[name] == wanted, x, 0.0) for name, x in inputs.cotangents.items()}
        calls.append(attention_call(case, words, changed(inputs, cotangents=part), familiar=False))
    names = [f"d{name}" for name in differentiated(case, inputs)]
    relations = [Balance((Term(1, name), Term(2, name), Term(0, name, -1.0))) for name in names]
    return Plan(tuple(calls), tuple(relations))


def _row_sums_fit(case: Case, contract: Contract) -> bool:
    seen_through = takes_masks(contract) or not case.option("softcap")
    return _has_gradients(case, contract) and not case.option("sinks") and seen_through


def _row_sums(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Rows of dS seen through a bias, as a sum or as the gradient of a shift, or through constant keys.

    The cotangent of the log-sum-exp, which alone sees a shift, is left out.
    """
    inputs = changed(inputs, cotangents={"o": inputs.cotangents["o"]})
    if takes_masks(contract):
        q, bias = inputs.tensors["q"], inputs.options.get("bias")
        by_row = case.seed % 2 == 0
        shape = (case["B"], case["H"], case["M"], 1 if by_row else case["N"])
        if by_row or bias is None:
            draw = torch.randint(-8, 9, shape, generator=generator(case, "score-shift-gradient"))
            bias = (draw.double() / 4.0).to(q.dtype)
        else:
            bias = bias.expand(shape)
        words = f"a bias of {'one number a row' if by_row else 'its own for each pair'}"
        call = attention_call(case, words, changed(inputs, bias=bias), familiar=False)
        return Plan((call,), (Balance((Term(0, "dbias", summed=True),)),))
    # dq_id = scale · Σ_j dS_ij k_jd: for each half of the columns where scores have two.
    k = inputs.tensors["k"].clone()
    columns = [0, case["D"]] if case.family == "differential" else [0]
    k[..., columns] = 1.0
    call = attention_call(case, "keys with a constant column", changed(inputs, k=k), familiar=False)
    return Plan((call,), (Balance((Term(0, "dq", 1.0, lambda x: x[..., columns]),)),))


def _seen(case: Case, inputs: Inputs, contract: Contract) -> torch.Tensor:
    """Which keys a query sees, bool (B, H, M, N)."""
    given = inputs.options
    positions = {name: given[name] for name in ("causal", "window", "cu_seqlens") if name in given}
    seen = visible(case["M"], case["N"], **positions, causal_alignment=contract.causal_alignment)
    if isinstance(given.get("bias"), torch.Tensor):
        seen = seen & (given["bias"] > -torch.inf)
    return seen.expand(case["B"], case["H"], case["M"], case["N"])


def _unseen_fits(case: Case, contract: Contract) -> bool:
    masked = case.option("causal") or case.option("window") is not None or takes_masks(contract)
    return _has_gradients(case, contract) and bool(masked)


def _unseen(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """The case itself where some key is unseen or some row empty, else with a key and a row masked away."""
    call, seen = as_it_is(case, inputs), _seen(case, inputs, contract)
    if bool(seen.any(2).all() & seen.any(3).all()):
        if not takes_masks(contract) or min(case["M"], case["N"]) < 2:
            return None
        random = generator(case, "unseen-gradient")
        key, row = (int(torch.randint(case[symbol], (), generator=random)) for symbol in "NM")
        seen = seen.clone()
        seen[..., key], seen[..., row, :] = False, False
        hidden = torch.zeros(1, 1, case["M"], case["N"], dtype=case.torch_dtype)
        hidden[..., key], hidden[..., row, :] = -torch.inf, -torch.inf
        bias = inputs.options.get("bias")
        masked = changed(inputs, bias=hidden if bias is None else bias + hidden)
        call = attention_call(case, f"key {key} and query {row} masked away", masked, familiar=False)
    group = case["H"] // case["G"]
    keys = ~seen.any(2).reshape(case["B"], case["G"], group, case["N"]).any(2)
    rows = ~seen.any(3)
    wanted = {"dq": rows, "dk": keys, "dv": keys}
    relations = [
        Balance((Term(0, name, 1.0, _where(mask)),), bitwise=True)
        for name, mask in wanted.items()
        if bool(mask.any())
    ]
    return Plan((call,), tuple(relations))


def _where(mask: torch.Tensor) -> Select:
    return lambda x: x[mask]


def _one_hot(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """Query i has all weight on key i mod L, L the lesser of N and D: q_i and k_j are multiples of e_j.

    Without any option but the scale. dv of a key is the sum of its rows' dO; dq and dk are e⁻⁵¹² times
    numbers of any size, hence 0.
    """
    scale = float(inputs.options["scale"])
    reach = math.sqrt(_APART / abs(scale)) if scale else math.inf
    if 4.0 * reach > min(torch.finfo(case.torch_dtype).max, _LARGEST):
        return None
    size = 2.0 ** math.ceil(math.log2(reach))
    batch, heads, groups, m, n, d = (case[symbol] for symbol in "BHGMND")
    length = min(n, d)
    place = torch.arange(m) % length
    q = torch.zeros(batch, heads, m, d, dtype=case.torch_dtype)
    q[:, :, torch.arange(m), place] = math.copysign(size, scale)
    k = torch.zeros(batch, groups, n, d, dtype=case.torch_dtype)
    k[:, :, torch.arange(length), torch.arange(length)] = size
    v, do = inputs.tensors["v"].nan_to_num(0.0, 0.0, 0.0), inputs.cotangents["o"]
    plain = Inputs({"q": q, "k": k, "v": v}, {"scale": inputs.options["scale"]}, {"o": do})
    call = attention_call(case, "all weight of query i on one key", plain, familiar=False)
    onto = (place[:, None] == torch.arange(n)).double()
    shared = do.double().reshape(batch, groups, heads // groups, m, -1)
    exact = torch.einsum("mn,bghme->bgne", onto, shared)
    # Each sum has at most M·H/G terms, every addition of which rounds once.
    radius = 2.0**-52 * m * (heads // groups) * torch.einsum("mn,bghme->bgne", onto, shared.abs())
    relations = (
        Balance((Term(0, "dv"),), constant=exact, radius=radius + _NOTHING),
        *(Balance((Term(0, name),), radius=_NOTHING) for name in ("dq", "dk")),
    )
    return Plan((call,), relations)


def _outside(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """Scores outside the band have no part in the result."""
    band = case.option("band")
    apart = (torch.arange(case["N"])[:, None] - torch.arange(case["N"])).abs()
    outside = (apart > band).expand(case["H"], case["N"], case["N"])
    if not bool(outside.any()):
        return None
    zero = Balance((Term(0, "dalpha", 1.0, _where(outside)),), bitwise=True)
    return Plan((as_it_is(case, inputs),), (zero,))


def _has_band(case: Case, contract: Contract) -> bool:
    return _has_gradients(case, contract) and case.option("band") is not None


LINEARITY: Mapping[str, Recipe] = {"gradient-linearity": Recipe(_has_gradients, _linearity)}
"""What holds for the gradients of every family."""

GRADIENTS: Mapping[str, Recipe] = {
    **LINEARITY,
    "score-shift-gradient": Recipe(_row_sums_fit, _row_sums),
    "unseen-gradient": Recipe(_unseen_fits, _unseen),
    "one-hot-value-gradient": Recipe(_has_gradients, _one_hot),
}
"""By name of the invariant, how it is tried on attention; which of them a family has, the package says."""

EASY_GRADIENTS: Mapping[str, Recipe] = {**LINEARITY, "unseen-gradient": Recipe(_has_band, _outside)}
"""By name of the invariant, how it is tried on easy attention."""
