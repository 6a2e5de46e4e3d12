"""Random numbers that are the same on every platform.

numpy promises the stream of a bit generator for ever, but not that of its distributions, and the logarithms
inside those differ by an ulp from one libm to the next. Every distribution here is therefore made of the raw
words of Philox with integer arithmetic and one correctly rounded division.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Draw", "Float64"]

Float64 = npt.NDArray[np.float64]

# A normal variate is a sum of 16 uniform 16-bit integers: excess kurtosis -1.2/16, at most 6.9 deviations.
_PARTS = 16
_NORMAL_MEAN = _PARTS * 65535 / 2
_NORMAL_DEVIATION = math.sqrt(_PARTS * (65536**2 - 1) / 12)


@dataclass(frozen=True)
class Draw:
    """What a regime's builder sees of a case: sizes, options, dtype, and named streams of random numbers.

    A stream depends on the regime, the sizes, the seed and its own name, never on dtype, options or view, so
    that two cases that differ in one of those compare like with like.

    Attributes:
        family: name of the family.
        dtype: name of the dtype of the stored values, for regimes whose magnitudes are tied to it.
        regime: name of the regime.
        sizes: symbol to size, as in the case's shape.
        options: the case's options, as plain values.
        seed: the case's seed.
        shared: k and v are one head of one batch entry (x: one row), seen everywhere through strides of zero.
    """

    family: str
    dtype: str
    regime: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    shared: bool = False

    def __getitem__(self, symbol: str) -> int:
        return self.sizes[symbol]

    @property
    def finfo(self) -> torch.finfo:
        """Limits of the dtype."""
        return torch.finfo(getattr(torch, self.dtype))

    @property
    def scale(self) -> float:
        """1/√D, the default scale of scores; 1.0 for D = 0."""
        return 1.0 / math.sqrt(self["D"]) if self["D"] else 1.0

    @property
    def queries(self) -> tuple[int, int, int]:
        """(B, H, M), the leading axes of q."""
        return self["B"], self["H"], self["M"]

    @property
    def keys(self) -> tuple[int, int, int]:
        """(B, G, N), the leading axes of k and v; (1, 1, N) where they are shared."""
        return (1, 1, self["N"]) if self.shared else (self["B"], self["G"], self["N"])

    @property
    def rows(self) -> tuple[int, int]:
        """(R, N), the shape of x; (1, N) where all rows are one."""
        return (1 if self.shared else self["R"], self["N"])

    @property
    def bias_shape(self) -> tuple[int, int, int, int]:
        """(B, H, M, N) with 1 where the pattern of the option ``bias`` has 1."""
        batch, heads, rows, keys = (1 if x == "1" else self[x.upper()] for x in self.options["bias"])
        return batch, heads, rows, keys

    def per_head(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``array`` (B or 1, G or 1, …) of key/value heads as each query head sees it, (B, H, …)."""
        full = np.broadcast_to(array, (self["B"], self["G"], *array.shape[2:]))
        return full[:, np.arange(self["H"]) // (self["H"] // self["G"])]

    def words(self, name: str, count: int) -> npt.NDArray[np.uint64]:
        """``count`` random 64-bit words of the stream ``name``."""
        sizes = ",".join(f"{symbol}{size}" for symbol, size in self.sizes.items())
        text = f"attnproof 1|{self.regime}|{sizes}|{self.seed}|{name}"
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        words: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
        return words

    def normal(self, name: str, *shape: int) -> Float64:
        """Standard normal variates (as a sum of 16 uniform ones is), at most 6.93 in absolute value."""
        words = self.words(name, math.prod(shape) * _PARTS // 4)
        sums = words.view(np.uint16).reshape(-1, _PARTS).sum(axis=1, dtype=np.int64)
        variates: Float64 = (sums - _NORMAL_MEAN) / _NORMAL_DEVIATION
        return variates.reshape(shape)

    def uniform(self, name: str, *shape: int) -> Float64:
        """Uniform variates in [0, 1), multiples of 2⁻⁵³."""
        words = self.words(name, math.prod(shape)) >> np.uint64(11)
        return (words.astype(np.float64) * 2.0**-53).reshape(shape)

    def integers(self, name: str, low: int, high: int, *shape: int) -> npt.NDArray[np.int64]:
        """Uniform integers in [low, high)."""
        words = self.words(name, math.prod(shape)) >> np.uint64(1)
        return (words.astype(np.int64) % (high - low) + low).reshape(shape)

    def signs(self, name: str, *shape: int) -> Float64:
        """−1 or +1, each with probability one half."""
        return 2.0 * self.integers(name, 0, 2, *shape).astype(np.float64) - 1.0

    def permutations(self, name: str, *shape: int) -> npt.NDArray[np.int64]:
        """Random permutations of 0 … n−1 along the last axis, n its size."""
        return np.argsort(self.words(name, math.prod(shape)).reshape(shape), axis=-1, kind="stable")
