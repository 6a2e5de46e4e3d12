"""From a failing call to the smallest and plainest one that fails in the same way.

Every step is judged by a probe with a certified reference of its own. A step is kept only if the failure is
of the same kind, and a failure that was proved (rule "certain") is never traded for a statistic. First the
case is made plainer as text (options, view, regime, dtype, sizes), with values drawn anew; then its tensors
are cut and their entries zeroed and rounded (delta debugging: Zeller and Hildebrandt, IEEE Trans. Softw. Eng.
28, 2002). A statistical failure keeps the values that its regime draws: thresholds are fitted to those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from attnproof.properties.case import Case, CaseError, Inputs
from attnproof.properties.contract import Supports
from attnproof.properties.signatures import SIGNATURES
from attnproof.search.descent import Descent
from attnproof.search.evidence import Evidence, Probe, kinds_of
from attnproof.search.smaller_calls import (
    ROUNDINGS,
    assembled,
    extents,
    kept,
    numbers_of,
    recast,
    resized,
    supported,
    tensors_of,
    with_option,
)

__all__ = ["shrink"]

_DTYPES = ("float32", "float16", "bfloat16")
# The order in which tensors are made plain where a family has them; its others follow.
_SIMPLEST_FIRST = ("q", "k", "bias", "sinks", "beta", "lam", "alpha", "v", "x")
_PATTERNS = ("1111", "111n", "11m1", "11mn")
# Up to so many nonzero entries, each is zeroed and rounded by itself.
_FEW = 24
# Share of the time left that the last check in a fresh process may take.
_CHECK_SHARE = 0.5
# Calls that are tried as a history, newest first, before the search gives up.
_HISTORY = 64


def shrink(
    evidence: Evidence,
    probe: Probe,
    *,
    deadline: float,
    supports: Supports,
    recent: Sequence[Case] = (),
    on_progress: Callable[[Evidence], None] | None = None,
) -> Evidence:
    """The smallest call found by the deadline that fails as ``evidence`` does.

    Args:
        evidence: a call that was judged FAIL.
        probe: judges a call; any number of them are made.
        deadline: of ``time.monotonic()``, in seconds. No probe is begun that is expected to end later.
        supports: sizes and strides that the kernel accepts.
        recent: cases that the worker answered before this one, oldest first, among which calls are sought
            that must come first where the failure does not show in a fresh process.
        on_progress: told of each step.

    Returns ``evidence`` itself where nothing smaller fails, or where the failure could not be made again.
    """
    return _Shrinker(evidence, probe, deadline, supports, on_progress).run(recent)


class _Shrinker(Descent):
    """The passes that improve on the best failing call."""

    def run(self, recent: Sequence[Case]) -> Evidence:
        """All passes in order, until nothing is left to do or the time is up."""
        self.best = self.original
        if self.original.history:
            return self._with_history()
        if not self.fails_fresh(self.original):
            return self._with_history() if self._find_history(recent) else self.original
        # The last step is to see the result fail in a process that has made no other call. Where processes
        # start so slowly that this would leave no time to shrink, that the original did must do.
        reserve = 1.5 * self.fresh_cost + self.cost
        checked = reserve <= _CHECK_SHARE * (self.deadline - time.monotonic())
        self.deadline -= reserve * checked
        for improve in (self._text, self._sizes, self._values):
            improve()
        self.deadline += reserve * checked
        if self.best is self.original or not checked or self.fails_fresh(self.best, late=True):
            return self.best
        return self.original

    # ---- calls that must come first

    def _find_history(self, recent: Sequence[Case]) -> bool:
        """Find few calls after which a fresh process fails; they become the best call's history."""
        case, inputs = self.original.case, self.original.judged.inputs
        alike = [c for c in recent if c.shape == case.shape and c.dtype == case.dtype and c != case]
        last = list(recent[-_HISTORY:])
        tries = [(replace(case, seed=case.seed + 1),), *[(c,) for c in reversed(alike[-2:])], tuple(last)]
        for history in tries:
            judged = self.again(case, inputs, history) if history else None
            if judged is not None:
                self.accept(replace(self.best, judged=judged, history=history))
                self._fewer_calls()
                return True
        return False

    def _fewer_calls(self) -> None:
        """Halve the history while one of its halves suffices."""
        progress = True
        while progress and len(self.best.history) > 1:
            calls = self.best.history
            middle = len(calls) // 2
            progress = any(self._after(self.case, half) for half in (calls[middle:], calls[:middle]))

    def _after(self, case: Case, history: tuple[Case, ...]) -> bool:
        inputs = self.best.judged.inputs if case == self.case else None
        judged = self.again(case, inputs, history)
        if judged is not None:
            self.accept(replace(self.best, judged=judged, history=history))
        return judged is not None

    def _with_history(self) -> Evidence:
        """Make the call and its history plainer together: each try costs a process, so they are bold."""
        for change in (_plainest, _plain_text, _tiny):
            try:
                case, history = change(self.case), tuple(change(c) for c in self.best.history)
            except CaseError:
                continue
            if not all(supported(c, self.supports) for c in (case, *history)) or case == self.case:
                continue
            if self._after(case, history) and change is _plainest:
                break
        return self.best

    # ---- the case as text

    def _text(self) -> None:
        """Options, view, regime, dtype and seed."""
        dtypes = self.original.judged.trial.contract.dtypes if self.original.judged.trial else ()
        if self.best.judged.inputs is not None:
            # Found by a search over values: the case's own may do as well.
            self.attempt(self.case)
        plain = replace(self.case, options=(), view="contiguous", regime="normal")
        if not self._variant(plain):
            self._options()
            self._variant(replace(self.case, view="contiguous"))
            self._variant(replace(self.case, regime="normal"))
            self._options()
        for dtype in _DTYPES[: _DTYPES.index(self.case.dtype)] if self.case.dtype in _DTYPES else ():
            if dtype in dtypes and self._variant(replace(self.case, dtype=dtype)):
                break
        if self.best.judged.inputs is None:
            self._variant(replace(self.case, seed=0))

    def _variant(self, case: Case) -> bool:
        """Try a case of the same shape, with the best call's values where it has its own."""
        inputs = self.best.judged.inputs
        return case != self.case and self.attempt(case, None if inputs is None else recast(case, inputs))

    def _options(self) -> None:
        """Leave options out; give those that stay their plainest value."""
        if not self.case.options or self._variant(replace(self.case, options=())):
            return
        for name in [n for n, _ in self.case.options if n != "causal_alignment"]:
            self._variant(with_option(self.case, name))
        if self.case.option("cotangents") not in (None, "ones") and self.best.judged.inputs is None:
            self._variant(with_option(self.case, "cotangents", "ones"))
        if self.case.option("window") is not None:
            for side in (0, 1):
                self._window_side(side)
        if isinstance(self.case.option("bias"), str) and self.best.judged.inputs is None:
            any(self._variant(with_option(self.case, "bias", pattern)) for pattern in _PATTERNS)
        if self.case.option("softcap") is not None:
            self._variant(with_option(self.case, "softcap", 1.0))

    def _window_side(self, side: int) -> None:
        """No limit on this side of the window, else a small one."""
        for value in (None, 0, 1, 2):
            window = list(self.case.option("window"))
            if window[side] == value or self._variant(_with_side(self.case, window, side, value)):
                return

    # ---- the sizes

    def _sizes(self) -> None:
        """Each size as small as fails, with values drawn anew; not where the values are the point."""
        if self.best.judged.inputs is not None:
            return
        one = self._smallest_width()
        if "G" not in self.case.sizes:
            for symbol in self.case.sizes:
                self._smallest(symbol)
            return
        if self.case.option("cu_seqlens") is not None:
            self._pieces()
        small = {"B": 1, "H": 1, "G": 1, "D": one, "E": one}
        if any(self.attempt(resized(self.case, **small, M=n, N=n)) for n in (2, 3)):
            self._smallest("M")
            self._smallest("N")
            return
        if not self.attempt(resized(self.case, **small)):
            self.attempt(resized(self.case, B=1))
            self._heads()
            self.attempt(resized(self.case, D=one, E=one))
            for symbol in ("E", "D"):
                self._widths(symbol)
        for symbol in ("M", "N", "M"):
            self._smallest(symbol)

    def _smallest_width(self) -> int:
        return min(self.supports.head_dims) if self.supports.head_dims else 1

    def _heads(self) -> None:
        group = self.case["H"] // self.case["G"]
        for heads, groups in ((1, 1), (2, 1), (2, 2), (4, 2), (group, 1), (2 * group, 2)):
            small = heads * groups < self.case["H"] * self.case["G"] and heads <= self.case["H"]
            if small and self.attempt(resized(self.case, H=heads, G=groups)):
                return

    def _widths(self, symbol: str) -> None:
        """The smallest power of two that fails (or width that the kernel has)."""
        widths = self.supports.head_dims or tuple(2**e for e in range(8))
        for width in sorted(widths):
            if width >= self.case[symbol] or self.attempt(resized(self.case, **{symbol: width})):
                return

    def _smallest(self, symbol: str) -> None:
        """1 or 2 of them, else the boundary that bisection finds between passing and failing."""
        step = self.supports.multiple_of if symbol == "N" else 1
        low, high = 0, -(-self.case[symbol] // step)
        for count in (1, 2):
            if count < high and self.attempt(resized(self.case, **{symbol: count * step})):
                return
            low = min(count, high)
        while high - low > 1 and self.in_time(self.cost):
            middle = (low + high) // 2
            if self.attempt(resized(self.case, **{symbol: middle * step})):
                high = middle
            else:
                low = middle

    def _pieces(self) -> None:
        """Fewer and shorter packed sequences."""
        index = 0
        while index < len(self.case.option("cu_seqlens")):
            lengths = self.case.option("cu_seqlens")
            shorter = [lengths[:index] + lengths[index + 1 :] or (0,)]
            shorter += [(*lengths[:index], n, *lengths[index + 1 :]) for n in (0, 1, 2) if n < lengths[index]]
            done = [self.attempt(_packed(self.case, new)) for new in shorter[:1]]
            if not done[0]:
                any(self.attempt(_packed(self.case, new)) for new in shorter[1:])
                index += 1

    # ---- the values

    def _values(self) -> None:
        """Cut the tensors, zero their entries, round what is left; proofs and broken rules only."""
        if self.original.invariant:  # it makes the tensors of its calls itself
            return
        if set(kinds_of(self.original.rules)) == {"numeric"} and "certain" not in self.original.rules:
            return
        if not self._bold_values():
            self._cut()
        form = SIGNATURES[self.case.family]
        cotangents = tuple(f"d{name}" for name in form.outputs)
        for name in dict.fromkeys((*_SIMPLEST_FIRST, *form.tensors, *form.keywords, *cotangents)):
            if name in self._tensors():
                self._zero(name)
                self._round(name)
        self._cut()
        if "scale" in self.best.inputs.options and self.best.inputs.options["scale"] != 1.0:
            inputs = self.best.inputs
            numbers = {**numbers_of(inputs), "scale": 1.0}
            self.attempt(self.case, assembled(self.case, tensors_of(self.case, inputs), numbers))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.case, self.best.inputs)

    def _put(self, **tensors: torch.Tensor) -> bool:
        """Try these values in place of the best call's."""
        numbers = numbers_of(self.best.inputs)
        return self.attempt(self.case, assembled(self.case, {**self._tensors(), **tensors}, numbers))

    def _bold_values(self) -> bool:
        """A few calls so plain that they are worth a probe: everything 0 or 1 but the values."""
        tensors = self._tensors()
        if "q" not in tensors or "v" not in tensors:
            return False
        # A cotangent of 0 shows nothing.
        zeroed = [
            n for n in tensors if n != "v" and not (n.startswith("d") and n not in self.best.inputs.tensors)
        ]
        zero = {name: torch.zeros_like(tensors[name]) for name in zeroed}
        v = tensors["v"]
        ones = torch.ones_like(v)
        ramp = torch.zeros_like(v)
        ramp[..., -1:, :] = 1.0
        return any(self._put(**zero, v=values) for values in (ramp, ones, v.sign(), v))

    def _cut(self) -> None:
        """Drop indices of every axis, in halves, quarters and so on down to single ones."""
        for axis, length in extents(self.case).items():
            remaining, size = length, length // 2
            while size and self.in_time(self.cost):
                remaining = extents(self.case)[axis]
                starts = range(0, remaining, size) if remaining <= _FEW or size > 1 else ()
                cuts = (self._without(axis, start, start + size) for start in starts)
                if not any(cut is not None and self.attempt(*cut) for cut in cuts):
                    size //= 2
                size = min(size, extents(self.case)[axis] // 2)

    def _without(self, axis: str, start: int, stop: int) -> tuple[Case, Inputs] | None:
        length = extents(self.case)[axis]
        rest = [i for i in range(length) if not start <= i < stop]
        if not rest and axis not in ("B", "M", "N", "R"):
            return None
        return kept(self.case, self.best.inputs, {axis: rest})

    def _zero(self, name: str) -> None:
        """As few entries other than 0 as fail: all zeroed, then halves, quarters, single ones."""
        size = len(_nonzero(self._tensors()[name]))
        while size and self.in_time(self.cost):
            places = _nonzero(self._tensors()[name])
            if size == 1 and len(places) > _FEW:
                return
            chunks = [places[start : start + size] for start in range(0, len(places), size)]
            if not any(self._put(**{name: _with(self._tensors()[name], chunk, None)}) for chunk in chunks):
                size //= 2
            size = min(size, len(_nonzero(self._tensors()[name])))

    def _round(self, name: str) -> None:
        """Round all entries alike as plainly as fails, then each by itself."""
        if not any(self._rounded(name, slice(None), rounding) for rounding in ROUNDINGS):
            return
        places = _nonzero(self._tensors()[name])
        for place in range(len(places)) if len(places) <= _FEW else ():
            any(self._rounded(name, slice(place, place + 1), rounding) for rounding in ROUNDINGS)

    def _rounded(self, name: str, which: slice, rounding: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Try a rounding; True also where it changes nothing."""
        tensor = self._tensors()[name]
        places = _nonzero(tensor)[which]
        new = _with(tensor, places, rounding)
        return torch.equal(new.nan_to_num(), tensor.nan_to_num()) or self._put(**{name: new})


def _nonzero(tensor: torch.Tensor) -> torch.Tensor:
    """Flat positions of the finite entries other than 0."""
    flat = tensor.double().flatten()
    return ((flat != 0) & flat.isfinite()).nonzero().flatten()


def _with(
    tensor: torch.Tensor, places: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """A copy with the entries at flat ``places`` rounded, or zeroed for None."""
    flat = tensor.double().flatten().clone()
    flat[places] = 0.0 if rounding is None else rounding(flat[places])
    return flat.reshape(tensor.shape)


def _with_side(case: Case, window: list[int | None], side: int, value: int | None) -> Case:
    window[side] = value
    return with_option(case, "window", tuple(window))


def _packed(case: Case, lengths: tuple[int, ...]) -> Case:
    total = sum(lengths)
    shape = {**case.sizes, "M": total, "N": total}
    options = tuple((n, lengths if n == "cu_seqlens" else v) for n, v in case.options)
    return replace(case, shape=tuple(shape.items()), options=options)


def _plain_text(case: Case) -> Case:
    return replace(case, options=(), view="contiguous", regime="normal")


def _tiny(case: Case) -> Case:
    return resized(case, **dict.fromkeys(case.sizes, 1))


def _plainest(case: Case) -> Case:
    return _tiny(_plain_text(case))
