"""Calls without a process: ``isolation="none"``."""

from __future__ import annotations

import os
import time
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from attnproof import arena
from attnproof.outcomes import CallRequest, CapturedOutput, Outcome
from attnproof.process_state import ProcessState
from attnproof.protocol import Reply
from attnproof.targets import Importable, KernelSource, resolve
from attnproof.worker_call import device_context, perform, trouble_of
from attnproof.worker_process import Limits
from attnproof.worker_replies import (
    Circumstances,
    check_device,
    message_for,
    outcome_of_reply,
    outcome_of_trouble,
)

__all__ = ["InProcess"]


class InProcess:
    """The interface of :class:`Worker` without a process, for a debugger: nothing is limited or captured.

    Outcomes say so in ``isolation``. Ctrl-C is the user's here and propagates.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._functions: dict[KernelSource, Any] = {}

    def call(self, request: CallRequest) -> Outcome:
        """Make one call in this process; raises as :meth:`Worker.call` does, and KeyboardInterrupt."""
        check_device(request.device)
        packed = arena.pack(request)
        begin = time.monotonic()
        shared = packed.image.copy()
        source = request.kernel

        def circumstances(reply: Reply | None) -> Circumstances:
            effects = reply.effects if reply is not None else ()
            changed = arena.mutations(packed, shared)
            elapsed = time.monotonic() - begin
            return Circumstances(CapturedOutput(), changed, elapsed, os.getpid(), "none", (), effects)

        if source not in self._functions:
            try:
                with device_context(request.device):
                    self._functions[source] = (
                        resolve(source.target)
                        if isinstance(source, Importable)
                        else cloudpickle.loads(source.payload)
                    )
            except Exception as error:
                return outcome_of_trouble(
                    trouble_of(error, "import"), circumstances(None), self._limits.memory
                )
        call = message_for(request, packed, 0, shared.size)
        reply, chunks = perform(
            self._functions[source],
            call,
            shared,
            request.device,
            self._limits.result,
            ProcessState(),
            propagate=(KeyboardInterrupt,),
        )
        if reply.trouble is not None:
            return outcome_of_trouble(reply.trouble, circumstances(reply), self._limits.memory)
        return outcome_of_reply(reply, bytearray(b"".join(chunks)), circumstances(reply).fields())

    def close(self) -> None:
        """Forget the kernels."""
        self._functions.clear()
