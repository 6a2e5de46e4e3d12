"""States of ``mlstm``: (C', n', m), a matrix and a vector in units of e^m, and the level m."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.contract import ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.sequences import StateCall, checked_state

__all__ = ["Initial", "checked_initial", "joined"]


@dataclass(frozen=True, eq=False)
class Initial:
    """An initial state, finite.

    Attributes:
        state: (S, H, D, E); n: (S, H, D); m: (S, H); all 0 where the state is neutral.
        present: bool (S, H), whether m is not −inf.
    """

    state: torch.Tensor
    n: torch.Tensor
    m: torch.Tensor
    present: torch.Tensor

    def of_sequence(self, s: int) -> Initial:
        """That of one sequence alone."""
        return Initial(*(x[s : s + 1] for x in (self.state, self.n, self.m, self.present)))


def checked_initial(given: Any, call: StateCall) -> tuple[Initial | None, torch.Tensor]:
    """The call's ``initial_state``, and the heads, bool (S, H), in which it is not finite.

    Args:
        given: the tuple (state, n, m) of shapes (S, H, D, E), (S, H, D) and (S, H), or None.
        call: the call's other tensors.

    Raises:
        ContractError: no such tuple, a wrong shape or dtype, or m = −inf beside a state that is not 0.
    """
    bad = torch.zeros(len(call.sequences), call.q.shape[1], dtype=torch.bool)
    if given is None:
        return None, bad
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        count = f" of {len(given)}" if isinstance(given, (tuple, list)) else ""
        raise ContractError(
            f"initial_state is {type(given).__name__}{count}; mlstm asks for the tuple (state, n, m), or None"
        )
    width, value_width = call.q.shape[3], call.v.shape[3]
    for name, x, shape in zip(("state", "n", "m"), given, ((width, value_width), (width,), ()), strict=True):
        if x is None:
            raise ContractError(f"initial_state's {name} is None; mlstm asks for the tuple (state, n, m)")
        checked_state(f"initial_state's {name}", x, call, shape)
    state, n, m = given
    bad = ~state.isfinite().flatten(2).all(-1) | ~n.isfinite().all(-1) | ~(m.isfinite() | (m == -torch.inf))
    empty = m == -torch.inf
    unlike = empty & ((state != 0).flatten(2).any(-1) | (n != 0).any(-1)) & ~bad
    if bool(unlike.any()):
        place = tuple(unlike.nonzero()[0].tolist())
        sizes = [float(x[place].abs().max()) if x[place].numel() else 0.0 for x in (state, n)]
        raise ContractError(
            f"initial_state at (sequence, head) = {place} has m = -inf, the largest |state| = {sizes[0]} and "
            f"the largest |n| = {sizes[1]}; where m is −inf the others are 0"
        )
    return Initial(finite(state), finite(n), finite(m), ~empty & ~bad), bad


def joined(a: Arithmetic[V], parts: Sequence[V]) -> V:
    """What every sequence gives, (1, H, …), as (S, H, …); the only part of a batch is all of it."""
    if len(parts) == 1:
        return parts[0]
    total = None
    for s, x in enumerate(parts):
        here = torch.zeros(len(parts), *(1,) * (len(a.shape(x)) - 1))
        here[s] = 1.0
        x = a.mul(a.exact(here), x)
        total = x if total is None else a.add(total, x)
    assert total is not None
    return total
