"""Shared by the kernels' tests: a cache of their own for Triton, one torch thread, reproducible inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "attnproof-test-triton"))

import pytest
import torch

from attnproof.emulator import emulate


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20261122)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated() -> Iterator[None]:
    """Kernels run in the emulator, as on an H100; fresh outputs hold NaN until they are written.

    With ATTNPROOF_DEVICE=cuda (nox session ``gpu``) they run on the GPU instead: tensors are made there.
    """
    if os.environ.get("ATTNPROOF_DEVICE") == "cuda":
        with torch.device("cuda"):
            yield
        return
    with emulate("sm_90"):
        yield
