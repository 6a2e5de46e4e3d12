"""What the mutants of the Triton kernels have in common: right kernels, and rules that show wrong values."""

from __future__ import annotations

__all__ = [
    "ARGUMENTS",
    "ATOMIC",
    "BACKWARD",
    "FAULT",
    "GRADIENTS",
    "MERGE",
    "NUMERIC",
    "SPLIT",
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

NUMERIC = ("certain", "probable-row", "probable-output", "bias")
"""Rules that show a finite wrong value."""

FAULT = ("memory-fault",)
"""Rules that show an address outside of every tensor."""
