"""The form of each family's call: sizes, tensors, outputs and options, as a case's text names them.

Plain data that cases, regimes and plans share. A family's meaning is in ``attnproof.properties.families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["COTANGENTS", "FEATURE_MAPS", "SIGNATURES", "Signature"]

COTANGENTS = ("normal", "ones", "one-hot", "aligned")
"""Kinds of cotangents: N(0, 1); all ones, as one expanded number; one entry of each third row; along the mean
of V, so that dP and δ nearly cancel."""

FEATURE_MAPS = ("elu1", "relu", "exp", "identity", "taylor", "squared")
"""Feature maps of linear attention; the last two make features of pairs of columns."""


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
        states: what a call hands to the next one: final states come as further outputs with the option
            ``return_state``. "F" is the width of the features, "S" the number of sequences.
        levels: those of them in whose exponential the others are measured. What is computed from a state
            depends on both only together, so that gradients hold levels constant and have none for them.
        optional: positional tensors that are handed over only where the case has the option named here.
        keywords: tensors that are handed over by keyword where the case has the option of that name.
        wide: tensors that may be float32 beside others in half precision, and are so where the case has the
            option ``wide_gates``.
        values: the tensor in which the outputs are linear.
        scanned: whether a family without states is still computed along the sequence.
    """

    symbols: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    parameters: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    states: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    levels: tuple[str, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    keywords: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    values: str = "v"
    scanned: bool = False

    @property
    def attention(self) -> bool:
        """Whether queries of one length meet keys of another."""
        return "q" in self.tensors and "M" in self.symbols

    @property
    def stateful(self) -> bool:
        """Whether the family carries a state along the sequence."""
        return bool(self.states) or self.scanned

    @property
    def axes(self) -> int:
        """Number of axes of the first tensor, which decides what memory layouts there are."""
        return len(next(iter(self.tensors.values())))

    def shape(self, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of ``axes``; of "2" it is 2, and of "2D" twice D."""
        return tuple(2 * sizes.get(axis[1:], 1) if axis.startswith("2") else sizes[axis] for axis in axes)


_ATTENTION = ("B", "H", "G", "M", "N", "D", "E")
_QKV = {"q": ("B", "H", "M", "D"), "k": ("B", "G", "N", "D"), "v": ("B", "G", "N", "E")}
_HALVES = {**_QKV, "q": ("B", "H", "M", "2D"), "k": ("B", "G", "N", "2D")}
_O = {"o": ("B", "H", "M", "E")}

_SEQUENCE = ("B", "H", "N", "D", "E")
_EQUAL_QKV = {"q": ("B", "H", "N", "D"), "k": ("B", "H", "N", "D"), "v": ("B", "H", "N", "E")}
_STATE = {"state": ("S", "H", "D", "E")}
_CARRYING = ("initial_state", "cu_seqlens", "return_state", "cotangents")

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
    "linear": Signature(
        _SEQUENCE,
        _EQUAL_QKV,
        {"o": ("B", "H", "N", "E")},
        ("feature_map", "normalize", "causal", *_CARRYING),
        ("feature_map", "normalize"),
        states={"state": ("S", "H", "F", "E"), "z": ("S", "H", "F")},
    ),
    "gated_linear": Signature(
        _SEQUENCE,
        {**_EQUAL_QKV, "g": ("B", "H", "N", "D")},
        {"o": ("B", "H", "N", "E")},
        ("gate", "wide_gates", *_CARRYING),
        ("scale",),
        states=_STATE,
        wide=("g",),
    ),
    "retention": Signature(
        _SEQUENCE, _EQUAL_QKV, {"o": ("B", "H", "N", "E")}, _CARRYING, ("scale",), states=_STATE
    ),
    "rwkv6": Signature(
        _SEQUENCE,
        {**_EQUAL_QKV, "g": ("B", "H", "N", "D"), "u": ("H", "D")},
        {"o": ("B", "H", "N", "E")},
        ("wide_gates", *_CARRYING),
        ("scale",),
        {"u": (0.0, 1.0)},
        states=_STATE,
        wide=("g",),
    ),
    "mlstm": Signature(
        _SEQUENCE,
        {**_EQUAL_QKV, "i": ("B", "H", "N"), "f": ("B", "H", "N")},
        {"o": ("B", "H", "N", "E")},
        ("wide_gates", *_CARRYING),
        ("scale",),
        states={"state": ("S", "H", "D", "E"), "n": ("S", "H", "D"), "m": ("S", "H")},
        levels=("m",),
        wide=("i", "f"),
    ),
    "delta": Signature(
        _SEQUENCE,
        {**_EQUAL_QKV, "beta": ("B", "H", "N"), "g": ("B", "H", "N")},
        {"o": ("B", "H", "N", "E")},
        ("gate", "wide_gates", *_CARRYING),
        ("scale",),
        states=_STATE,
        optional={"g": "gate"},
        wide=("beta", "g"),
    ),
    "ssm": Signature(
        ("B", "H", "N", "D"),
        {"u": ("B", "H", "N"), **dict.fromkeys("abc", ("H", "D")), "d": ("H",)},
        {"y": ("B", "H", "N")},
        ("complex", "skip", *_CARRYING),
        states={"state": ("S", "H", "D")},
        optional={"d": "skip"},
        values="u",
    ),
    "h3": Signature(
        ("B", "H", "N", "D", "E", "T", "P"),
        {
            **_EQUAL_QKV,
            "taps": ("H", "D", "T"),
            **dict.fromkeys("abc", ("H", "P")),
            "d_shift": ("H", "D"),
            "d_diag": ("H",),
        },
        {"o": ("B", "H", "N", "E")},
        ("complex", "skip", "cotangents"),
        optional={"d_shift": "skip", "d_diag": "skip"},
        scanned=True,
    ),
    "selective_scan": Signature(
        ("B", "H", "N", "D"),
        {
            **dict.fromkeys(("u", "delta"), ("B", "H", "N")),
            "A": ("H", "D"),
            **dict.fromkeys("BC", ("B", "D", "N")),
            "D": ("H",),
        },
        {"y": ("B", "H", "N")},
        ("skip", "z", "delta_bias", "delta_softplus", "discretization", *_CARRYING),
        states={"state": ("S", "H", "D")},
        optional={"D": "skip"},
        values="u",
        keywords={"z": ("B", "H", "N"), "delta_bias": ("H",)},
    ),
    "ssd": Signature(
        ("B", "H", "G", "N", "D", "E"),
        {
            "x": ("B", "H", "N", "E"),
            "dt": ("B", "H", "N"),
            "A": ("H",),
            **dict.fromkeys("BC", ("B", "G", "N", "D")),
            "D": ("H",),
        },
        {"y": ("B", "H", "N", "E")},
        ("skip", "wide_gates", *_CARRYING),
        states=_STATE,
        optional={"D": "skip"},
        values="x",
        wide=("dt", "A"),
    ),
    "prefix_scan": Signature(
        _SEQUENCE,
        {"q": ("H", "D"), "k": ("B", "H", "N", "D"), "v": ("B", "H", "N", "E")},
        {"o": ("B", "H", "N", "E")},
        ("initial_state", "return_state", "cotangents"),
        ("scale",),
        states={"m": ("S", "H"), "u": ("S", "H"), "w": ("S", "H", "E")},
        levels=("m",),
    ),
    "rwkv4": Signature(
        ("B", "H", "N"),
        {"w": ("H",), "u": ("H",), **dict.fromkeys("kv", ("B", "H", "N"))},
        {"o": ("B", "H", "N")},
        ("initial_state", "return_state", "cotangents"),
        states={"a": ("S", "H"), "b": ("S", "H"), "p": ("S", "H")},
        levels=("p",),
    ),
}
