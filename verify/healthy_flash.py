"""Flash attention in plain torch: tiles of queries and keys, an online softmax, every option of the contract.

An implementation by other means than the suite's Triton kernels, with which it shares no code: it runs where
there is no Triton, calibrates and validates thresholds, and is the base of mutants. The algorithm is
FlashAttention's (Dao et al., arXiv 2205.14135; the accumulator is divided once, at the end, as in arXiv
2307.08691), with all batch entries and heads of a tile at once:

    m' = max(m, max_j s_j),  l' = e^{m − m'} l + Σ_j e^{s_j − m'},  o' = e^{m − m'} o + Σ_j e^{s_j − m'} v_j

All is float32, but for P, which is rounded to the inputs' dtype before it meets V, and the result. The
largest score of a row gets the weight 1 exactly, since it is subtracted from itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attnproof.properties.contract import Contract, ContractError, Precision, promises

__all__ = ["FLASH", "tiled_attention"]

# Queries and keys of a tile: as on GPUs, so that the sizes at which kernels go wrong are the same.
_TILE_M = 64
_TILE_N = 64

FLASH = Contract(
    family="softmax",
    options=("causal", "window", "softcap", "bias", "sinks", "cu_seqlens", "return_lse"),
    precision=Precision(matmul_input="ieee"),
    differentiable=False,
)


@dataclass(frozen=True, slots=True)
class _Band:
    """Query i sees the keys i + left ≤ j ≤ i + right; None where a side has no limit."""

    left: int | None
    right: int | None

    def keys(self, rows: range, length: int) -> range:
        """The starts of the key tiles, of ``length`` keys, that any of ``rows`` sees a key of."""
        low = 0 if self.left is None else max(rows.start + self.left, 0)
        high = length if self.right is None else min(rows.stop + self.right, length)
        return range(low // _TILE_N * _TILE_N, high, _TILE_N)

    def seen(self, rows: range, columns: range, device: torch.device) -> torch.Tensor:
        """Which of ``columns`` each of ``rows`` sees, bool (rows, columns)."""
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=device)[None, :]
        seen = torch.ones(len(rows), len(columns), dtype=torch.bool, device=device)
        if self.left is not None:
            seen = seen & (j >= i + self.left)
        if self.right is not None:
            seen = seen & (j <= i + self.right)
        return seen


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """The tensors of one sequence for every query head, and what they are computed with.

    Attributes:
        q: float32 (B, H, M, D); k: float32 (B, H, N, D).
        v: float32 (B, H, N, E), non-finite values replaced by 0.
        tainted: bool (B, H, N), keys whose value was not finite; None where there are none.
        bias: (B, H, M, N) or None; sinks: float32 (H,) or None.
        stored: the dtype in which P is rounded.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tainted: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    stored: torch.dtype
    scale: float
    softcap: float | None
    band: _Band


@promises(FLASH)
def tiled_attention(
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
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of q (B,H,M,D) over k (B,G,N,D), v (B,G,N,E).

    Args:
        q, k, v: float32, float16 or bfloat16, all alike, in any strides; H a multiple of G.
        scale: factor of q·k.
        causal: query i sees key j when j ≤ i + N − M.
        window: (left, right): query i, at p = i + N − M, sees p − left ≤ j ≤ p + right; None lifts a limit.
        softcap: c > 0 turns scores s into c·tanh(s / c).
        bias: added to the scores after the cap; broadcasts to (B,H,M,N); −inf masks.
        sinks: (H,) one more logit in each row's normaliser, without a value.
        cu_seqlens: int32 (P+1,) for B = 1 and M = N: P sequences packed one after the other.
        return_lse: also return the log of the normaliser.

    Returns:
        o (B,H,M,E) of q's dtype, or (o, lse) with lse (B,H,M) float32. A row without keys: o = 0, lse = −inf.

    Raises:
        ContractError: for shapes or dtypes that do not fit together.
        NotImplementedError: for float64, which float32 internals cannot serve.
    """
    _check(q, k, v)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    group = heads // k.shape[1]
    head = torch.arange(heads, device=q.device) // group
    finite = v.isfinite()
    clean = torch.where(finite, v, 0.0).float()
    tainted = None if bool(finite.all()) else ~finite.all(-1)[:, head]
    if bias is not None:
        bias = bias.expand(batch, heads, queries, keys)
    whole = _Heads(
        q=q.float(),
        k=k.float()[:, head],
        v=clean[:, head],
        tainted=tainted,
        bias=bias,
        sinks=None if sinks is None else sinks.float(),
        stored=v.dtype,
        scale=scale,
        softcap=softcap,
        band=_band(queries, keys, causal, window),
    )
    o = q.new_empty((batch, heads, queries, v.shape[3]))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    for start, stop, part in _sequences(whole, cu_seqlens):
        for first in range(0, stop - start, _TILE_M):
            rows = range(first, min(first + _TILE_M, stop - start))
            into = slice(start + rows.start, start + rows.stop)
            o_tile, lse_tile = _attended(part, rows)
            o[:, :, into] = o_tile.to(q.dtype)
            lse[:, :, into] = lse_tile
    return (o, lse) if return_lse else o


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise unless q, k and v fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fit = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    if not fit or q.shape[0] != k.shape[0] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ContractError(
            f"{shapes}: expected (B,H,M,D), (B,G,N,D) and (B,G,N,E) with H a positive multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ContractError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotImplementedError(f"q is {q.dtype}: this computes in float32; pass float32 or narrower")


def _band(queries: int, keys: int, causal: bool, window: tuple[int | None, int | None] | None) -> _Band:
    """Causal masking and a window as one band; both count from the bottom right corner."""
    shift = keys - queries
    left, right = window if window is not None else (None, None)
    low = None if left is None else shift - left
    high = None if right is None else shift + right
    if causal:
        high = shift if high is None else min(high, shift)
    return _Band(low, high)


def _sequences(whole: _Heads, cu_seqlens: torch.Tensor | None) -> Iterator[tuple[int, int, _Heads]]:
    """(start, stop) on the axis of queries, and the tensors, of each sequence of a packed batch."""
    if cu_seqlens is None:
        yield 0, whole.q.shape[2], whole
        return
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        piece = slice(start, stop)
        yield (
            start,
            stop,
            _Heads(
                q=whole.q[:, :, piece],
                k=whole.k[:, :, piece],
                v=whole.v[:, :, piece],
                tainted=None if whole.tainted is None else whole.tainted[:, :, piece],
                bias=None if whole.bias is None else whole.bias[:, :, piece, piece],
                sinks=whole.sinks,
                stored=whole.stored,
                scale=whole.scale,
                softcap=whole.softcap,
                band=whole.band,
            ),
        )


def _attended(t: _Heads, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """One tile of queries over all keys that it sees: float32 o (B, H, rows, E) and lse (B, H, rows)."""
    q = t.q[:, :, rows.start : rows.stop]
    keys = t.k.shape[2]
    # (B, H, rows): running maximum and Σ e^{s − maximum}; (B, H, rows, E): running Σ e^{s − maximum} v.
    m = q.new_full(q.shape[:3], -math.inf)
    l = torch.zeros_like(m)
    o = q.new_zeros((*q.shape[:3], t.v.shape[3]))
    poisoned = torch.zeros_like(m, dtype=torch.bool)
    if t.sinks is not None:
        m = t.sinks[:, None].expand_as(m)
        l = torch.where(m == -math.inf, 0.0, 1.0)
    for first in t.band.keys(rows, keys):
        columns = range(first, min(first + _TILE_N, keys))
        s, seen = _scores(t, q, rows, columns)
        m_new = torch.maximum(m, s.amax(-1))
        # Where every score so far is masked the maximum is −inf, and −inf − −inf would be NaN.
        shift = torch.where(m_new == -math.inf, 0.0, m_new)
        p = torch.exp(s - shift[..., None])
        alpha = torch.exp(m - shift)
        l = l * alpha + p.sum(-1)
        o = o * alpha[..., None]
        o = o + p.to(t.stored).float() @ t.v[:, :, columns.start : columns.stop]
        m = m_new
        if t.tainted is not None:
            touched = seen & t.tainted[:, :, None, columns.start : columns.stop]
            poisoned = poisoned | touched.any(-1)
    # A row that saw no key, and has no sink, has l = 0, o = 0 and m = −inf.
    total = torch.where(l == 0, 1.0, l)
    o = o / total[..., None]
    lse = m + torch.log(total)
    return o.masked_fill(poisoned[..., None], math.nan), lse


def _scores(t: _Heads, q: torch.Tensor, rows: range, columns: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a tile, (B, H, rows, columns), −inf where unseen, and what is seen, broadcastable to it."""
    s = (q @ t.k[:, :, columns.start : columns.stop].mT) * t.scale
    if t.softcap is not None:
        s = torch.tanh(s / t.softcap) * t.softcap
    seen = t.band.seen(rows, columns, q.device)
    if t.bias is not None:
        b = t.bias[:, :, rows.start : rows.stop, columns.start : columns.stop].float()
        seen = seen & (b != -math.inf)
        s = s + b
    return torch.where(seen, s, -math.inf), seen
