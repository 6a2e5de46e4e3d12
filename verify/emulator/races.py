"""Write-write races: two programs of one launch that store different values to one address."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from attnproof.emulator.access import Access, spread
from attnproof.emulator.errors import RaceFault
from attnproof.emulator.machine import Context
from attnproof.emulator.memory import Site


def note_store(context: Context, access: Access, value: Tensor, site: Site) -> None:
    """Record who writes the elements of a store, before it happens; report programs that disagree.

    Raises RaceFault under `races="raise"`, warns under `races="warn"`.
    """
    index, values, position = spread(access, value)
    if index.numel() == 0:
        return
    assert values is not None
    # A value and address common to all programs is the same write by each of them: no race within the batch.
    programs = context.programs[position.clamp(max=context.count - 1)] + 1
    flat = access.buffer.flat(access.size)
    writers = context.memory.writers.setdefault(
        (access.buffer.base, access.size), torch.zeros(0, dtype=torch.int64)
    )
    if writers.numel() == 0:
        writers = torch.zeros(flat.shape[0], dtype=torch.int64)
        context.memory.writers[access.buffer.base, access.size] = writers
    earlier = writers.index_select(0, index)
    clash = (earlier > 0) & (earlier != programs) & (flat.index_select(0, index) != values)
    writers.scatter_(0, index, programs)
    last = torch.full_like(values, 0)
    scratch = torch.empty(flat.shape[0], dtype=values.dtype)
    scratch.scatter_(0, index, values)
    last = scratch.index_select(0, index)
    final = writers.index_select(0, index)
    within = (last != values) & (final != programs)
    if bool((clash | within).any()):
        at = int((clash | within).nonzero()[0, 0])
        other = int(earlier[at]) if bool(clash[at]) else int(final[at])
        name = access.buffer.names[0]
        message = (
            f"kernel {context.kernel}, {site.op} at {site.location}: programs {int(programs[at]) - 1} "
            f"and {other - 1} (linear numbers) store different values to element "
            f"{int(index[at]) - name[1] // access.size} of {name[0]!r}"
        )
        if context.settings.races == "raise":
            raise RaceFault(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
