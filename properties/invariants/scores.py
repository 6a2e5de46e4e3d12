"""Invariants of one family each, by how its scores become weights.

Sigmoid and ReLU attention weigh each key by itself (theory.md SIG-9), so that parts add up; attention on
normalised keys, on windows of keys, and differences of two attentions have each a symmetry of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.invariants.base import (
    Balance,
    Bounds,
    Plan,
    Recipe,
    Relation,
    Select,
    Term,
    anything,
    generator,
    grid_step,
    rows_from,
    same,
)
from attnproof.properties.invariants.calls import (
    Selects,
    affordable,
    all_same,
    as_it_is,
    attention_call,
    base_call,
    changed,
    choice,
    differentiated,
    every_gradient,
    length_given,
    same_gradients,
)

__all__ = ["OWN"]

# Scores at which σ rounds to 1 in float32, so that 1 − σ is 0 (bugs B63: from 17.4 on).
_SATURATED = (18.0, 22.0)
# A slope from e⁻ˣ errs by what a half-precision matmul makes of x, 2⁻⁸ of x and of log N beside it (12 % for
# x = 22 and N = 8192), and by a few roundings of its own; one from 1 − σ is 0.
_SLOPE_FACTOR = 0.25
_WIDE = ("float32", "bfloat16")


def _blocks_fit(case: Case, contract: Contract) -> bool:
    able = case.family != "sigmoid" or case.option("bias") is not None or "bias" in contract.options
    return able and not case.option("causal") and (case["N"] - 1) // contract.supports.multiple_of >= 1


def _block_additivity(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """The keys dealt at random to two calls; dq adds up as well, dk and dv are each key's own."""
    own = length_given(case, inputs, contract)
    if own is None:
        return None
    multiple = contract.supports.multiple_of
    cut = multiple * choice(case, "block-additivity", 1, (case["N"] - 1) // multiple + 1)
    order = torch.randperm(case["N"], generator=generator(case, "block-additivity"))
    k, v = own.tensors["k"], own.tensors["v"]
    calls = [base_call(case, inputs, own)]
    relations: list[Relation] = []
    for number, (words, keys) in enumerate(
        ((f"{cut} of its keys", order[:cut]), ("the others", order[cut:])), 1
    ):
        part = changed(own, k=k[:, :, keys], v=v[:, :, keys])
        calls.append(attention_call(case, words, part))
        selects: dict[str, Selects] = dict.fromkeys("kv", (_at(keys), None))
        relations += same_gradients(case, own, selects, call=number)
    for name in ("o", "dq") if own.cotangents else ("o",):
        relations.append(Balance((Term(1, name), Term(2, name), Term(0, name, -1.0))))
    return Plan(tuple(calls), tuple(relations))


def _at(keys: torch.Tensor) -> Select:
    return lambda x: x[:, :, keys]


def _slope_fits(case: Case, contract: Contract) -> bool:
    precision = contract.precision.resolved(case.dtype)
    stored = (precision.matmul_input, precision.scores, precision.dscores, precision.probabilities)
    wide = case.dtype in _WIDE and "float16" not in stored
    return wide and case.option("cotangents") is not None and contract.differentiable is not False


def _saturated_slope(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """Every score far above 0: dq and dk are sums of positive terms, each with the factor e⁻ˣ/(1 + e⁻ˣ)².

    All of q·k is in the first coordinate, and the bias 0, or −log N where the kernel takes none.
    """
    scale = float(inputs.options["scale"])
    exponent = math.floor(-math.log2(abs(scale))) if scale else math.inf
    if not -60 < exponent < 60:
        return None
    batch, heads, groups, m, n, d, e = (case[symbol] for symbol in "BHGMNDE")
    random = generator(case, "saturated-slope")
    given = {"bias": 0.0} if "bias" in contract.options else {}
    low, high = _SATURATED
    x = low + (high - low) * torch.rand(batch, groups, n, generator=random, dtype=torch.float64)
    x = x + (0.0 if given else math.log(n))
    q, k = torch.zeros(batch, heads, m, d), torch.zeros(batch, groups, n, d)
    q[..., 0] = math.copysign(2.0**exponent, scale)
    k[..., 0] = x / (abs(scale) * 2.0**exponent)
    v, do = (
        torch.randint(1, 5, shape, generator=random) / 4.0
        for shape in ((batch, groups, n, e), (batch, heads, m, e))
    )
    tensors = {name: value.to(case.torch_dtype) for name, value in (("q", q), ("k", k), ("v", v))}
    made = Inputs(tensors, {"scale": scale, **given}, {"o": do.to(case.torch_dtype)})
    call = attention_call(case, "every score far above 0", made, familiar=False)
    relations = []
    for name, exact in _slope_gradients(made, given.get("bias", -math.log(n))).items():
        reach = _SLOPE_FACTOR * exact.abs()
        relations.append(Bounds(0, name, exact - reach, exact + reach, strict=True))
    return Plan((call,), tuple(relations))


def _slope_gradients(inputs: Inputs, bias: float) -> dict[str, torch.Tensor]:
    """dq and dk of sigmoid attention in float64, without cancellation."""
    q, k, v = (inputs.tensors[name].double() for name in "qkv")
    scale, do = inputs.options["scale"], inputs.cotangents["o"].double()
    rows = q.reshape(*k.shape[:2], -1, k.shape[3])
    decay = torch.exp(-(scale * (rows @ k.mT) + bias))
    ds = decay / (1.0 + decay).square() * (do.reshape(*rows.shape[:3], -1) @ v.mT)
    return {"dq": scale * (ds @ k).reshape(q.shape), "dk": scale * (ds.mT @ rows)}


def _bias_norm(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Scores of 0: σ(−log n) = 1/(n + 1) and σ(0) = 1/2 for each of n keys (theory.md SIG-3)."""
    n, group = case["N"], case["H"] // case["G"]
    q, v = torch.zeros_like(inputs.tensors["q"]), inputs.tensors["v"].nan_to_num(0.0, 0.0, 0.0)
    k = inputs.tensors["k"].nan_to_num(0.0, 0.0, 0.0)
    zero = changed(inputs, q=q, k=k, v=v, bias=None, causal=None, cotangents=None)
    wide = v.double().repeat_interleave(group, 1)
    total, size = (x.sum(2, keepdim=True).expand(-1, -1, case["M"], -1) for x in (wide, wide.abs()))
    weights = [("zero scores and the default bias", zero, 1.0 / (n + 1.0))]
    if "bias" in contract.options:
        weights.append(("zero scores and a bias of 0", changed(zero, bias=0.0), 0.5))
    calls = tuple(attention_call(case, words, made, familiar=False) for words, made, _ in weights)
    relations = tuple(
        Balance((Term(call, "o"),), constant=weight * total, radius=2.0**-52 * (n + 2) * weight * size)
        for call, (_, _, weight) in enumerate(weights)
    )
    return Plan(calls, relations)


def _homogeneity(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """q twice as large: o, dk and dv by 2^power, dq by 2^(power − 1); doubling is exact."""
    q = inputs.tensors["q"]
    if bool(((2.0 * q).isinf() & q.isfinite()).any()):
        return None
    power = int(case.option("power", 1))
    calls = (
        as_it_is(case, inputs),
        attention_call(case, "q twice as large", changed(inputs, q=2.0 * q), familiar=False),
    )
    powers = {"o": power}
    if inputs.cotangents:
        powers |= {"dq": power - 1, "dk": power, "dv": power}
    relations = [Balance((Term(1, name), Term(0, name, -(2.0**p)))) for name, p in powers.items()]
    return Plan(calls, tuple(relations))


def _common_shift(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """One vector added to all queries and keys, β = 1, on a grid on which that is exact (theory.md PD-2)."""
    own = changed(inputs, beta=None)
    q, k = own.tensors["q"], own.tensors["k"]
    steps = [grid_step(x) for x in (q, k)]
    if None in steps:
        return None
    step = max(step for step in steps if step is not None)
    draw = torch.randint(-64, 65, (case["D"],), generator=generator(case, "common-shift")).double() * step
    on_grid = {name: (x.double() / step).round() * step for name, x in (("q", q), ("k", k))}
    base, moved = (
        changed(own, **{name: (x + shift).to(case.torch_dtype) for name, x in on_grid.items()})
        for shift in (torch.zeros_like(draw), draw)
    )
    calls = (
        attention_call(case, "q and k on a coarse grid", base, familiar=False),
        attention_call(case, "one vector added to all of them", moved, familiar=False),
    )
    return Plan(calls, (*all_same(case, base), *same_gradients(case, base, every_gradient(case, base))))


def _widened(case: Case, contract: Contract) -> bool:
    return affordable(case, 2)


def _constant_windows(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Each key twice, in one window or in windows of its own, is the key once (theory.md PD-3, EXA-5f).

    The gradients of both copies add up to that of the key.
    """
    heads = torch.arange(case["H"])
    base = changed(inputs, pool=(1,) * case["H"])
    pool = tuple((2 - (heads + case.seed) % 2).tolist())
    copies: dict[str, Any] = {name: inputs.tensors[name].repeat_interleave(2, 2) for name in "kv"}
    twice = changed(inputs, pool=pool, **copies)
    calls = (
        attention_call(case, "windows of one key", base),
        attention_call(case, f"each key twice, in windows of {pool}", twice, familiar=False),
    )
    relations: list[Relation] = [same("o"), *same_gradients(case, base, {"q": (None, None)})]
    if base.cotangents:
        for name in ("dk", "dv"):
            both = [Term(1, name, 1.0, _every_second(start)) for start in (0, 1)]
            relations.append(Balance((*both, Term(0, name, -1.0))))
    return Plan(calls, tuple(relations))


def _every_second(start: int) -> Select:
    return lambda x: x[:, :, start::2]


def _window_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Keys permuted within windows that all heads share, the ragged last one among them."""
    pool = min(max(*inputs.options["pool"], 2), case["N"])
    base = changed(inputs, pool=(pool,) * case["H"])
    random = generator(case, "key-permutation")
    starts = range(0, case["N"], pool)
    lengths = [min(pool, case["N"] - start) for start in starts]
    order = torch.cat(
        [
            start + torch.randperm(length, generator=random)
            for start, length in zip(starts, lengths, strict=True)
        ]
    )
    k, v = (inputs.tensors[name][:, :, order] for name in "kv")
    calls = (
        attention_call(case, f"windows of {pool} keys", base),
        attention_call(case, "the keys of each window permuted", changed(base, k=k, v=v)),
    )
    by_key: Selects = (lambda x: x[:, :, order], None)
    selects = {**every_gradient(case, base), "k": by_key, "v": by_key}
    return Plan(calls, (*all_same(case, base), *same_gradients(case, base, selects)))


def _equal_halves(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Both halves of q and k the same, λ = 1: the attentions cancel, and dv and the halves of dq and dk."""
    d = case["D"]
    halves = {name: torch.cat([inputs.tensors[name][..., :d]] * 2, 3) for name in "qk"}
    made = changed(inputs, lam=torch.ones_like(inputs.tensors["lam"]), **halves)
    call = attention_call(case, "both halves the same and λ = 1", made, familiar=False)
    relations = [Balance((Term(0, "o"),))]
    if made.cotangents:
        relations.append(Balance((Term(0, "dv"),)))
        for name in ("dq", "dk"):
            both = [Term(0, name, 1.0, rows_from(start, start + d, 3)) for start in (0, d)]
            relations.append(Balance(tuple(both)))
    return Plan((call,), tuple(relations))


def _lambda_linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """λ, 2λ and 0: o and all gradients but dλ lie on a line, dλ does not depend on λ."""
    lam = inputs.tensors["lam"]
    if bool((2.0 * lam).isinf().any()):
        return None
    calls = (
        as_it_is(case, inputs),
        attention_call(case, "2λ", changed(inputs, lam=2.0 * lam), familiar=False),
        attention_call(case, "λ = 0", changed(inputs, lam=torch.zeros_like(lam)), familiar=False),
    )
    names = ["o", *(f"d{name}" for name in differentiated(case, inputs) if name != "lam")]
    lines = [
        Balance((Term(1, x), Term(2, x), Term(0, x, -2.0))) for x in names[: None if inputs.cotangents else 1]
    ]
    fixed = [
        relation
        for call in (1, 2)
        for relation in same_gradients(case, inputs, {"lam": (None, None)}, call=call)
    ]
    return Plan(calls, (*lines, *fixed))


OWN: Mapping[str, Mapping[str, Recipe]] = {
    "sigmoid": {
        "block-additivity": Recipe(_blocks_fit, _block_additivity),
        "saturated-slope": Recipe(_slope_fits, _saturated_slope),
        "bias-norm": Recipe(anything, _bias_norm),
    },
    "relu": {
        "block-additivity": Recipe(_blocks_fit, _block_additivity),
        "positive-homogeneity": Recipe(anything, _homogeneity),
    },
    "batch_normalised": {"common-shift": Recipe(anything, _common_shift)},
    "scaled_head": {
        "key-permutation": Recipe(lambda case, contract: case["N"] > 1, _window_permutation),
        "constant-windows": Recipe(_widened, _constant_windows),
    },
    "differential": {
        "equal-halves": Recipe(anything, _equal_halves),
        "lambda-linearity": Recipe(anything, _lambda_linearity),
    },
}
"""By family and name of the invariant, how it is tried."""
