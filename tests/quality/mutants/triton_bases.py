"""What the mutants of the Triton kernels have in common: right kernels, and rules that show wrong values."""

from __future__ import annotations

__all__ = [
    "ARGUMENTS",
    "ATOMIC",
    "BACKWARD",
    "DELTA",
    "DELTA_RECURRENT",
    "FAULT",
    "GATED_LINEAR",
    "GATED_LINEAR_RECURRENT",
    "GRADIENTS",
    "LINEAR",
    "LINEAR_PARALLEL",
    "LINEAR_RECURRENT",
    "MERGE",
    "MLSTM",
    "MLSTM_RECURRENT",
    "NUMERIC",
    "RETENTION",
    "RETENTION_PARALLEL",
    "RETENTION_RECURRENT",
    "RWKV6",
    "RWKV6_RECURRENT",
    "SPLIT",
    "STATES",
    "THREE",
    "TILES",
    "WHOLE",
]

WHOLE = "attnproof.kernels.softmax:attention"
ATOMIC = "attnproof.kernels.softmax:attention_atomic"
SPLIT = "attnproof.kernels.softmax:attention_split"
THREE = "attnproof.adapters:attention_split_in_three"

# Modules that the kernels import and that some edits are made in.
SOFTMAX = "attnproof.kernels.softmax"
BACKWARD = "attnproof.kernels.softmax_backward"
GRADIENTS = "attnproof.kernels.softmax_gradients"
MERGE = "attnproof.kernels.merge"
ARGUMENTS = "attnproof.kernels.arguments"
TILES = "attnproof.kernels.tiles"

# Families with a state: entry points in chunks, step by step, and pair by pair.
LINEAR = "attnproof.kernels.linear:attention"
LINEAR_RECURRENT = "attnproof.kernels.linear:recurrent"
LINEAR_PARALLEL = "attnproof.kernels.linear:parallel"
GATED_LINEAR = "attnproof.kernels.gated_linear:attention"
GATED_LINEAR_RECURRENT = "attnproof.kernels.gated_linear:recurrent"
RETENTION = "attnproof.kernels.retention:attention"
RETENTION_RECURRENT = "attnproof.kernels.retention:recurrent"
RETENTION_PARALLEL = "attnproof.kernels.retention:parallel"
RWKV6 = "attnproof.kernels.rwkv6:attention"
RWKV6_RECURRENT = "attnproof.kernels.rwkv6:recurrent"
MLSTM = "attnproof.kernels.mlstm:attention"
MLSTM_RECURRENT = "attnproof.kernels.mlstm:attention_recurrent"
DELTA = "attnproof.kernels.delta:attention"
DELTA_RECURRENT = "attnproof.kernels.delta:recurrent"

# Where sequences and chunks lie, for all of them.
STATES = "attnproof.kernels.states"

NUMERIC = ("certain", "probable-row", "probable-output", "bias")
"""Rules that show a finite wrong value."""

FAULT = ("memory-fault",)
"""Rules that show an address outside of every tensor."""
