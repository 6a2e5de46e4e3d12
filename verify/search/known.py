"""Failures found before, in Hypothesis's own database, so that the next search begins with them.

Hypothesis keeps bytes under keys in ``.hypothesis/examples`` of the working directory. Its own entries are
the choices that a strategy made; ours, under keys that begin with "attnproof", hold the smallest case: its
text, its tensors where they are not the case's own, the invariant, and the calls that must come before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from hypothesis.database import ExampleDatabase

from attnproof.properties.case import APART, Case, CaseError, Inputs, make_inputs
from attnproof.properties.contract import Contract
from attnproof.properties.signatures import SIGNATURES
from attnproof.properties.views import lay_out, unit_last_stride
from attnproof.protocol import raw_bytes

__all__ = ["Known", "forget", "recall", "remember"]


@dataclass(frozen=True, eq=False)
class Known:
    """A failure of an earlier search; attributes as of :class:`attnproof.search.evidence.Evidence`."""

    case: Case
    inputs: Inputs | None = None
    invariant: str = ""
    history: tuple[Case, ...] = ()


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    content: bytes


class _Stored(msgspec.Struct, frozen=True):
    version: int
    case: str
    tensors: dict[str, _Tensor]
    scale: float | None
    invariant: str
    history: tuple[str, ...]


_VERSION = 1


def remember(database: ExampleDatabase, target: str, contract: Contract, known: Known) -> None:
    """Keep a failure of the kernel ``target``."""
    database.save(_key(target, contract), _encoded(known))


def forget(database: ExampleDatabase, target: str, contract: Contract, known: Known) -> None:
    """Drop a failure that does not show any more."""
    database.delete(_key(target, contract), _encoded(known))


def recall(database: ExampleDatabase, target: str, contract: Contract) -> Sequence[Known]:
    """The failures that earlier searches found, those with the smallest record first.

    Entries that this version cannot read, or that the kernel's declarations no longer allow, are passed over.
    """
    return list(_recalled(database, target, contract))


def _recalled(database: ExampleDatabase, target: str, contract: Contract) -> Iterator[Known]:
    for content in sorted(database.fetch(_key(target, contract)), key=len):
        try:
            known = _decoded(content)
        except (msgspec.DecodeError, CaseError, ValueError):
            continue
        if all(_takes(contract, case) for case in (known.case, *known.history)):
            yield known


def _takes(contract: Contract, case: Case) -> bool:
    """Whether a kernel under ``contract`` promises anything of ``case``."""
    form = SIGNATURES[case.family]
    asked = {name for name, _ in case.options} - {*APART, *form.required}
    strides = not contract.supports.last_stride_one or unit_last_stride(case.view, form.axes)
    return (
        case.dtype in contract.dtypes
        and asked <= set(contract.options)
        and strides
        and not contract.supports.refuses(case.sizes)
    )


def _key(target: str, contract: Contract) -> bytes:
    text = f"attnproof {target} {contract.family} {contract.layout}"
    return b"attnproof." + hashlib.sha256(text.encode()).digest()[:16]


def _encoded(known: Known) -> bytes:
    """Only what the contract names is kept: values, and the scale; flags and lengths are in the case."""
    tensors, scale = {}, None
    if known.inputs is not None:
        cotangents = {f"d{name}": tensor for name, tensor in known.inputs.cotangents.items()}
        named: dict[str, Any] = {**known.inputs.tensors, **known.inputs.options, **cotangents}
        tensors = {
            name: _stored(value)
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        scale = known.inputs.options.get("scale")
    history = tuple(case.id for case in known.history)
    return msgspec.msgpack.encode(_Stored(_VERSION, known.case.id, tensors, scale, known.invariant, history))


def _stored(tensor: torch.Tensor) -> _Tensor:
    return _Tensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw_bytes(tensor))


def _decoded(content: bytes) -> Known:
    stored = msgspec.msgpack.decode(content, type=_Stored)
    case = Case.parse(stored.case)
    if stored.version != _VERSION:
        raise ValueError(f"version {stored.version} of a stored failure, this attnproof reads {_VERSION}")
    inputs = None
    if stored.tensors:
        inputs = make_inputs(case)
        for name, kept in stored.tensors.items():
            tensor = lay_out(_tensor(kept), case.view, name)
            if name.removeprefix("d") in inputs.cotangents and name not in inputs.tensors:
                inputs.cotangents[name.removeprefix("d")] = tensor
            else:
                (inputs.tensors if name in inputs.tensors else inputs.options)[name] = tensor
        if stored.scale is not None:
            inputs.options["scale"] = stored.scale
    return Known(case, inputs, stored.invariant, tuple(Case.parse(text) for text in stored.history))


def _tensor(kept: _Tensor) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, kept.dtype)
    if not kept.content:
        return torch.empty(kept.shape, dtype=dtype)
    return torch.frombuffer(bytearray(kept.content), dtype=dtype).reshape(kept.shape)
