"""How other projects accept an attention kernel, as judges: see :mod:`tests.quality.peers.peer`."""

from __future__ import annotations

from tests.quality.peers.backendbench import BACKENDBENCH
from tests.quality.peers.fla import FLA, FLA_CI
from tests.quality.peers.flash_attention import FA2, FA3
from tests.quality.peers.flashinfer import FLASHINFER, FLASHINFER_XQA
from tests.quality.peers.gpucheck import GPUCHECK
from tests.quality.peers.kernelbench import KERNELBENCH_FP16, KERNELBENCH_FP32
from tests.quality.peers.peer import Peer, PeerVerdict
from tests.quality.peers.pytorch_sdpa import PYTORCH_SDPA
from tests.quality.peers.robust_kbench import ROBUST_KBENCH
from tests.quality.peers.torch_testing import TORCH_TESTING
from tests.quality.peers.triton_tutorial import TRITON_TUTORIAL

__all__ = ["PEERS", "Peer", "PeerVerdict"]

PEERS: tuple[Peer, ...] = (
    FA2,
    FA3,
    FLA,
    FLA_CI,
    PYTORCH_SDPA,
    FLASHINFER,
    FLASHINFER_XQA,
    KERNELBENCH_FP32,
    KERNELBENCH_FP16,
    ROBUST_KBENCH,
    BACKENDBENCH,
    TORCH_TESTING,
    TRITON_TUTORIAL,
    GPUCHECK,
)
