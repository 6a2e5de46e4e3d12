"""Shared by the kernels' tests: a cache of their own for Triton, one torch thread, reproducible inputs.

With ATTNPROOF_DEVICE=cuda (nox session ``gpu``) kernels run on the GPU: tensors are made there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "attnproof-test-triton"))

import pytest
import torch

from attnproof.emulator import emulate
from tests.kernels.native import NATIVE

if NATIVE:
    # Before the tests' modules make the tensors of their parameters.
    torch.set_default_device("cuda")


def pytest_configure(config: pytest.Config) -> None:
    if NATIVE:
        # Of torch's own threads, where a backward pass is the first to ask cuBLAS.
        config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if NATIVE and item.get_closest_marker("emulator"):
        pytest.skip("needs the emulator")


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20261122)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated() -> Iterator[None]:
    """Kernels run in the emulator, as on an H100; fresh outputs hold NaN until they are written."""
    if NATIVE:
        yield
        return
    with emulate("sm_90"):
        yield
