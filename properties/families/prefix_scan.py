r"""Prefix scan attention (Aaren): softmax attention of one query a head over all positions so far.

    o_t = Σ_{j ≤ t} e^{s_j} v_j / Σ_{j ≤ t} e^{s_j},   s_j = scale · q·k_j.

Source: Feng et al. 2024, "Attention as an RNN", arXiv 2405.13956; theory.md AAR-1 to AAR-6. The state is the
triple (m, u, w) of the monoid that combines parts of the keys; its neutral element is (−inf, 0, 0). The
gradient by q is the sum over positions and batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.decayed_softmax_gradients import (
    key_gradients,
    weight_gradients,
)
from attnproof.properties.budgets.logit_errors import LogitErrors
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite, number
from attnproof.properties.families.base import Family
from attnproof.properties.families.decayed_softmax import DecayedSoftmax
from attnproof.properties.families.scan_states import checked_initial
from attnproof.properties.families.sequences import flag
from attnproof.properties.families.state_layout import sampled_rows

__all__ = ["PREFIX_SCAN", "PrefixScanProblem"]


@dataclass(frozen=True, eq=False)
class PrefixScanProblem(DecayedSoftmax):
    """Finite inputs of one call.

    Attributes:
        q: (H, D); k: (B, H, N, D); non-finite entries are 0.
        scale: of the logits.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float

    family = "prefix_scan"
    parameters = ("q", "k", "v")

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of q, k or v, or of a part of the initial state."""
        return tuple(getattr(self, name).shape) if name in self.parameters else super().input_shape(name)

    def logits(self, arithmetic: Arithmetic[V], width: int) -> V:
        """scale · q·k_j, (B, H, 1, width)."""
        a, (heads, size) = arithmetic, self.q.shape
        keys = torch.nn.functional.pad(self.k, (0, 0, 0, width - self.k.shape[2]))
        q = a.exact(self.q.reshape(1, heads, 1, size).expand(keys.shape[0], heads, 1, size))
        return a.scaled(a.matmul(q, a.transpose(a.exact(keys))), self.scale)

    def logit_gradients(self, arithmetic: Arithmetic[V], ds: V) -> dict[str, V]:
        """dk = scale · ds q, dq = scale · Σ ds k over positions and batch."""
        a, (heads, size) = arithmetic, self.q.shape
        batch, _, length, _ = self.sizes
        q = a.exact(self.q.reshape(1, heads, 1, size))
        rows = a.matmul(a.transpose(ds), a.exact(self.k))
        dq = a.sum(a.reshape(a.permute(rows, (1, 3, 0, 2)), (heads, size, batch)))
        dk = a.scaled(a.mul(ds, q), self.scale)
        return {"k": a.reshape(dk, (batch, heads, length, size)), "q": a.scaled(dq, self.scale)}

    def logit_errors(self, r: Roundings) -> LogitErrors:
        """Of scale · q·k."""
        return LogitErrors.of_products(self.q[None, :, None, :], self.k, self.scale, r)

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """See ``attnproof.properties.budgets.decayed_softmax_gradients``."""
        sums, in_rows = weight_gradients(self, contract, cotangents, self.k)
        r = Roundings.of(contract, dtype_name(self.dtype))
        return {**sums, "dv": sums["v"], **key_gradients(self, sums["s"], in_rows, r)}


class PrefixScanFamily(Family):
    """``prefix_scan``: f(q, k, v, *, scale, initial_state=None, return_state=False)."""

    name = "prefix_scan"
    inputs = ("q", "k", "v")
    required = ("scale",)
    options = ("initial_state", "return_state")
    sequence = ("k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",), or ("o", "m", "u", "w") with ``return_state``."""
        return ("o", "m", "u", "w") if options.get("return_state") else ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for o; float32 for the state (float64 if the inputs are)."""
        return dtype if output == "o" or dtype == "float64" else "float32"

    def problem(self, *tensors: torch.Tensor, **options: Any) -> PrefixScanProblem:
        """Check the call: q (H, D), k (B, H, N, D), v (B, H, N, E) of one dtype.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        q, k, v = _checked(tensors)
        batch, heads, length = k.shape[:3]
        state = options.get("initial_state")
        if state is not None and (not isinstance(state, (tuple, list)) or len(state) != 3):
            raise ContractError(
                f"initial_state is {type(state).__name__}; prefix_scan asks for the tuple (m, u, w), or None"
            )
        initial, bad_state = checked_initial(("m", "u", "w"), state, (batch, heads), v.shape[3], v.dtype)
        bad_head = bad_state | ~q.isfinite().all(-1)
        bad = ~k.isfinite().all(-1) | ~v.isfinite().all(-1)
        return PrefixScanProblem(
            v=finite(v),
            decay=None,
            bonus=None,
            initial=initial,
            poisoned=(bad.cummax(-1).values if length else bad) | bad_head[..., None],
            tainted=bad.any(-1) | bad_head,
            spoilt=bad.any(-1) | bad_head,
            with_state=flag("return_state", options.get("return_state", False)),
            sample=sampled_rows(length, ((0, 0, length),)),
            q=finite(q),
            k=finite(k),
            scale=number("scale", options["scale"]),
        )


def _checked(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if len(tensors) != 3:
        raise ContractError(f"prefix_scan takes 3 tensors q, k, v; got {len(tensors)}")
    for name, x, axes in zip("qkv", tensors, (2, 4, 4), strict=True):
        if not isinstance(x, torch.Tensor) or x.dim() != axes:
            got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            asked = "(heads, width): one query a head" if axes == 2 else "(batch, heads, length, width)"
            raise ContractError(f"{name} has {got}; prefix_scan asks for {axes} axes {asked}")
        dtype_name(x.dtype, name)
    q, k, v = tensors
    if not q.dtype == k.dtype == v.dtype:
        raise ContractError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; the contract asks for one dtype"
        )
    if k.shape[:3] != v.shape[:3] or tuple(q.shape) != (k.shape[1], k.shape[3]):
        raise ContractError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; prefix_scan asks for "
            "(H, D), (B, H, N, D) and (B, H, N, E)"
        )
    return q, k, v


PREFIX_SCAN = PrefixScanFamily()
