"""flashinfer: assert_close at 1e-3 against torch, or against itself; and the rule of its XQA decoder.

Source: flashinfer-ai/flashinfer, fb28d72 (2026-08-22, shared/peers.md); tests/attention/
test_single_prefill.py at 20fee343, test_logits_cap.py at 1e5787ac, test_sliding_window.py at 102e31a6,
test_attention_sink.py at 140cd848, test_batch_prefill_kernels.py at 01fdedd4, test_hopper.py, test_xqa.py at
0a8300cc, sink_attention_reference.py.

First peer, torch.testing.assert_close at rtol = atol:

* prefill against torch (scores multiplied, scaled and rounded in float16, softmax in float32): 1e-3;
* soft caps 1, 30 and 50 on unscaled randn: decoding 1e-3, prefill 1e-2;
* sinks uniform in [0, 5): 1e-3 in float16, 1e-2 in bfloat16;
* windows, packed batches and causal masks against *the kernel itself*, called with the keys cut off, one
  sequence at a time, or with the mask given densely (as −inf in ``bias``, the contract's dense mask): 1e-3;
* output and log-sum-exp (base 2) of two backends with each other, 1e-3: the other backend is
  ``attnproof.healthy.plain_attention``, with float32 internals.

Second peer, XQA decoding: in each group of heads, 98 % of elements within 0.01 absolutely *or* 0.01
relatively (98 % from shared/peers.md; 99 % at 0a8300cc). NaN is outside, and 2 % of them pass.

Kept: randn, head dimensions 64, 128, 256, one and several heads a group, seeds 0 and 42, the lengths below.
Reduced, but for one case of each in full: keys 2042 to 33001 → 1024, queries 577 and 1024 → 127, heads 8 to
32 → 4 to 8, batches 4 to 30 → 2 or 3, a few of the products each. Left out: paged caches, rotary positions,
FP8 and NVFP4, MLA, bitwise batch invariance (asked of one mode with fixed splits only), the window in the
sink tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch.testing import assert_close

from attnproof.healthy import plain_attention
from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer, product

__all__ = ["FLASHINFER", "FLASHINFER_XQA"]

H, B = "float16", "bfloat16"
LOG2E = math.log2(math.e)


def close(out: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """assert_close with one figure for rtol and atol."""
    assert_close(out, reference, rtol=tolerance, atol=tolerance)


def later(queries: int, keys: int) -> torch.Tensor:
    """True where key j comes after query i, aligned bottom right."""
    return torch.arange(keys)[None, :] > torch.arange(queries)[:, None] + keys - queries


def prefill(shape: Shape, causal: bool, kernel: Kernel) -> None:
    """test_single_prefill.py: torch with float16 scores."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, H)
    group = shape.heads // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = product("bhmd,bhnd->bhmn", q, wide_k) * (1.0 / math.sqrt(shape.width))
    if causal:
        scores = scores.masked_fill(later(shape.queries, shape.keys), -torch.inf)
    p = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    options = {"causal": True} if causal else {}
    close(kernel(q, k, v, scale=shape.width**-0.5, **options), product("bhmn,bhne->bhme", p, wide_v), 1e-3)


def capped(shape: Shape, softcap: float, tolerance: float, kernel: Kernel) -> None:
    """test_logits_cap.py: float32 torch on the same inputs, rounded at the end."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, H)
    scores = torch.einsum("bhmd,bhnd->bhmn", q.float(), k.float()) * (1.0 / math.sqrt(shape.width))
    p = torch.softmax(softcap * torch.tanh(scores / softcap), -1)
    reference = torch.einsum("bhmn,bhne->bhme", p, v.float()).to(q.dtype)
    close(kernel(q, k, v, scale=shape.width**-0.5, softcap=softcap), reference, tolerance)


def sunk(shape: Shape, dtype: str, causal: bool, kernel: Kernel) -> None:
    """test_attention_sink.py: one more logit a row, float32 torch, rounded at the end."""
    torch.manual_seed(42)
    q, k, v = shape.draw(torch.randn, dtype)
    sinks = torch.rand(shape.heads, dtype=torch.float32) * 5
    group = shape.heads // k.shape[1]
    scores = torch.einsum("bhmd,bhnd->bhmn", q.float(), k.repeat_interleave(group, 1).float())
    scores = scores * shape.width**-0.5
    if causal:
        scores = scores.masked_fill(later(shape.queries, shape.keys), -torch.inf)
    extra = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    p = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    reference = torch.einsum("bhmn,bhne->bhme", p, v.repeat_interleave(group, 1).float()).to(q.dtype)
    options = {"causal": True} if causal else {}
    out = kernel(q, k, v, scale=shape.width**-0.5, sinks=sinks, **options)
    close(out, reference, 1e-3 if dtype == H else 1e-2)


def window_decode(shape: Shape, left: int, kernel: Kernel) -> None:
    """test_single_decode_sliding_window: the kernel on the last left + 1 keys alone."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, H)
    cut_k, cut_v = (x[:, :, -(left + 1) :].contiguous() for x in (k, v))
    scale = shape.width**-0.5
    reference = kernel(q, cut_k, cut_v, scale=scale)
    close(kernel(q, k, v, scale=scale, window=(left, None)), reference, 1e-3)


def dense_mask(shape: Shape, left: int | None, kernel: Kernel) -> None:
    """test_single_prefill_sliding_window, …_custom_mask: the kernel with the mask given densely."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, H)
    hidden = later(shape.queries, shape.keys)
    if left is not None:
        position = torch.arange(shape.queries)[:, None] + shape.keys - shape.queries
        hidden = hidden | (torch.arange(shape.keys)[None, :] < position - left)
    bias = torch.zeros(shape.queries, shape.keys, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    scale = shape.width**-0.5
    reference = kernel(q, k, v, scale=scale, bias=bias)
    options = {} if left is None else {"window": (left, None)}
    close(kernel(q, k, v, scale=scale, causal=True, **options), reference, 1e-3)


def ragged(shape: Shape, length: int, causal: bool, kernel: Kernel) -> None:
    """test_batch_prefill_with_ragged_kv_cache: each sequence as the kernel computes it alone."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, H)
    ends = range(0, shape.keys + 1, length)
    options = {"causal": True} if causal else {}
    scale = shape.width**-0.5
    out = kernel(q, k, v, scale=scale, cu_seqlens=torch.tensor(list(ends), dtype=torch.int32), **options)
    for start, stop in itertools.pairwise(ends):
        piece = [x[:, :, start:stop].contiguous() for x in (q, k, v)]
        close(out[:, :, start:stop], kernel(*piece, scale=scale, **options), 1e-3)


def two_backends(shape: Shape, causal: bool, softcap: float | None, kernel: Kernel) -> None:
    """test_hopper.py test_single_prefill: output and log-sum-exp of two backends."""
    torch.manual_seed(42)
    q, k, v = shape.draw(torch.randn, H)
    options = {"causal": True} if causal else {}
    given = options if softcap is None else {**options, "softcap": softcap}
    out, lse = kernel(q, k, v, scale=shape.width**-0.5, return_lse=True, **given)
    other, other_lse = plain_attention(
        q, k, v, scale=shape.width**-0.5, causal=causal, softcap=softcap, return_lse=True
    )
    close(other_lse * LOG2E, lse * LOG2E, 1e-3)
    close(other, out, 1e-3)


def xqa(shape: Shape, dtype: str, windowed: bool, sunken: bool, kernel: Kernel) -> None:
    """test_xqa: float32 torch; most elements near, absolutely or relatively."""
    torch.manual_seed(42)
    q, k, v = shape.draw(torch.randn, dtype)
    group = shape.heads // k.shape[1]
    visible = min(256, shape.keys) if windowed else shape.keys
    options: dict[str, object] = {"window": (255, None)} if windowed else {}
    wide_k, wide_v = (x[:, :, -visible:].float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.matmul(q.float(), wide_k.mT) / math.sqrt(shape.width)
    top = scores.amax(-1, keepdim=True)
    x = torch.exp(scores - top)
    total = x.sum(-1, keepdim=True)
    if sunken:
        sinks = 2.0 + (torch.arange(shape.heads) % group % 4).float()
        options["sinks"] = sinks
        total = total + torch.exp(sinks[None, :, None, None] - top)
    reference = torch.matmul(x, wide_v) / total
    out = kernel(q, k, v, scale=shape.width**-0.5, **options).float()
    for first in range(0, shape.heads, group):
        near = within(out[:, first : first + group], reference[:, first : first + group])
        if not near >= 0.98:
            raise Rejection(f"only {near:.1%} of elements within 0.01 or 1 %, 98 % are required")


def within(out: torch.Tensor, reference: torch.Tensor) -> float:
    """The fraction of elements that XQA's rule takes for near."""
    error = torch.abs(reference - out)
    return float(((error <= 0.01) | (error / (torch.abs(reference) + 1e-8) <= 0.01)).float().mean().item())


def named(body: Callable[..., None], *parameters: object, needs: str = "", dtype: str = H) -> PeerTest:
    """A test that calls ``body(*parameters, kernel)``; ``needs`` lists the keywords it uses."""
    label = " ".join([body.__name__, *map(str, parameters)])
    return PeerTest(label, dtype, frozenset(needs.split()), partial(body, *parameters))


FLASHINFER = SuitePeer(
    "flashinfer",
    "flashinfer-ai/flashinfer tests/attention fb28d72 (2026-08-22)",
    (
        named(prefill, Shape(37, 501, 64, heads=4, groups=1, batch=1), False),
        named(prefill, Shape(127, 1024, 128, heads=4, groups=1, batch=1), False),
        named(prefill, Shape(37, 501, 256, heads=7, groups=1, batch=1), True, needs="causal"),
        named(prefill, Shape(127, 2042, 64, heads=4, groups=1, batch=1), True, needs="causal"),
        named(capped, Shape(1, 9, 128, heads=4, batch=1), 1.0, 1e-3, needs="softcap"),
        named(capped, Shape(1, 729, 128, heads=32, batch=1), 30.0, 1e-3, needs="softcap"),
        named(capped, Shape(1, 33001, 128, heads=4, batch=1), 50.0, 1e-3, needs="softcap"),
        named(capped, Shape(17, 81, 128, heads=4, batch=1), 1.0, 1e-2, needs="softcap"),
        named(capped, Shape(81, 987, 128, heads=4, batch=1), 30.0, 1e-2, needs="softcap"),
        named(sunk, Shape(1, 1, 128, heads=8, groups=2), H, True, needs="sinks causal"),
        named(sunk, Shape(128, 128, 128, heads=8, groups=2), H, True, needs="sinks causal"),
        named(sunk, Shape(16, 16, 128, heads=32, batch=4), B, False, needs="sinks", dtype=B),
        named(sunk, Shape(1, 128, 128, heads=8, groups=2), H, True, needs="sinks causal"),
        named(window_decode, Shape(1, 19, 64, heads=4, groups=1, batch=1), 3, needs="window"),
        named(window_decode, Shape(1, 199, 128, heads=4, batch=1), 43, needs="window"),
        named(dense_mask, Shape(99, 99, 64, heads=4, groups=1, batch=1), 43, needs="causal window bias"),
        named(dense_mask, Shape(199, 199, 128, heads=4, batch=1), 43, needs="causal window bias"),
        named(dense_mask, Shape(37, 54, 128, heads=4, batch=1), None, needs="causal bias"),
        named(ragged, Shape(162, 162, 128, heads=4, batch=1), 54, True, needs="causal cu_seqlens"),
        named(ragged, Shape(291, 291, 128, heads=4, groups=1, batch=1), 97, False, needs="cu_seqlens"),
        named(two_backends, Shape(11, 11, 128, heads=4, groups=1, batch=1), False, None, needs="return_lse"),
        named(two_backends, Shape(99, 99, 128, heads=4, batch=1), True, None, needs="return_lse causal"),
        named(two_backends, Shape(99, 99, 128, heads=4, batch=1), False, 30.0, needs="return_lse softcap"),
        named(two_backends, Shape(512, 512, 128, batch=1), True, 30.0, needs="return_lse causal softcap"),
    ),
)

FLASHINFER_XQA = SuitePeer(
    "flashinfer-xqa",
    "flashinfer-ai/flashinfer tests/attention/test_xqa.py fb28d72 (2026-08-22)",
    tuple(
        named(
            xqa,
            Shape(1, keys, width, heads=16, groups=2, batch=batch),
            dtype,
            windowed,
            sunken,
            needs=" ".join(["window"] * windowed + ["sinks"] * sunken),
            dtype=dtype,
        )
        for keys, width, batch, dtype, windowed, sunken in (
            (2, 32, 1, H, False, False),
            (15, 128, 4, B, False, False),
            (256, 128, 1, H, False, True),
            (514, 128, 1, B, True, False),
            (514, 32, 4, H, True, True),
            (514, 128, 1, H, False, False),
        )
    ),
)
