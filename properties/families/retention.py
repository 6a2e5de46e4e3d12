"""Retention: gated linear attention with the constant decays γ_h = 1 − 2^(−5−h) of RetNet's heads.

    S_t = γ_h S_{t−1} + k_t v_tᵀ,   o_t = scale · q_tᵀ S_t,   h = 0 … H − 1

Sun et al., arXiv 2307.08621; theory RET-1. Without the rotation of queries and keys and without the
normalisations of scores, which a group norm after each head undoes.
"""

from __future__ import annotations

from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.contract import ContractError
from attnproof.properties.families.additive_state import AdditiveStateFamily, AdditiveStateProblem
from attnproof.properties.families.arguments import number
from attnproof.properties.families.sequences import checked_state, checked_state_call, flag

__all__ = ["RETENTION", "RetentionProblem"]

# 1 − 2^(−5−h) is a float64 for h up to this.
MOST_HEADS = 48


class RetentionProblem(AdditiveStateProblem):
    """An :class:`AdditiveStateProblem` whose ``g`` is a stand-in for log γ, of the right shape."""

    @property
    def constant(self) -> bool:
        """Decays are powers of γ."""
        return True

    def log_decays(self, a: Arithmetic[V], g: torch.Tensor) -> V:
        """Log γ_h at every position (B, H, C, n, 1)."""
        heads = torch.arange(g.shape[1], dtype=torch.float64)
        gamma = (1.0 - torch.exp2(-5.0 - heads))[None, :, None, None, None]
        return a.log(a.exact(gamma.expand(g.shape)))


class RetentionFamily(AdditiveStateFamily):
    """``retention``: f(q, k, v, *, scale, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "retention"
    inputs = ("q", "k", "v")
    required = ("scale",)
    options = ("initial_state", "cu_seqlens", "return_state")

    def problem(self, *tensors: torch.Tensor, **options: Any) -> RetentionProblem:
        """Check the call; tensors in layout bhnd.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        call = checked_state_call(self.name, tensors, self.inputs, options.get("cu_seqlens"))
        if call.rows[1] > MOST_HEADS:
            raise ContractError(f"q has {call.rows[1]} heads; 1 − 2^(−5−h) is exact for up to {MOST_HEADS}")
        initial = options.get("initial_state")
        checked_state("initial_state", initial, call, (call.q.shape[3], call.v.shape[3]))
        flag("return_state", options.get("return_state", False))
        stand_in = torch.zeros(*call.rows, 1, dtype=torch.float64)
        return RetentionProblem(
            **self.fields(call, options, gate=stand_in, initial=initial),
            scale=number("scale", options["scale"]),
            gate_shape=None,
            given=("q", "k", "v") + (() if initial is None else ("initial_state",)),
        )


RETENTION = RetentionFamily()
