"""RWKV-6's attention, which reads its state before the decay, with a bonus for the position's own write.

    o_t = scale · q_tᵀ (S_{t−1} + diag(u) k_t v_tᵀ),   S_t = exp(g_t)[:, None] ∘ S_{t−1} + k_t v_tᵀ

Peng et al., arXiv 2404.05892; theory RWK-2. The weight of j < i holds the decays strictly between them, so
that the gate's gradient is GLA-4's with the reads shifted by one.
"""

from __future__ import annotations

from typing import Any

import torch

from attnproof.properties.contract import ContractError
from attnproof.properties.families.additive_state import AdditiveStateFamily, AdditiveStateProblem
from attnproof.properties.families.arguments import number
from attnproof.properties.families.sequences import (
    checked_gate,
    checked_state,
    checked_state_call,
    checked_vector,
    flag,
)

__all__ = ["RWKV6"]


class RwkvFamily(AdditiveStateFamily):
    """``rwkv6``: f(q, k, v, g, u, *, scale, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "rwkv6"
    inputs = ("q", "k", "v", "g", "u")
    required = ("scale",)
    options = ("initial_state", "cu_seqlens", "return_state")
    sequence = ("q", "k", "v", "g", "o")

    def problem(self, *tensors: torch.Tensor, **options: Any) -> AdditiveStateProblem:
        """Check the call; tensors in layout bhnd.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        call = checked_state_call(self.name, tensors, self.inputs, options.get("cu_seqlens"))
        gate, bonus, initial = tensors[3], tensors[4], options.get("initial_state")
        checked_gate("g", gate, call)
        if gate.dim() != 4:
            raise ContractError(f"g has shape {tuple(gate.shape)}; rwkv6 asks for (B, H, N, D)")
        checked_vector("u", bonus, (call.q.shape[1], call.q.shape[3]), call.q.dtype)
        checked_state("initial_state", initial, call, (call.q.shape[3], call.v.shape[3]))
        flag("return_state", options.get("return_state", False))
        return AdditiveStateProblem(
            **self.fields(call, options, gate=gate, bonus=bonus, initial=initial),
            scale=number("scale", options["scale"]),
            gate_shape=tuple(gate.shape),
            given=("q", "k", "v", "g", "u") + (() if initial is None else ("initial_state",)),
        )


RWKV6 = RwkvFamily()
