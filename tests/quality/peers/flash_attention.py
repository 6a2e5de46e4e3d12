"""FlashAttention: at most twice the error of the same formula in half precision.

Source: Dao-AILab/flash-attention, tests/test_flash_attn.py as of 0251105 (2026-08-15, shared/peers.md) and,
for FA3, hopper/test_flash_attn.py at 01afd16d. ``ref`` is plain torch in float32, rounded to the inputs'
dtype at the end; ``pt`` the same steps in the inputs' dtype, with k instead of q scaled. m is the maximum
over all elements of all rows.

* FA2: m(out − ref) ≤ 2 m(pt − ref), with 1e-5 more in the causal and split-KV tests.
* FA3: m(out − ref) ≤ r m(pt − ref) + 2 m(((ref + 0.3) − 0.3) − ref), r = 2, or 3 with a soft cap.

Kept: randn inputs and seed 0, float16 and bfloat16, the length pairs that are listed below, head dimensions
32, 40, 59, 64, 96, 128, 192, 256; MHA, MQA, GQA; windows drawn at random, both sides; the soft cap 50 with q
multiplied by it (FA3: 15, q multiplied by 15/4); ALiBi as a dense bias; packed sequences of random lengths;
q, k, v as slices of one tensor (the qkv-packed tests); the overflow test (q·5, k·3, v·3); the race test as
bitwise repeats; value widths that differ from D (FA3). Log-sum-exps are not asserted there, and not here.

Reduced: batch 4 to 9 → 2, heads 6 to 12 → 2 to 4 (each in full for some short lengths), lengths above 1024
left out, one or two of the parametrised products each, the race test 250 repeats → 2. Left out: dropout,
backward passes, FP8, paged and appended KV caches (3 m(pt − ref) + 1e-5), attention chunks; packed tests with
other lengths for keys than for queries, which the contract's ``cu_seqlens`` does not express.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer, product

__all__ = ["FA2", "FA3"]


@dataclass(frozen=True)
class Parameters:
    """One combination of the parametrised tests.

    ``local`` draws a window, ``slack`` is added to the tolerance, ``amplitudes`` multiply q, k, v,
    ``lengths`` are those of packed sequences, ``joint`` makes q, k, v slices of
    one tensor (batch, rows, 3, heads, D).
    """

    shape: Shape
    dtype: str
    causal: bool = False
    local: bool = False
    softcap: float = 0.0
    alibi: bool = False
    slack: float = 0.0
    amplitudes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lengths: tuple[int, ...] = ()
    joint: bool = False

    @property
    def options(self) -> frozenset[str]:
        """Keywords that the kernel must take."""
        needed = {
            "causal": self.causal,
            "window": self.local,
            "softcap": self.softcap > 0,
            "bias": self.alibi,
            "cu_seqlens": bool(self.lengths),
        }
        return frozenset(name for name, asked in needed.items() if asked)

    @property
    def label(self) -> str:
        """Shape and options in one line."""
        return " ".join([str(self.shape), *sorted(self.options), *(["qkv-packed"] * self.joint)])


def hidden_keys(queries: int, keys: int, causal: bool, window: tuple[int, int] | None) -> torch.Tensor | None:
    """True where query i may not see key j, aligned bottom right; None where nothing is masked."""
    if not causal and window is None:
        return None
    left, right = window if window is not None else (keys + queries, keys + queries)
    right = 0 if causal else right
    position = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None, :]
    return (key > position + right) | (key < position - left)


def torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    hidden: torch.Tensor | None,
    softcap: float,
    bias: torch.Tensor | None,
    exact: bool,
) -> torch.Tensor:
    """The reference (``exact``: in float32) or the baseline (in q's dtype, k scaled in place of q)."""
    dtype, root = q.dtype, math.sqrt(q.shape[-1])
    if exact:
        q, k, v = q.float(), k.float(), v.float()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k = (q / root, k) if exact else (q, k / root)
    scores = product("bhmd,bhnd->bhmn", q, k)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if bias is not None:
        scores = scores + bias
    p = torch.softmax(scores, -1).to(v.dtype)
    if hidden is not None:
        p = p.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return product("bhmn,bhne->bhme", p, v).to(dtype)


def largest(x: torch.Tensor) -> float:
    """The largest absolute value, NaN if there is one."""
    return float(x.abs().max().item())


def compare(
    out: torch.Tensor, ref: torch.Tensor, pt: torch.Tensor, factor: float, slack: float, rule: str
) -> None:
    """m(out − ref) ≤ factor·m(pt − ref) + slack, in the arithmetic of the outputs' dtype."""
    error, allowed = largest(out - ref), factor * largest(pt - ref) + slack
    if not error <= allowed:
        raise Rejection(f"max error {error:.3g} exceeds {allowed:.3g} ({rule})")


def alibi_bias(shape: Shape) -> torch.Tensor:
    """−slope·|position of the query − key|, slopes uniform in [0, 0.3): (batch, heads, queries, keys)."""
    slopes = torch.rand(shape.batch, shape.heads) * 0.3
    position = torch.arange(shape.queries)[:, None] + shape.keys - shape.queries
    distance = (position - torch.arange(shape.keys)[None, :]).abs()
    return -slopes[:, :, None, None] * distance


def judged(parameters: Parameters, kernel: Kernel, *, hopper: bool) -> None:
    """One test: draw, call, compare."""
    torch.manual_seed(0)
    shape = parameters.shape
    q, k, v = shape.draw(torch.randn, parameters.dtype)
    if parameters.joint:
        q, k, v = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2).transpose(1, 3).unbind(2)
    a_q, a_k, a_v = parameters.amplitudes
    if parameters.softcap > 0:
        a_q = parameters.softcap / 4 if hopper else parameters.softcap
    if (a_q, a_k, a_v) != (1.0, 1.0, 1.0):
        q, k, v = q * a_q, k * a_k, v * a_v
    window: tuple[int, int] | None = None
    if parameters.local:
        left, right = torch.randint(0, shape.keys, (2,)).tolist()
        window = (left, right)
    bias = alibi_bias(shape) if parameters.alibi else None
    given: dict[str, Any] = {"causal": parameters.causal, "window": window, "bias": bias}
    given["softcap"] = parameters.softcap or None
    options = {name: value for name, value in given.items() if name in parameters.options}
    if parameters.lengths:
        out, ref, pt = packed(kernel, q, k, v, parameters, window, options)
    else:
        hidden = hidden_keys(shape.queries, shape.keys, parameters.causal, window)
        plain = partial(torch_attention, q, k, v, hidden=hidden, softcap=parameters.softcap, bias=bias)
        out = kernel(q, k, v, scale=shape.width**-0.5, **options)
        ref, pt = plain(exact=True), plain(exact=False)
    if hopper:
        compare(
            out, ref, pt, 3 if parameters.softcap else 2, 2 * largest(ref + 0.3 - 0.3 - ref), "FA3's rule"
        )
    else:
        compare(out, ref, pt, 2, parameters.slack, "twice the error in half precision")


def packed(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parameters: Parameters,
    window: tuple[int, int] | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, reference and baseline of sequences that lie one after the other."""
    ends = torch.tensor([0, *parameters.lengths]).cumsum(0)
    refs, pts = [], []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        hidden = hidden_keys(stop - start, stop - start, parameters.causal, window)
        piece = [x[:, :, start:stop] for x in (q, k, v)]
        plain = partial(torch_attention, *piece, hidden=hidden, softcap=parameters.softcap, bias=None)
        refs.append(plain(exact=True))
        pts.append(plain(exact=False))
    out = kernel(q, k, v, scale=q.shape[-1] ** -0.5, **{**options, "cu_seqlens": ends.to(torch.int32)})
    return out, torch.cat(refs, 2), torch.cat(pts, 2)


def repeated(shape: Shape, dtype: str, kernel: Kernel) -> None:
    """The race test: the same call gives the same bits."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, dtype)
    first = kernel(q, k, v, scale=shape.width**-0.5)
    for _ in range(2):
        if not torch.equal(kernel(q, k, v, scale=shape.width**-0.5), first):
            raise Rejection("a repeated call gives other bits (race test)")


H, B = "float16", "bfloat16"

OUTPUT = (
    Parameters(Shape(113, 203, 40, heads=6, batch=4), H),
    Parameters(Shape(113, 203, 64), B, softcap=50.0),
    Parameters(Shape(128, 217, 64, heads=4, groups=2), B, causal=True),
    Parameters(Shape(113, 211, 59, groups=1), B, local=True),
    Parameters(Shape(108, 256, 64), H, causal=True, local=True),
    Parameters(Shape(108, 256, 256), H, causal=True),
    Parameters(Shape(256, 512, 128), H, causal=True, softcap=50.0),
    Parameters(Shape(512, 256, 64), B, causal=True),
    Parameters(Shape(512, 256, 96), H, local=True),
    Parameters(Shape(1024, 1024, 64), H, causal=True),
    Parameters(Shape(1023, 1024, 32), B, causal=True),
    Parameters(Shape(1024, 1023, 64), H),
    Parameters(Shape(97, 97, 64), H, joint=True),
    Parameters(Shape(200, 200, 32), B, causal=True, joint=True),
    Parameters(Shape(113, 203, 64), H, alibi=True),
    Parameters(Shape(256, 512, 64), B, causal=True, alibi=True),
)

CAUSAL = tuple(
    Parameters(Shape(m, n, d, heads=9 if m < 9 else 2), dtype, causal=True, local=local, slack=1e-5)
    for m, n, d, dtype, local in (
        (1, 239, 64, H, False),
        (3, 799, 64, B, False),
        (3, 799, 192, H, False),
        (127, 512, 64, H, False),
        (127, 513, 128, B, False),
        (113, 211, 64, H, True),
        (239, 1, 64, H, False),
        (799, 3, 64, B, True),
    )
)

SPLIT = (
    Parameters(Shape(1, 339, 64), H, slack=1e-5),
    Parameters(Shape(64, 800, 64), H, causal=True, slack=1e-5),
    Parameters(Shape(3, 1024, 128), H, slack=1e-5),
)

# generate_random_padding_mask(mode="random") draws each length from the last 20 below the padded one.
PACKED = (
    Parameters(Shape(277, 277, 64, batch=1), H, lengths=(97, 83, 97)),
    Parameters(Shape(562, 562, 64, heads=4, groups=2, batch=1), B, causal=True, lengths=(200, 181, 181)),
    Parameters(Shape(249, 249, 64, batch=1), H, causal=True, local=True, lengths=(128, 121)),
)

OVERFLOW = tuple(
    Parameters(Shape(n, n, d), H, causal=causal, amplitudes=(5.0, 3.0, 3.0))
    for n, d, causal in ((1, 16, False), (2, 32, True), (17, 16, True), (128, 64, False))
)

HOPPER = (
    Parameters(Shape(1, 1, 64), B),
    Parameters(Shape(64, 128, 64, heads=6, batch=9), H),
    Parameters(Shape(128, 192, 256), B, causal=True),
    Parameters(Shape(239, 1, 64), H, causal=True),
    Parameters(Shape(799, 3, 64), B, local=True),
    Parameters(Shape(113, 203, 64, heads=6, groups=2), H, causal=True, local=True),
    Parameters(Shape(113, 128, 64, groups=1), B, softcap=15.0),
    Parameters(Shape(108, 256, 96), H, causal=True, softcap=15.0),
    Parameters(Shape(256, 512, 64, value_width=256), B, causal=True),
    Parameters(Shape(512, 256, 128), H, causal=True),
    Parameters(Shape(1024, 1024, 64), B, causal=True),
    Parameters(Shape(1023, 1024, 64), H),
    Parameters(Shape(382, 382, 64, heads=4, groups=2, batch=1), B, causal=True, lengths=(128, 127, 127)),
)


def as_test(parameters: Parameters, *, hopper: bool = False) -> PeerTest:
    """The test of one combination."""
    body = partial(judged, parameters, hopper=hopper)
    return PeerTest(parameters.label, parameters.dtype, parameters.options, body)


RACE = PeerTest("race", H, frozenset(), partial(repeated, Shape(239, 239, 64), H))

FA2 = SuitePeer(
    "flash-attention-2",
    "Dao-AILab/flash-attention tests/test_flash_attn.py 0251105 (2026-08-15)",
    (*(as_test(p) for p in (*OUTPUT, *CAUSAL, *SPLIT, *PACKED, *OVERFLOW)), RACE),
)

FA3 = SuitePeer(
    "flash-attention-3",
    "Dao-AILab/flash-attention hopper/test_flash_attn.py 01afd16d248c4c7d0f9aed1914084f16c490eaed",
    tuple(as_test(p, hopper=True) for p in HOPPER),
)
