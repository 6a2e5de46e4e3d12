r"""RWKV-4's time mixing, channel by channel: a mean with decaying weights and a bonus for the present.

    o_t = (Σ_{s<t} e^{(t−1−s)w + k_s} v_s + e^{u + k_t} v_t) / (Σ_{s<t} e^{(t−1−s)w + k_s} + e^{u + k_t})

with one log decay w ≤ 0 and one bonus u a channel. Source: Peng et al. 2023, "RWKV", arXiv 2305.13048;
theory.md RWK-1. The state (a, b, p) after position t does not know the bonus: p = max(w + p₋, k_t),
a = e^{w + p₋ − p} a₋ + e^{k_t − p} v_t, b likewise without v; its neutral element is (0, 0, −inf).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.decayed_softmax_gradients import weight_gradients
from attnproof.properties.budgets.logit_errors import LogitErrors
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.base import Family
from attnproof.properties.families.decayed_softmax import DecayedSoftmax
from attnproof.properties.families.scan_states import checked_initial
from attnproof.properties.families.sequences import checked_vector, flag
from attnproof.properties.families.state_layout import sampled_rows

__all__ = ["RWKV4", "RWKV4Problem"]


@dataclass(frozen=True, eq=False)
class RWKV4Problem(DecayedSoftmax):
    """Finite inputs of one call; v has one more axis, of length 1.

    Attributes:
        k: (B, H, N), non-finite entries 0.
    """

    k: torch.Tensor

    family = "rwkv4"
    state_names = ("p", "b", "a")
    state_order = ("a", "b", "p")
    parameters = ("w", "u", "k", "v")

    @property
    def per_head(self) -> dict[str, str]:
        """The decay is w, the bonus u."""
        return {"w": "w", "c": "u"}

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N) of o, (B, H) of a, b and p."""
        return tuple(self.k.shape) if output == "o" else tuple(self.k.shape[:2])

    def input_shape(self, name: str) -> tuple[int, ...]:
        """(H,) of w and u, (B, H, N) of k and v, (B, H) of parts of the initial state."""
        if name not in self.parameters:
            return super().input_shape(name)
        return (self.k.shape[1],) if name in ("w", "u") else tuple(self.k.shape)

    def logits(self, arithmetic: Arithmetic[V], width: int) -> V:
        """k, (B, H, 1, width)."""
        k = torch.nn.functional.pad(self.k, (0, width - self.k.shape[2]))
        return arithmetic.exact(k[:, :, None, :])

    def logit_gradients(self, arithmetic: Arithmetic[V], ds: V) -> dict[str, V]:
        """The logits are the keys."""
        return {"k": ds}

    def logit_errors(self, r: Roundings) -> LogitErrors:
        """Keys are logits as they are given; scores may be stored."""
        return LogitErrors.of_keys(self.k, r)

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """See ``attnproof.properties.budgets.decayed_softmax_gradients``."""
        sums, _ = weight_gradients(self, contract, cotangents)
        return {**sums, "dw": sums["w"], "du": sums["c"], "dk": sums["s"], "dv": sums["v"]}


class RWKV4Family(Family):
    """``rwkv4``: f(w, u, k, v, *, initial_state=None, return_state=False)."""

    name = "rwkv4"
    inputs = ("w", "u", "k", "v")
    required = ()
    options = ("initial_state", "return_state")
    sequence = ("k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",), or ("o", "a", "b", "p") with ``return_state``."""
        return ("o", "a", "b", "p") if options.get("return_state") else ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for o; float32 for the state (float64 if the inputs are)."""
        return dtype if output == "o" or dtype == "float64" else "float32"

    def problem(self, *tensors: torch.Tensor, **options: Any) -> RWKV4Problem:
        """Check the call: w, u (H,), k, v (B, H, N), of one dtype.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        w, u, k, v = _checked(tensors)
        batch, heads, length = k.shape
        state = options.get("initial_state")
        if state is not None:
            if not isinstance(state, (tuple, list)) or len(state) != 3:
                raise ContractError(
                    f"initial_state is {type(state).__name__}; rwkv4 asks for the tuple (a, b, p), or None"
                )
            a, b, p = state
            state = (p, b, a)
        initial, bad_state = checked_initial(("p", "b", "a"), state, (batch, heads), None, v.dtype)
        bad_head = bad_state | ~w.isfinite()
        bad = ~k.isfinite() | ~v.isfinite()
        whole = bad_head | ~u.isfinite()
        return RWKV4Problem(
            v=finite(v)[..., None],
            decay=finite(w),
            bonus=finite(u),
            initial=initial,
            poisoned=(bad.cummax(-1).values if length else bad) | whole[..., None],
            tainted=bad.any(-1) | whole,
            spoilt=bad.any(-1) | bad_head,
            with_state=flag("return_state", options.get("return_state", False)),
            sample=sampled_rows(length, ((0, 0, length),)),
            k=finite(k),
        )


def _checked(
    tensors: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if len(tensors) != 4:
        raise ContractError(f"rwkv4 takes 4 tensors w, u, k, v; got {len(tensors)}")
    w, u, k, v = tensors
    if not isinstance(k, torch.Tensor) or k.dim() != 3:
        got = f"shape {tuple(k.shape)}" if isinstance(k, torch.Tensor) else type(k).__name__
        raise ContractError(f"k has {got}; rwkv4 asks for 3 axes (batch, channels, length)")
    dtype_name(k.dtype, "k")
    for name, x, shape in (("w", w, (k.shape[1],)), ("u", u, (k.shape[1],)), ("v", v, tuple(k.shape))):
        checked_vector(name, x, shape, k.dtype)
    if bool(((w > 0) & w.isfinite()).any()):
        raise ContractError(f"w holds {float(w[w.isfinite()].max())}; a log decay is ≤ 0")
    return w, u, k, v


RWKV4 = RWKV4Family()
