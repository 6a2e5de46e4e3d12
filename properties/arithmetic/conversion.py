"""What the arithmetics share at their borders: tensors in, arrays of numbers between, enclosures out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "FloatArray",
    "ObjectArray",
    "as_objects",
    "check_axes",
    "check_mask",
    "check_matmul",
    "finite_float64",
    "keep_mask",
    "products",
    "resolved_shape",
    "round_up",
    "to_tensor",
]

ObjectArray: TypeAlias = npt.NDArray[np.object_]
FloatArray: TypeAlias = npt.NDArray[np.float64]


def finite_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64 on the CPU, which every floating dtype of torch converts to without error.

    Raises:
        TypeError: ``tensor`` is not a floating tensor.
        ValueError: ``tensor`` holds a NaN or an infinity.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(
            f"exact(tensor): tensor is {found}; pass a floating torch tensor (float16 to float64)"
        )
    result = tensor.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(result).all()):
        count = int((~torch.isfinite(result)).sum())
        raise ValueError(
            f"exact(tensor): {count} of {result.numel()} elements of the tensor of shape "
            f"{tuple(result.shape)} are NaN or infinite; an arithmetic takes finite numbers only: apply "
            "masks with masked() instead"
        )
    return result


def as_objects(numbers: Sequence[Any], shape: tuple[int, ...]) -> ObjectArray:
    """An object array of ``shape`` that holds ``numbers`` in row-major order."""
    result = np.empty(len(numbers), dtype=object)
    result[:] = numbers
    return result.reshape(shape)


def to_tensor(array: FloatArray) -> torch.Tensor:
    """A float64 tensor with a copy of ``array``."""
    return torch.from_numpy(np.array(array, dtype=np.float64, order="C"))


def check_mask(keep: torch.Tensor) -> None:
    """Accept the mask of ``masked``.

    Raises:
        TypeError: ``keep`` is not a bool tensor.
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"masked(a, keep): keep is {keep.dtype}; pass a bool tensor, True where a is kept")


def check_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Accept the shapes of a matrix product's arguments.

    Raises:
        ValueError: the shapes do not fit, or one has fewer than two axes.
    """
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ValueError(f"matmul(a, b): shapes {a} and {b} do not fit; ask (…, M, K) and (…, K, N)")


def check_axes(count: int, axes: tuple[int, ...]) -> None:
    """Accept the axes of ``permute`` for a value of ``count`` axes.

    Raises:
        ValueError: ``axes`` does not name each axis once.
    """
    if sorted(axis + count if axis < 0 else axis for axis in axes) != list(range(count)):
        raise ValueError(f"permute(a, axes): axes is {axes}; name each of the {count} axes of a once")


def resolved_shape(found: tuple[int, ...], asked: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that ``reshape`` gives a value of shape ``found``: ``asked``, its one −1 replaced.

    Raises:
        ValueError: no such shape holds as many elements as ``found``, or −1 could stand for anything.
    """
    count = math.prod(found)
    others = math.prod(length for length in asked if length != -1)
    unknown = count // others if others else -1
    shape = tuple(unknown if length == -1 else length for length in asked)
    if asked.count(-1) > 1 or any(length < 0 for length in shape) or math.prod(shape) != count:
        raise ValueError(
            f"reshape(a, shape): shape is {asked}, a's is {found}; ask a shape of {count} elements, "
            "in which −1 stands at most once and only beside lengths above 0"
        )
    return shape


def keep_mask(keep: torch.Tensor) -> npt.NDArray[np.bool_]:
    """The mask of ``masked``, a bool tensor, as a NumPy array."""
    check_mask(keep)
    mask: npt.NDArray[np.bool_] = keep.detach().cpu().numpy()
    return mask


def round_up(nearest: FloatArray, is_zero: FloatArray | npt.NDArray[np.bool_]) -> FloatArray:
    """Upper bounds of non-negative numbers, from conversions to float64 that err by less than one ulp.

    Args:
        nearest: the converted numbers; a NaN counts as unbounded.
        is_zero: True where the number itself, not only its conversion, is 0: the bound is 0 there.
    """
    with np.errstate(over="ignore"):
        bound = np.where(is_zero, 0.0, np.nextafter(nearest, np.inf))
    return np.where(np.isnan(bound), np.inf, bound)


def products(
    a: ObjectArray, b: ObjectArray, multiply: Callable[[ObjectArray, ObjectArray], ObjectArray]
) -> ObjectArray:
    """The batched matrix product (…, M, K) × (…, K, N) → (…, M, N) from the product of two matrices."""
    check_matmul(a.shape, b.shape)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left = np.broadcast_to(a, batch + a.shape[-2:])
    right = np.broadcast_to(b, batch + b.shape[-2:])
    result = np.empty((*batch, a.shape[-2], b.shape[-1]), dtype=object)
    for index in np.ndindex(*batch):
        result[index] = multiply(left[index], right[index])
    return result
