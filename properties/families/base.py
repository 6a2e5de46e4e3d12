"""What a family is to the rest of the suite: a name, a call, an exact definition, a gauge and a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import Budget, broadcast_mask, dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.stored import stored_budget
from attnproof.properties.contract import Contract, ContractError

__all__ = ["Budget", "Family", "Problem", "Reference", "broadcast_mask", "dtype_name"]


@dataclass(frozen=True, eq=False)
class Reference:
    """Certified outputs by name, with the number of rows that each arithmetic certified."""

    outputs: Mapping[str, Enclosure]
    arithmetic: Mapping[str, int]


class Problem(ABC):
    """One instance of a family: checked inputs, made finite, with the masks that say what each row sees.

    Attributes:
        outputs: names of the outputs, in the order in which the call returns them.
        row_shape: the leading axes over which outputs are independent ("rows"), shared by all outputs.
        contract: declarations that change the definition (alignment, values of empty rows).
        differentiated: names of the inputs that have a gradient, in the order of the call; () for none.
        dtype: of the call's tensors.
    """

    outputs: tuple[str, ...]
    row_shape: tuple[int, ...]
    differentiated: tuple[str, ...] = ()
    dtype: torch.dtype

    def row_axes(self, output: str) -> int:
        """How many leading axes of an output index rows."""
        return len(self.row_shape)

    @property
    def nonfinite(self) -> bool:
        """Whether some input is NaN or infinite (−inf masks apart), so that no gradient is judged."""
        return bool(self.undetermined().any())

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a differentiated input, as it was given."""
        raise NotImplementedError(name)

    def input_dtype(self, name: str) -> torch.dtype:
        """The dtype of a differentiated input, in which its gradient is stored; that of the call."""
        return self.dtype

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """The gradients of Σ outputs·cotangents by the inputs, "d" + name, by closed formulas.

        ``cotangents`` has a finite tensor of the output's shape for some or all outputs.
        """
        raise NotImplementedError

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """What the roundings of a kernel under ``contract`` make of each gradient, before it is stored.

        By default the formulas of :meth:`differentiate` over the arithmetic of budgets.
        """
        arithmetic = Propagation(Roundings.of(contract, dtype_name(self.dtype)))
        return self.differentiate(arithmetic, cotangents)

    @abstractmethod
    def shape(self, output: str) -> tuple[int, ...]:
        """The shape of an output."""

    @abstractmethod
    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """Every output by the family's definition; rows without any key give 0 in place of an infinite value.

        With ``gauges``, also the scale of accuracy of each output under the name "gauge:" + output where it
        is not a function of the output itself (Σ p|v| for attention).
        """

    @abstractmethod
    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """Smaller problems that hold the rows where ``rows`` (bool, row_shape) is true.

        Each comes with the flat indices (int64) of its rows in ``row_shape``, in its own row order.
        """

    @abstractmethod
    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """Elements whose value is a limit that ``evaluate`` leaves out: value (such as −inf) → bool mask."""

    @abstractmethod
    def undetermined(self) -> torch.Tensor:
        """Rows (bool, row_shape) that see a non-finite input, of which nothing is asked."""

    @abstractmethod
    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """A lower bound of each element's scale of accuracy (float64, the output's shape).

        Σ p|v| for attention, |y| + 1 for a log-sum-exp, the value itself for a probability.
        """

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """Budgets of every output for a kernel under ``contract``; the inputs' dtype is the problem's.

        By default the formulas of :meth:`evaluate` over the arithmetic of budgets, stored once.
        """
        dtype = dtype_name(self.dtype)
        arithmetic = Propagation(Roundings.of(contract, dtype))
        found = self.evaluate(arithmetic)
        budgets = {}
        for name in self.outputs:
            shape = self.shape(name)
            estimate = arithmetic.reshape(found[name], shape)
            closed = broadcast_mask(self.undetermined(), shape)
            budgets[name] = stored_budget(estimate, reference[name].value, contract, dtype, closed)
        return budgets

    @abstractmethod
    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Why a wrong kernel could not be told from a right one by this problem; empty where it could."""

    @abstractmethod
    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """In words, what the row sees: number of keys, the positions that matter most with their weights."""


class Family(ABC):
    """A family of the contract.

    Attributes:
        name: its name in every room.
        inputs: names of the positional tensors.
        options: keywords with a default (passed only to kernels that list them).
        required: keywords that are always passed.
        sequence: inputs and outputs whose axes 1 and 2 are exchanged in layout "bnhd".
    """

    name: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    required: tuple[str, ...]
    sequence: tuple[str, ...] = ()

    @abstractmethod
    def problem(self, *tensors: torch.Tensor, **options: Any) -> Problem:
        """Check a call against the contract and make a problem of it.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """

    def returned(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the outputs that a call with ``options`` returns."""
        return self.problem_outputs(options)

    @abstractmethod
    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the outputs, in order."""

    @abstractmethod
    def output_dtype(self, output: str, dtype: str) -> str:
        """The dtype that the contract asks of an output for inputs of ``dtype``."""

    def check_keywords(self, options: Mapping[str, Any]) -> None:
        """Raise ContractError for a keyword that the family does not have, or a missing one."""
        known = (*self.required, *self.options, "causal_alignment")
        for key in options:
            if key not in known:
                raise ContractError(f"{self.name} has no option {key!r}; it takes {', '.join(known)}")
        for key in self.required:
            if options.get(key) is None:
                raise ContractError(f"{self.name} needs {key}=…; a Python float")
