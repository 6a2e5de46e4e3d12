"""Gated linear attention: S_t = exp(g_t)[:, None] ∘ S_{t−1} + k_t v_tᵀ, o_t = scale · q_tᵀ S_t.

Yang et al., arXiv 2312.06635; theory GLA-1 to GLA-5. With one log decay a position and head it is Mamba-2's
scalar gate, with one for each channel GLA's and HGRN2's. Gradients: see ``state_blocks``.
"""

from __future__ import annotations

from typing import Any

import torch

from attnproof.properties.families.additive_state import AdditiveStateFamily, AdditiveStateProblem
from attnproof.properties.families.arguments import number
from attnproof.properties.families.sequences import checked_gate, checked_state, checked_state_call, flag

__all__ = ["GATED_LINEAR"]


class GatedLinearFamily(AdditiveStateFamily):
    """``gated_linear``: f(q, k, v, g, *, scale, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "gated_linear"
    inputs = ("q", "k", "v", "g")
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
        gate, initial = tensors[3], options.get("initial_state")
        checked_gate("g", gate, call)
        checked_state("initial_state", initial, call, (call.q.shape[3], call.v.shape[3]))
        flag("return_state", options.get("return_state", False))
        given = ("q", "k", "v", "g") + (() if initial is None else ("initial_state",))
        return AdditiveStateProblem(
            **self.fields(call, options, gate=gate if gate.dim() == 4 else gate[..., None], initial=initial),
            scale=number("scale", options["scale"]),
            gate_shape=tuple(gate.shape),
            given=given,
        )


GATED_LINEAR = GatedLinearFamily()
