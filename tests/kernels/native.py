"""Whether the kernels' tests run on a GPU (nox session ``gpu``), and what is then another matter."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

NATIVE = os.environ.get("ATTNPROOF_DEVICE") == "cuda"
DEVICE = "cuda" if NATIVE else "emulator:sm_90"


def assert_same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """The same numbers from calls whose tensors differ in strides, or in what is left out.

    To the last bit in the emulator, which adds up a tile in one order. A compiler lays a tile out over
    threads by its strides, and fuses what it finds beside: natively a few roundings may differ.
    """
    for x, y in zip(got, want, strict=True):
        if NATIVE:
            room = 32 * torch.finfo(x.dtype).eps
            largest = y.abs().amax().item() if y.numel() else 0.0
            torch.testing.assert_close(x, y, rtol=room, atol=room * largest)
        else:
            assert torch.equal(x, y)
