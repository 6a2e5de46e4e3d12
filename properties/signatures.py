"""The form of each family's call: sizes, tensors, outputs and options, as a case's text names them.

Plain data that cases, regimes and plans share. A family's meaning is in ``attnproof.properties.families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["COTANGENTS", "SIGNATURES", "Signature"]

COTANGENTS = ("normal", "ones", "one-hot", "aligned")
"""Kinds of cotangents: N(0, 1); all ones, as one expanded number; one entry of each third row; along the mean
of V, so that dP and δ nearly cancel."""


@dataclass(frozen=True, slots=True)
class Signature:
    """One family's call.

    Attributes:
        symbols: the sizes of a case, in the order of its text.
        tensors: positional tensors in call order, each with the symbols of its axes ("2D" is twice D).
        outputs: outputs that may be differentiated, likewise.
        options: the options that a case may have, in the order of its text.
        required: keywords that every call is given.
        parameters: tensors that a regime need not make; drawn as centre + deviation · N(0, 1).
    """

    symbols: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    parameters: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def attention(self) -> bool:
        """Whether queries meet keys."""
        return "q" in self.tensors

    @property
    def axes(self) -> int:
        """Number of axes of the first tensor, which decides what memory layouts there are."""
        return len(next(iter(self.tensors.values())))

    def shape(self, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of ``axes``."""
        return tuple(2 * sizes[axis[1:]] if axis.startswith("2") else sizes[axis] for axis in axes)


_ATTENTION = ("B", "H", "G", "M", "N", "D", "E")
_QKV = {"q": ("B", "H", "M", "D"), "k": ("B", "G", "N", "D"), "v": ("B", "G", "N", "E")}
_HALVES = {**_QKV, "q": ("B", "H", "M", "2D"), "k": ("B", "G", "N", "2D")}
_O = {"o": ("B", "H", "M", "E")}

SIGNATURES: dict[str, Signature] = {
    "logsumexp": Signature(("R", "N"), {"x": ("R", "N")}),
    "softmax_rows": Signature(("R", "N"), {"x": ("R", "N")}),
    "softmax": Signature(
        _ATTENTION,
        _QKV,
        {**_O, "lse": ("B", "H", "M")},
        (
            "causal",
            "causal_alignment",
            "window",
            "softcap",
            "bias",
            "alibi_slopes",
            "sinks",
            "cu_seqlens",
            "return_lse",
            "cotangents",
        ),
        ("scale",),
    ),
    "sigmoid": Signature(
        _ATTENTION, _QKV, _O, ("causal", "causal_alignment", "bias", "cotangents"), ("scale",)
    ),
    "relu": Signature(
        _ATTENTION,
        _QKV,
        _O,
        ("causal", "causal_alignment", "normalizer", "power", "cotangents"),
        ("scale",),
    ),
    "batch_normalised": Signature(_ATTENTION, _QKV, _O, ("beta", "variance", "cotangents"), ("scale", "eps")),
    "scaled_head": Signature(_ATTENTION, _QKV, _O, ("pool", "cotangents"), ("scale", "pool")),
    "differential": Signature(
        _ATTENTION,
        {**_HALVES, "lam": ("H",)},
        _O,
        ("causal", "causal_alignment", "cotangents"),
        ("scale",),
        {"lam": (0.8, 0.25)},
    ),
    "easy": Signature(
        ("B", "H", "N", "E"),
        {"alpha": ("H", "N", "N"), "v": ("B", "H", "N", "E")},
        {"o": ("B", "H", "N", "E")},
        ("band", "cotangents"),
    ),
}
