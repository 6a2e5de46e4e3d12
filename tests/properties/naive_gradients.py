"""Gradients of naive transcriptions by numerical differentiation, far more precise than any kernel.

The five-point formula f' = (8 (f(x + h) − f(x − h)) − (f(x + 2h) − f(x − 2h))) / 12h errs by h⁴ f⁽⁵⁾/30. With
h = 10^−20 and 60 digits that is 10^−81 f⁽⁵⁾, and the subtraction leaves 10^−40 of the loss: gradients that
are not tiny beside the loss have more than 30 correct digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np

__all__ = ["central_differences"]


def central_differences(
    loss: Callable[[Mapping[str, Any]], Any], tensors: Mapping[str, Any], digits: int = 60
) -> dict[str, Any]:
    """The derivative of ``loss`` by every entry of every tensor.

    Args:
        loss: takes ``tensors`` as a mapping of object arrays of mpf, returns one mpf; called four times an
            entry, at ``digits`` digits of ``mpmath.mp``, with one entry moved by 1 and 2 steps of
            10^(−digits/3). It must be smooth there: entries at a kink have no derivative to find.
        tensors: nested lists or arrays of mpf, or of numbers that mpf takes without error.
        digits: decimal digits of all operations.

    Returns:
        An object array of mpf for each tensor, of its shape.
    """
    with mpmath.workdps(digits):
        arrays = {name: _numbers(tensor) for name, tensor in tensors.items()}
        step = mpmath.mpf(10) ** (-(digits // 3))
        gradients = {}
        for name, array in arrays.items():
            gradient = np.empty(array.shape, dtype=object)
            for place in np.ndindex(*array.shape):
                here = array[place]
                values = []
                for multiple in (1, -1, 2, -2):
                    array[place] = here + multiple * step
                    values.append(loss(arrays))
                array[place] = here
                near, far = values[0] - values[1], values[2] - values[3]
                gradient[place] = (8 * near - far) / (12 * step)
            gradients[name] = gradient
        return gradients


def _numbers(tensor: Any) -> Any:
    """A fresh object array of mpf."""
    array = np.array(tensor, dtype=object)
    numbers = np.empty(array.shape, dtype=object)
    for place in np.ndindex(*array.shape):
        numbers[place] = mpmath.mpf(array[place])
    return numbers
