"""What claims need from the suite: kernels run in a worker, the emulator's model of single instructions."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from attnproof.outcomes import CallRequest, Returned
from attnproof.properties.claims.base import Effort
from attnproof.targets import Importable
from attnproof.workers import WorkerPool

__all__ = ["Bench"]

T = TypeVar("T")


class Bench:
    """A :class:`attnproof.properties.claims.base.Laboratory` on this machine.

    Args:
        effort: "quick", "default" or "thorough".
    """

    def __init__(self, effort: Effort = "default") -> None:
        self._effort: Effort = effort

    @property
    def effort(self) -> Effort:
        """How thorough the checks are to be."""
        return self._effort

    def choose(self, quick: T, default: T, thorough: T | None = None) -> T:
        """The one for this effort; ``thorough`` is ``default`` if left out."""
        if self._effort == "quick":
            return quick
        return default if thorough is None or self._effort == "default" else thorough

    def run(
        self, target: str, *tensors: torch.Tensor | None, device: str = "emulator:sm_90", **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Outputs of a kernel, ``package.module:attribute``, called as the contract says.

        Raises:
            RuntimeError: the kernel raised, crashed or hung; with its message.
        """
        request = CallRequest(Importable(target), device=device, arguments=tensors, keywords=options)
        outcome = _pool().call(request)
        if isinstance(outcome, Returned):
            return tuple(output.tensor for output in outcome.outputs)
        raise RuntimeError(f"{target} on {device}: {outcome}")

    def instruction(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The emulator's model of an approximate PTX instruction of one float32 operand.

        Raises:
            ValueError: the emulator has no such instruction.
        """
        # The emulator's modules are heavy, and few claims need them.
        from attnproof.emulator.ops_foreign import ptx_function

        function = ptx_function(name)
        if function is None:
            raise ValueError(f"the emulator has no element-wise instruction {name!r}")
        return function


@functools.cache
def _pool() -> WorkerPool:
    pool = WorkerPool(jobs=1, spares=0, timeout=120.0)
    atexit.register(pool.close)
    return pool
