"""What a kernel promises: plain data beside the kernel, in a configuration file or on a command line.

A :class:`Contract` says which family a kernel computes, which keywords it supports and how it behaves at the
edges; its :class:`Precision` says where it rounds. Every budget follows from these declarations, so a
declaration is the only way to widen one. Nothing here imports torch: kernels may import this module and
nothing else of the suite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

__all__ = ["DTYPES", "Contract", "ContractError", "Precision", "Supports", "contract_of", "promises"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
_STORAGE = ("float64", "float32", "tf32", "bfloat16", "float16")

F = TypeVar("F", bound=Callable[..., Any])


class ContractError(ValueError):
    """A call, a declaration or a result that the contract does not allow.

    The message names the argument and the rule.
    """


@dataclass(frozen=True, slots=True)
class Precision:
    """Where a kernel rounds, and to what.

    None means the default for the dtype of the inputs, filled in by :meth:`resolved`.

    Attributes:
        matmul_input: storage of matmul operands: a dtype, "tf32", or "ieee" (the operands as they are).
        accumulate: accumulation of sums and matmuls: a dtype; "truncated" for float32 accumulation that
            aligns and truncates as tensor cores do; "tensor-cores" for that of a GPU, which is truncated for
            operands that its matrix units take (16 bits and tf32) and float32 or wider for others.
        scores: storage of scores before the softmax.
        exp_ulp: error of exp, exp2 and log in units in the last place, the argument's own rounding not
            included.
        probabilities: storage of P before the second matmul.
        dscores: storage of dS and dP in a backward pass.
        lse: storage of the log-sum-exp.
        state: storage of a recurrent state.
        output: storage of the result, one rounding at the end.
    """

    matmul_input: str | None = None
    accumulate: str | None = None
    scores: str | None = None
    exp_ulp: float | None = None
    probabilities: str | None = None
    dscores: str | None = None
    lse: str | None = None
    state: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str, ...]] = dict.fromkeys(
            ("scores", "probabilities", "dscores", "lse", "state", "output"), _STORAGE
        )
        allowed["matmul_input"] = ("ieee", *_STORAGE)
        allowed["accumulate"] = ("truncated", "tensor-cores", "float64", "float32", "bfloat16", "float16")
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ContractError(f"precision {name}={value!r}: expected one of {', '.join(choices)}")
        if self.exp_ulp is not None and not 0 < self.exp_ulp < 2**20:
            raise ContractError(
                f"precision exp_ulp={self.exp_ulp!r}: expected a positive number of ulps below 2**20"
            )

    def resolved(self, dtype: str) -> Precision:
        """This precision with every default filled in for inputs of ``dtype`` (a name of :data:`DTYPES`)."""
        if dtype not in DTYPES:
            raise ContractError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        wide = "float64" if dtype == "float64" else "float32"
        narrow = dtype in ("float16", "bfloat16")
        defaults: dict[str, Any] = {
            "matmul_input": dtype if narrow else "ieee",
            "accumulate": wide,
            "scores": wide,
            "exp_ulp": 2.0,
            "probabilities": dtype if narrow else wide,
            "dscores": dtype if narrow else wide,
            "lse": wide,
            "state": wide,
            "output": dtype,
        }
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = {name: defaults[name] if value is None else value for name, value in given.items()}
        if found["accumulate"] == "tensor-cores":
            # Inputs of 16 bits reach matrix units as they are, too ("ieee").
            matrix = narrow or found["matmul_input"] in ("float16", "bfloat16", "tf32")
            found["accumulate"] = "truncated" if matrix else wide
        return Precision(**found)


@dataclass(frozen=True, slots=True)
class Supports:
    """The sizes that a kernel accepts; cases outside are not generated for it.

    Attributes:
        head_dims: the only values of D and E, or None for any.
        max_head_dim: the largest D and E, or None.
        multiple_of: N must be a multiple of this.
        last_stride_one: tensors are handed over with unit stride on the last axis.
        nonempty: no size is zero.
    """

    head_dims: tuple[int, ...] | None = None
    max_head_dim: int | None = None
    multiple_of: int = 1
    last_stride_one: bool = False
    nonempty: bool = False

    def __post_init__(self) -> None:
        sizes = {
            "head_dims": self.head_dims or (),
            "max_head_dim": () if self.max_head_dim is None else (self.max_head_dim,),
            "multiple_of": (self.multiple_of,),
        }
        for name, values in sizes.items():
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ContractError(f"{name}={value!r}: expected a positive integer")

    def refuses(self, sizes: Mapping[str, int]) -> bool:
        """Whether a call with these sizes, by symbol, is outside what the kernel takes."""
        widths = [sizes[symbol] for symbol in ("D", "E") if symbol in sizes]
        return (
            any(self.head_dims is not None and width not in self.head_dims for width in widths)
            or any(self.max_head_dim is not None and width > self.max_head_dim for width in widths)
            or sizes.get("N", 0) % self.multiple_of != 0
            or (self.nonempty and not all(sizes.values()))
        )


_SUPPORTS = tuple(f.name for f in dataclasses.fields(Supports))


@dataclass(frozen=True, slots=True)
class Contract:
    """All that a kernel promises. The defaults are the strictest promises, with no options supported.

    ``without`` names invariants of ``attnproof.properties.invariants`` that the kernel does not promise.
    """

    family: str
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    options: tuple[str, ...] = ()
    layout: Literal["bhnd", "bnhd"] = "bhnd"
    causal_alignment: Literal["bottom-right", "top-left"] = "bottom-right"
    empty_row: Literal["zero", "nan", "undefined"] = "zero"
    empty_lse: Literal["-inf", "+inf", "nan", "undefined"] = "-inf"
    unseen_nonfinite: Literal["isolated", "may-leak"] = "isolated"
    deterministic: bool = True
    batch_invariant: bool = False
    row_invariant: bool = False
    causality: Literal["exact", "budget"] = "exact"
    differentiable: bool | None = None
    flush_subnormals: bool = False
    without: tuple[str, ...] = ()
    supports: Supports = field(default_factory=Supports)
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            _check_choice(f.name, getattr(self, f.name), hints[f.name])
        unknown = [d for d in self.dtypes if d not in DTYPES] if self.dtypes else [""]
        if unknown:
            raise ContractError(f"dtypes={unknown[0]!r}: expected names among {', '.join(DTYPES)}")

    def declare(self, declarations: Mapping[str, Any]) -> Contract:
        """This contract with ``declarations`` (KEY: value, values may be text as on a command line) put in.

        The fields of :class:`Supports` may be given by their own names, such as ``max_head_dim``.

        Raises:
            ContractError: for a key that no contract has, or a value that the key does not take.
        """
        hints = get_type_hints(type(self))
        changed: dict[str, Any] = {}
        for key, value in declarations.items():
            name = key.strip().replace("-", "_")
            if name in ("precision", "supports"):
                current = changed.get(name, getattr(self, name))
                if not isinstance(value, Mapping):
                    raise ContractError(f"declare {key}={value!r}: expected a table of {name} fields")
                changed[name] = _replace(current, value, name)
            elif name in _SUPPORTS:
                current = changed.get("supports", self.supports)
                changed["supports"] = _replace(current, {name: value}, "supports")
            elif name in hints and name != "family":
                changed[name] = _parse(name, value, hints[name])
            else:
                known = ", ".join((*(n for n in hints if n not in ("family", "supports")), *_SUPPORTS))
                raise ContractError(f"declare {key!r}: no such declaration; the contract has {known}")
        return dataclasses.replace(self, **changed)

    def on(self, device: str) -> Contract:
        """What the contract means on ``device`` ("cpu", "emulator:sm_90", "cuda:0", …).

        A GPU's matrix units align and truncate what they sum (theory.md HW-3; measured on an H100 by
        tests/kernels/test_hardware.py), whoever wrote the kernel: unless the contract says how sums are
        accumulated, that is allowed there.
        """
        if not device.startswith("cuda") or self.precision.accumulate is not None:
            return self
        return dataclasses.replace(
            self, precision=dataclasses.replace(self.precision, accumulate="tensor-cores")
        )


def promises(contract: Contract) -> Callable[[F], F]:
    """Decorator: attach ``contract`` to a kernel's entry point, where :func:`contract_of` finds it."""

    def attach(function: F) -> F:
        function.contract = contract  # type: ignore[attr-defined]
        return function

    return attach


def contract_of(function: object) -> Contract | None:
    """The contract that :func:`promises` attached to ``function``, or None."""
    contract = getattr(function, "contract", None)
    return contract if isinstance(contract, Contract) else None


def _replace(current: Any, table: Mapping[str, Any], owner: str) -> Any:
    hints = get_type_hints(type(current))
    changed = {}
    for key, value in table.items():
        name = key.strip().replace("-", "_")
        if name not in hints:
            raise ContractError(f"{owner} {key!r}: no such field; expected one of {', '.join(hints)}")
        changed[name] = _parse(name, value, hints[name])
    return dataclasses.replace(current, **changed)


def _parse(name: str, value: Any, hint: Any) -> Any:
    """Text from a command line, or a value from a configuration file, as the type that ``hint`` names."""
    if isinstance(value, str):
        if hint is bool or bool in get_args(hint):
            lowered = value.lower()
            if lowered in ("true", "false"):
                return lowered == "true"
            raise ContractError(f"{name}={value!r}: expected true or false")
        if get_origin(hint) is tuple or any(get_origin(a) is tuple for a in get_args(hint)):
            items = [item for item in value.split(",") if item]
            return tuple(int(i) if i.isdigit() else i for i in items)
        if hint in (int, float) or float in get_args(hint) or int in get_args(hint):
            kind = int if hint is int or int in get_args(hint) else float
            try:
                return kind(value)
            except ValueError:
                raise ContractError(f"{name}={value!r}: expected a number") from None
    if isinstance(value, list):
        value = tuple(value)
    _check_choice(name, value, hint)
    return value


def _check_choice(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ContractError(f"{name}={value!r}: expected one of {', '.join(map(str, get_args(hint)))}")
    if hint is bool and not isinstance(value, bool):
        raise ContractError(f"{name}={value!r}: expected true or false")
