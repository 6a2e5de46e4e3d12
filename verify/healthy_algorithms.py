"""Correct softmax by other algorithms, in plain torch: what thresholds are fitted to and validated on.

Each is written from the formula and shares no code with the suite's kernels. They differ in what decides how
rounding errors add up: the order and number of sums, when the accumulator is rescaled, in which base, whether
P is normalised before it is rounded, how queries are tiled or packed. All round P to v's dtype before the
second matmul and the output once; every other step is float32, which is what stands in their contract.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.kernels.softmax import attention
from attnproof.properties.contract import Contract, Precision, contract_of, promises

__all__ = [
    "backwards",
    "base_two",
    "base_two_softmax_rows",
    "divided_first",
    "key_by_key",
    "lazy_rescaling",
    "online_logsumexp",
    "packed_groups",
    "pairwise_logsumexp",
    "scaled_queries",
    "split_and_merge",
    "tiles_16_16",
    "tiles_32_128",
    "tiles_128_32",
    "tree_of_tiles",
    "triton_16_16",
    "triton_32_128",
    "triton_64_16",
    "triton_tf32",
    "two_pass",
    "two_pass_softmax_rows",
]

_LOG2E = math.log2(math.e)
# A stale maximum is replaced when it is exceeded by more than log 256, as in FlashAttention-4: P then stays
# below 256.
_LAZY = 8.0 / _LOG2E

_OPTIONS = ("causal", "window", "softcap", "bias", "sinks", "return_lse")
# q and k enter their matmul as they are; 0·NaN of masked keys reaches the second matmul.
_UNSCALED = Contract(
    family="softmax",
    options=_OPTIONS,
    unseen_nonfinite="may-leak",
    differentiable=False,
    precision=Precision(matmul_input="ieee"),
)
_SCALED = dataclasses.replace(_UNSCALED, precision=Precision())

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call as its algorithms take it: rows of queries over keys, everything float32.

    Attributes:
        q: (B, X, R, D); k, v: (B, X, N, D) and (B, X, N, E), X heads or groups of them.
        position: (R,) of each query among the keys.
        bias: (B, X, R, N) or None; sink: (1, X, R, 1) or None.
        dtype: of the inputs, in which P and the output are stored.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    bias: torch.Tensor | None
    sink: torch.Tensor | None
    dtype: torch.dtype
    scale: float
    causal: bool
    window: tuple[int | None, int | None] | None
    softcap: float | None

    def hidden(self, rows: slice, keys: slice) -> torch.Tensor:
        """Bool (R, N) of the tile, the keys that a query does not see by position."""
        p = self.position[rows, None]
        j = torch.arange(self.k.shape[2])[None, keys]
        hidden = j > p if self.causal else torch.zeros(p.shape[0], j.shape[1], dtype=torch.bool)
        left, right = self.window or (None, None)
        if left is not None:
            hidden = hidden | (j < p - left)
        if right is not None:
            hidden = hidden | (j > p + right)
        return hidden

    def scores(self, rows: slice = slice(None), keys: slice = slice(None)) -> torch.Tensor:
        """The tile's scores, (B, X, R, N) in nats, −inf where unseen."""
        s = (self.q[:, :, rows] @ self.k[:, :, keys].transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        if self.bias is not None:
            s = s + self.bias[:, :, rows, keys]
        return s.masked_fill(self.hidden(rows, keys), -torch.inf)

    def stored(self, p: torch.Tensor) -> torch.Tensor:
        """P as it is stored for the second matmul."""
        return p.to(self.dtype).float()

    def begin(self, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maximum, sum and accumulator before the first key: those of the sink, if there is one."""
        shape = self.q[:, :, rows].shape[:3]
        m = torch.full((*shape, 1), -torch.inf)
        if self.sink is not None:
            m = self.sink[:, :, rows].expand_as(m)
        return m, (m != -torch.inf).float(), torch.zeros(*shape, self.v.shape[3])


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    packed: bool = False,
) -> _Call:
    """The call with keys repeated for each query head, or (``packed``) queries of a group as rows."""
    (b, heads, m, d), groups, n = q.shape, k.shape[1], k.shape[2]
    group = heads // groups
    x, rows = (groups, group * m) if packed else (heads, m)
    position = torch.arange(m) + (n - m)
    repeat = 1 if packed else group
    if bias is not None:
        bias = bias.float().expand(b, heads, m, n).reshape(b, x, rows, n)
    if sinks is not None:
        sinks = sinks.float().reshape(1, heads, 1, 1).expand(1, heads, m, 1).reshape(1, x, rows, 1)
    return _Call(
        q=q.float().reshape(b, x, rows, d),
        k=k.float().repeat_interleave(repeat, 1),
        v=v.float().repeat_interleave(repeat, 1),
        position=position.repeat(group) if packed else position,
        bias=bias,
        sink=sinks,
        dtype=q.dtype,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Algorithm = Callable[[_Call], tuple[torch.Tensor, torch.Tensor]]


def _finite(m: torch.Tensor) -> torch.Tensor:
    """``m``, 0 where it is −inf, so that −inf less it is −inf."""
    return torch.where(m == -torch.inf, 0.0, m)


def _finished(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a state; a row that saw nothing has o = 0 and lse = −inf."""
    m, total, acc = state
    return acc / torch.where(total == 0.0, 1.0, total), m + torch.log(total)


def _tile_state(call: _Call, rows: slice, keys: slice) -> State:
    """Maximum, sum and accumulator of one tile of keys by itself."""
    s = call.scores(rows, keys)
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - _finite(m))
    return m, p.sum(-1, keepdim=True), call.stored(p) @ call.v[:, :, keys]


def _joined(a: State, b: State) -> State:
    """The state of both sets of keys (Milakov & Gimelshein 2018, section 3.1)."""
    m = torch.maximum(a[0], b[0])
    left, right = torch.exp(a[0] - _finite(m)), torch.exp(b[0] - _finite(m))
    return m, a[1] * left + b[1] * right, a[2] * left + b[2] * right


def _online(call: _Call, rows: slice, tile: int, *, reverse: bool = False, slack: float = 0.0) -> State:
    """Keys tile by tile; the maximum in use is replaced where it is exceeded by more than ``slack``."""
    m, total, acc = call.begin(rows)
    starts = range(0, call.k.shape[2], tile)
    for start in reversed(starts) if reverse else starts:
        keys = slice(start, start + tile)
        s = call.scores(rows, keys)
        highest = torch.maximum(m, s.amax(-1, keepdim=True))
        new = torch.where(highest - m > slack, highest, m)
        alpha, p = torch.exp(m - _finite(new)), torch.exp(s - _finite(new))
        total = total * alpha + p.sum(-1, keepdim=True)
        acc = acc * alpha + call.stored(p) @ call.v[:, :, keys]
        m = new
    return m, total, acc


def _tiled(block_m: int, block_n: int, *, reverse: bool = False, slack: float = 0.0) -> Algorithm:
    """Online softmax over tiles of ``block_n`` keys for ``block_m`` queries at a time."""

    def run(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            _finished(_online(call, slice(start, start + block_m), block_n, reverse=reverse, slack=slack))
            for start in range(0, max(1, call.q.shape[2]), block_m)
        ]
        return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    return run


def _running_sum(call: _Call, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of each row by a pass over its scores."""
    m, total, _ = call.begin()
    for start in range(0, call.k.shape[2], tile):
        s = call.scores(keys=slice(start, start + tile))
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        rescaled = total * torch.exp(m - _finite(new))
        total = rescaled + torch.exp(s - _finite(new)).sum(-1, keepdim=True)
        m = new
    return m, total


def _two_pass(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    m, total = _running_sum(call, 64)
    acc = call.begin()[2]
    for start in range(0, call.k.shape[2], 64):
        keys = slice(start, start + 64)
        acc = acc + call.stored(torch.exp(call.scores(keys=keys) - _finite(m))) @ call.v[:, :, keys]
    return _finished((m, total, acc))


def _divided_first(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    m, total = _running_sum(call, 128)
    p = torch.exp(call.scores() - _finite(m)) / torch.where(total == 0.0, 1.0, total)
    return call.stored(p) @ call.v, m + torch.log(total)


def _split_and_merge(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to five parts of the keys, each normalised with its log-sum-exp; the merge normalises again.

    Without the second normalisation (weights e^(lse_i − lse)) the rounding of lse would be relative to all of
    the output, which at logits of 10⁴ is a loss of ten bits: theory.md LSE-7.
    """
    keys = call.k.shape[2]
    size = max(1, -(-keys // 5))
    cuts = [slice(start, start + size) for start in range(0, keys, size)]
    parts = [_finished(_tile_state(call, slice(None), cut)) for cut in cuts]
    m, total, acc = call.begin()
    largest = torch.stack([m, *(lse for _, lse in parts)]).amax(0)
    total = total * torch.exp(m - _finite(largest))
    for o, lse in parts:
        weight = torch.exp(lse - _finite(largest))
        total, acc = total + weight, acc + weight * o
    return _finished((largest, total, acc))


def _tree(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of 16 keys, joined two by two."""
    every = slice(None)
    states = [call.begin()]
    states += [_tile_state(call, every, slice(j, j + 16)) for j in range(0, call.k.shape[2], 16)]
    while len(states) > 1:
        pairs = zip(states[::2], states[1::2], strict=False)
        states = [_joined(a, b) for a, b in pairs] + (states[-1:] if len(states) % 2 else [])
    return _finished(states[0])


def _base_two(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponentials in base two, log2 e folded into the scale; a bias is in nats, and so is the difference."""
    if call.bias is None:
        folded = call.scale if call.softcap is None else call.scale / call.softcap
        s = (call.q @ call.k.transpose(-1, -2)) * (folded * (_LOG2E if call.softcap is None else 1.0))
        if call.softcap is not None:
            s = torch.tanh(s) * (call.softcap * _LOG2E)
        s = s.masked_fill(call.hidden(slice(None), slice(None)), -torch.inf)
        unit = 1.0
    else:
        s, unit = call.scores(), _LOG2E
    m, total, acc = call.begin()
    m = m * (_LOG2E / unit)
    if s.shape[-1]:
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        p = torch.exp2((s - _finite(new)) * unit)
        total = total * torch.exp2((m - _finite(new)) * unit) + p.sum(-1, keepdim=True)
        m, acc = new, call.stored(p) @ call.v
    o, _ = _finished((m, total, acc))
    return o, (m * unit + torch.log2(total)) / _LOG2E


def _target(
    name: str, algorithm: Algorithm, words: str, *, packed: bool = False, scaled: bool = False
) -> Callable[..., Result]:
    """The algorithm as a kernel under its contract."""

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False, **options: Any
    ) -> Result:
        if scaled:
            scale = options.pop("scale")
            q, options["scale"] = (q.float() * scale).to(q.dtype), 1.0
        o, lse = algorithm(_call(q, k, v, packed=packed, **options))
        o = o.to(q.dtype).reshape(*q.shape[:3], v.shape[3])
        return (o, lse.reshape(q.shape[:3])) if return_lse else o

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"Softmax attention {words}; arguments and shapes as in contract.md."
    return promises(_SCALED if scaled else _UNSCALED)(kernel)


base_two = _target("base_two", _base_two, "with exponentials in base two, log2 e folded into the scale")
lazy_rescaling = _target(
    "lazy_rescaling", _tiled(64, 32, slack=_LAZY), "that rescales only when the maximum rises by log 256"
)
split_and_merge = _target("split_and_merge", _split_and_merge, "in parts of the keys, merged by log-sum-exps")
two_pass = _target("two_pass", _two_pass, "by a pass for maximum and sum and another for P·V")
packed_groups = _target(
    "packed_groups", _tiled(64, 64), "with the queries of a group as rows of one tile", packed=True
)
divided_first = _target("divided_first", _divided_first, "with P normalised before it is rounded")
backwards = _target("backwards", _tiled(64, 32, reverse=True), "over the keys from last to first")
scaled_queries = _target("scaled_queries", _tiled(64, 64), "of queries scaled and rounded", scaled=True)
tree_of_tiles = _target("tree_of_tiles", _tree, "of tiles joined two by two")
key_by_key = _target("key_by_key", _tiled(1 << 20, 1), "one key at a time")
tiles_16_16 = _target("tiles_16_16", _tiled(16, 16), "by an online softmax in tiles of 16 by 16")
tiles_32_128 = _target("tiles_32_128", _tiled(32, 128), "by an online softmax in tiles of 32 by 128")
tiles_128_32 = _target("tiles_128_32", _tiled(128, 32), "by an online softmax in tiles of 128 by 32")


def _triton(
    name: str, block_m: int | None, block_n: int | None, precision: str = "ieee"
) -> Callable[..., Result]:
    """The suite's Triton kernel with other tiles, or with float32 operands rounded to tf32."""
    own = contract_of(attention)
    assert own is not None

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Result:
        return attention(q, k, v, **options, block_m=block_m, block_n=block_n, input_precision=precision)

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"``attention`` with tiles of {block_m} by {block_n}, operands {precision}."
    if precision == "tf32":
        own = dataclasses.replace(
            own, dtypes=("float32",), precision=dataclasses.replace(own.precision, matmul_input="tf32")
        )
    return promises(own)(kernel)


triton_16_16 = _triton("triton_16_16", 16, 16)
triton_32_128 = _triton("triton_32_128", 32, 128)
triton_64_16 = _triton("triton_64_16", 64, 16)
triton_tf32 = _triton("triton_tf32", None, None, "tf32")


def _running(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of e^(x − maximum) over the last axis, 16 entries at a time, both (…, 1)."""
    m = torch.full((*x.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(m)
    for start in range(0, x.shape[-1], 16):
        part = x[..., start : start + 16].float()
        new = torch.maximum(m, part.amax(-1, keepdim=True))
        total = total * torch.exp(m - _finite(new)) + torch.exp(part - _finite(new)).sum(-1, keepdim=True)
        m = new
    return m, total


@promises(Contract(family="logsumexp"))
def online_logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log Σ e^x over the last axis, 16 entries at a time with a running maximum; x (…, N)."""
    m, total = _running(x)
    return (m + torch.log(total)).squeeze(-1).to(x.dtype)


@promises(Contract(family="logsumexp"))
def pairwise_logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log Σ e^x over the last axis in base two, by sums of pairs; x (…, N)."""
    if not x.shape[-1]:
        return x.new_full(x.shape[:-1], -torch.inf)
    m = _finite(x.float().amax(-1, keepdim=True))
    p = torch.exp2((x.float() - m) * _LOG2E)
    while p.shape[-1] > 1:
        p = torch.nn.functional.pad(p, (0, p.shape[-1] % 2))
        p = p[..., ::2] + p[..., 1::2]
    return (m + torch.log2(p) / _LOG2E).squeeze(-1).to(x.dtype)


@promises(Contract(family="softmax_rows"))
def base_two_softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis in base two, times the reciprocal of the sum; x (…, N)."""
    if not x.shape[-1]:
        return torch.zeros_like(x)
    p = torch.exp2((x.float() - _finite(x.float().amax(-1, keepdim=True))) * _LOG2E)
    total = p.sum(-1, keepdim=True)
    return (p * (1.0 / torch.where(total == 0.0, 1.0, total))).to(x.dtype)


@promises(Contract(family="softmax_rows"))
def two_pass_softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis: maximum and sum 16 entries at a time, then the quotients; x (…, N)."""
    m, total = _running(x)
    return (torch.exp(x.float() - _finite(m)) / torch.where(total == 0.0, 1.0, total)).to(x.dtype)
