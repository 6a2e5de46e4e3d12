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
    "H3",
    "H3_COMPOSED",
    "LINEAR",
    "LINEAR_PARALLEL",
    "LINEAR_RECURRENT",
    "MERGE",
    "MLSTM",
    "MLSTM_RECURRENT",
    "NUMERIC",
    "PREFIX_SCAN",
    "PREFIX_SCAN_DOUBLING",
    "PREFIX_SCAN_RECURRENT",
    "PREFIX_SCAN_SWEEPS",
    "RETENTION",
    "RETENTION_PARALLEL",
    "RETENTION_RECURRENT",
    "RWKV4",
    "RWKV4_RECURRENT",
    "RWKV6",
    "RWKV6_RECURRENT",
    "SELECTIVE_SCAN",
    "SELECTIVE_SCAN_RECURRENT",
    "SPLIT",
    "SSD",
    "SSD_PARALLEL",
    "SSD_RECURRENT",
    "SSM_CONVOLUTION",
    "SSM_FFT",
    "SSM_RECURRENT",
    "SSM_SCAN",
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
SELECTIVE_SCAN = "attnproof.kernels.selective_scan:scan"
SELECTIVE_SCAN_RECURRENT = "attnproof.kernels.selective_scan:recurrent"
SSD = "attnproof.kernels.ssd:attention"
SSD_PARALLEL = "attnproof.kernels.ssd:parallel"
SSD_RECURRENT = "attnproof.kernels.ssd:recurrent"

# State spaces: step by step, block by block, and by their kernel.
SSM_RECURRENT = "attnproof.kernels.ssm:recurrent"
SSM_SCAN = "attnproof.kernels.ssm:scan"
SSM_CONVOLUTION = "attnproof.kernels.ssm:convolution"
SSM_FFT = "attnproof.kernels.ssm:fft"
H3 = "attnproof.kernels.h3:attention"
H3_COMPOSED = "attnproof.kernels.h3:composed"
PREFIX_SCAN = "attnproof.kernels.prefix_scan:attention"
PREFIX_SCAN_RECURRENT = "attnproof.kernels.prefix_scan:recurrent"
PREFIX_SCAN_DOUBLING = "attnproof.kernels.prefix_scan:hillis_steele"
PREFIX_SCAN_SWEEPS = "attnproof.kernels.prefix_scan:blelloch"
RWKV4 = "attnproof.kernels.rwkv4:attention"
RWKV4_RECURRENT = "attnproof.kernels.rwkv4:recurrent"

# Where sequences and chunks lie, for all of them.
STATES = "attnproof.kernels.states"

NUMERIC = ("certain", "probable-row", "probable-output", "bias")
"""Rules that show a finite wrong value."""

FAULT = ("memory-fault",)
"""Rules that show an address outside of every tensor."""
