"""Where an output is wrong: batch entries, heads, rows and columns, as ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from attnproof.search.distortions import wrong_elements
from attnproof.trials import JudgedCall

__all__ = ["places", "ranges"]

_QUERIES = ("batch entries", "heads", "queries", "columns")
_KEYS = ("batch entries", "key heads", "keys", "columns")
_NAMES = {
    "y": ("rows", "columns"),
    **dict.fromkeys(("o", "lse", "dq"), _QUERIES),
    **dict.fromkeys(("dk", "dv"), _KEYS),
    "dbias": ("batch entries", "heads", "queries", "keys"),
    "dalpha": ("heads", "queries", "keys"),
    **dict.fromkeys(("dsinks", "dbeta", "dlam"), ("heads",)),
}
# More ranges than this on an axis are no pattern worth a sentence.
_MOST = 4


def places(judged: JudgedCall) -> Iterator[str]:
    """A sentence for each output that is wrong in a part only, one if an output is right throughout."""
    wrong = {name: wrong_elements(judged, name) for name in judged.outputs}
    bad = [name for name, mask in wrong.items() if mask.any()]
    for name in bad:
        where = _where(wrong[name], _NAMES.get(name, ()))
        count, total = int(wrong[name].sum()), wrong[name].numel()
        if where:
            yield f"In {judged.case.id}, {count} of {total} elements of {name} are wrong: {'; '.join(where)}."
    right = [name for name in wrong if name not in bad]
    if bad and right:
        yield f"{', '.join(bad)} is wrong while {', '.join(right)} is right."


def _where(mask: torch.Tensor, names: Sequence[str]) -> list[str]:
    """Along each axis, the indices at which something is wrong, where these are not all."""
    words = []
    for axis, name in enumerate(names[: mask.dim()]):
        others = [other for other in range(mask.dim()) if other != axis]
        hit = mask.amax(others) if others else mask
        found = hit.nonzero().flatten().tolist()
        size = mask.shape[axis]
        if len(found) == size or len(text := ranges(found)) > _MOST:
            continue
        last = f" (only the last of {size})" if found == [size - 1] else f" of {size}"
        words.append(f"{name} {', '.join(text)}{last}")
    return words


def ranges(indices: Sequence[int]) -> list[str]:
    """Sorted indices as ranges: [0, 1, 2, 7] as "0…2", "7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return [str(low) if low == high else f"{low}…{high}" for low, high in runs]
