"""flash-linear-attention: root mean square of the error against that of the reference.

Source: fla-org/flash-linear-attention, fla/utils/_testing.py (bc3b101, 2026-08-22), tests/ops/test_attn.py at
012a873a, fla/ops/attn/naive.py at 08654bac. Accept where the largest error is at most 1e-6; refuse NaN; else
rms(ref − out) / (rms(ref) + 1e-8) < 0.005. Both roots are taken in the outputs' own float16, so that errors
below some 2e-4 square to zero. With FLA_CI_ENV=1, which its CI sets, the rule only warns where that ratio is
below 0.01 *or* the largest error at most 0.3: the second peer of this module.

Kept: seed 42, randn in float16, causal always, the pairs of lengths and head dimensions (63, 64), (111, 100),
60, 128; GQA of 4; scales 1.0 and 0.1; packed sequences, sliding windows, sinks drawn by randn; torch.empty
poisoned with NaN (the autouse fixture). The reference is float32 torch, rounded to float16.

Reduced, but for one case of 3 × 1024 × 8 heads in full: batch 3 → 2 and lengths 1024 and 2048 → 512, 8 query
heads → 4, the longest packed cases by half. Left out: gradients, the gate g, the backward's regression test.
fla's attention is always causal: a kernel without ``causal`` meets no test of this peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer

__all__ = ["FLA", "FLA_CI", "assert_close"]

RATIO = 0.005
SILENT = 1e-6
CI_RATIO, CI_ERROR = 0.01, 0.3


def rms(x: torch.Tensor) -> float:
    """Root mean square, in x's own dtype."""
    return float(x.flatten().square().mean().sqrt().item())


def assert_close(ref: torch.Tensor, out: torch.Tensor, *, ci: bool) -> None:
    """fla's rule at ratio 0.005, with or without its CI flag."""
    error = float((ref - out).flatten().abs().max().item())
    ratio = rms(ref - out) / (rms(ref) + 1e-8)
    if error <= SILENT:
        return
    if torch.isnan(ref).any() or torch.isnan(out).any():
        raise Rejection("NaN in the reference or in the output")
    if ci and (ratio < CI_RATIO or error <= CI_ERROR):
        return
    if not ratio < RATIO:
        raise Rejection(f"rms ratio {ratio:.3g} is not below {RATIO} (largest error {error:.3g})")


@dataclass(frozen=True)
class Parameters:
    """One combination; ``window`` counts keys up to and with the query's own, ``scale`` 0 is 1/√D."""

    shape: Shape
    scale: float = 0.0
    window: int = 0
    sinks: bool = False
    ends: tuple[int, ...] = ()

    @property
    def options(self) -> frozenset[str]:
        """Keywords that the kernel must take."""
        extra = {"window": self.window > 0, "sinks": self.sinks, "cu_seqlens": bool(self.ends)}
        return frozenset({"causal"} | {name for name, asked in extra.items() if asked})


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    window: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of float32 tensors of one length, step by step in torch."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    hidden = column > row
    if window:
        hidden = hidden | (row - column >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        return torch.einsum("bhmn,bhne->bhme", torch.softmax(scores, -1), v)
    sink = sinks[None, :, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink - top)
    return torch.einsum("bhmn,bhne->bhme", p, v) / total


def judged(parameters: Parameters, kernel: Kernel, *, ci: bool) -> None:
    """One test: draw, call, compare."""
    torch.manual_seed(42)
    q, k, v = parameters.shape.draw(torch.randn, "float16")
    scale = parameters.scale or q.shape[-1] ** -0.5
    options: dict[str, Any] = {"causal": True}
    sinks = None
    if parameters.window:
        options["window"] = (parameters.window - 1, 0)
    if parameters.sinks:
        sinks = options["sinks"] = torch.randn(q.shape[1])
    ends = parameters.ends or (0, q.shape[2])
    if parameters.ends:
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    pieces = []
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        piece = [x[:, :, start:stop].float() for x in (q, k, v)]
        pieces.append(reference(*piece, scale=scale, window=parameters.window, sinks=sinks))
    ref = torch.cat(pieces, 2).to(torch.float16)
    assert_close(ref, kernel(q, k, v, scale=scale, **options), ci=ci)


def of(length: int, heads: int, groups: int, width: int, batch: int = 1) -> Shape:
    """A shape with as many keys as queries."""
    return Shape(length, length, width, heads=heads, groups=groups, batch=batch)


PARAMETERS = (
    Parameters(of(63, 1, 1, 64), scale=1.0),
    Parameters(of(111, 2, 2, 100, batch=3), scale=1.0),
    Parameters(of(1024, 8, 2, 60, batch=3), scale=0.1),
    Parameters(of(512, 4, 1, 128, batch=2), scale=0.1),
    Parameters(of(15, 2, 2, 64), ends=(0, 15)),
    Parameters(of(500, 4, 1, 64), ends=(0, 128, 250, 500)),
    Parameters(of(500, 2, 2, 100), ends=(0, 15, 100, 300, 500)),
    Parameters(of(63, 1, 1, 64), window=16),
    Parameters(of(111, 2, 2, 100, batch=3), window=32),
    Parameters(of(512, 4, 1, 128, batch=2), window=64),
    Parameters(of(63, 1, 1, 64), sinks=True),
    Parameters(of(111, 2, 2, 100, batch=3), sinks=True),
    Parameters(of(512, 4, 1, 128, batch=2), sinks=True),
    Parameters(of(111, 2, 2, 64), window=16, ends=(0, 111)),
    Parameters(of(500, 4, 1, 100), window=32, ends=(0, 128, 250, 500)),
)


def suite(*, ci: bool) -> tuple[PeerTest, ...]:
    """All tests, with or without the CI flag."""
    return tuple(
        PeerTest(f"{p.shape} {' '.join(sorted(p.options))}", "float16", p.options, partial(judged, p, ci=ci))
        for p in PARAMETERS
    )


SOURCE = "fla-org/flash-linear-attention fla/utils/_testing.py bc3b101, tests/ops/test_attn.py 012a873a"

FLA = SuitePeer("fla", SOURCE, suite(ci=False), poisoned=True)
FLA_CI = SuitePeer("fla-ci", f"{SOURCE}, FLA_CI_ENV=1", suite(ci=True), poisoned=True)
