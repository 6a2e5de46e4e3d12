"""What one row of ``prefix_scan`` or ``rwkv4`` asks of its weights, and the errors of a kernel's answer.

Rows of o have the weights p = e^{D − L} and ask Σ p (dO·v + γ) with γ = −dO·o; the final state has e^{D − m}
and asks with its cotangents dW and dU in place of dO and γ (``families.decayed_softmax_gradients``). A
backward kernel may recompute weights from a stored log-sum-exp (or m and u), take γ from the stored output or
from Σ p dP, and store dP and dS; or it may run the recurrence, or a tree, backwards with the cotangents dO/N
and γ/N of its states, whose roundings are relative to p (|dO|·|v| + |dO|·|o|) before these cancel. It may
take an initial state for one more key of value w₀/u₀, and then divides again by u₀. Cotangents of final
states are float32: as operands of a matrix product they are rounded. All of them are within ``certain``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnproof.properties.budgets.decayed_softmax import RowErrors, Start, Weighed, common_errors
from attnproof.properties.budgets.decayed_softmax_states import FinalWeights
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth, half_spacing

__all__ = ["Asked", "InitialPairs", "Pairs"]

_LARGEST_EXPONENT = 700.0

# Value, bound, variance, absolute terms, and drift.
_Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Their sums over rows, with those of the squares of absolute terms before the drift.
_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Asked:
    """Some rows with what they ask; C columns, the initial state last if there is one.

    Attributes:
        weighed: the rows; weights: p or e, (B, H, R, C); base: what they are relative to, (B, H, R, 1).
        given: dO or dW, (B, H, R, E); unit: of its rounding as an operand.
        products, products_size, products_certain: given·v, Σ|given·v| and its errors, (B, H, R, C).
        level, level_size, level_certain, level_variance, level_drift: γ or dU, (B, H, R, 1).
        common_certain, common_variance: of the logarithm of all weights of a row, (B, H, R, 1).
        drift: of the logarithms of the weights, (B, H, R, C); centre: how far all of them move with these.
        tiny: what of a weight may underflow, (B, H, R, 1).
        lost: bool (B, H, R, 1), where an intermediate may overflow.
    """

    weighed: Weighed
    weights: torch.Tensor
    base: torch.Tensor
    given: torch.Tensor
    unit: float
    products: torch.Tensor
    products_size: torch.Tensor
    products_certain: torch.Tensor
    level: torch.Tensor
    level_size: torch.Tensor
    level_certain: torch.Tensor
    level_variance: torch.Tensor
    level_drift: torch.Tensor
    common_certain: torch.Tensor
    common_variance: torch.Tensor
    centre: torch.Tensor
    tiny: torch.Tensor
    lost: torch.Tensor

    @property
    def relative(self) -> torch.Tensor:
        """Bound of the relative error of the weights."""
        error = torch.where(self.weighed.row.x > -torch.inf, self.weighed.certain + self.common_certain, 0.0)
        return torch.expm1(error.clamp(max=_LARGEST_EXPONENT))

    @property
    def drift(self) -> torch.Tensor:
        """How the weights drift."""
        return self.weights * (self.weighed.drift - self.centre)

    @classmethod
    def of_output(cls, errors: RowErrors, w: Weighed, do: torch.Tensor) -> Asked:
        """Rows of o with the cotangent ``do``."""
        r, row = errors.r, w.row
        quotient, (log_certain, log_variance) = errors.quotient(w), common_errors(w, errors.r)
        o, seen = quotient.o, (row.x > -torch.inf).double()
        tiny = r.probabilities_tiny * w.lift.clamp(min=1.0)
        dp, dp_size, dp_certain = _products(r, do, w.v, r.input)
        dot, dot_size = (do * o).sum(-1, keepdim=True), (do.abs() * o.abs()).sum(-1, keepdim=True)
        operands = (1.0 + r.input) ** 2 - 1.0 + growth(do.shape[-1] + 4.0, r.accumulate)
        kept = quotient.certain * (1.0 + r.output) + r.output * o.abs() + r.output_tiny
        from_output = (do.abs() * kept).sum(-1, keepdim=True) + operands * dot_size
        error = torch.where(seen > 0, w.certain + log_certain, 0.0).clamp(max=_LARGEST_EXPONENT)
        own = row.p * torch.expm1(error) + tiny * seen
        directly = (row.p * dp_certain + own * (dp.abs() + dp_certain)).sum(-1, keepdim=True)
        directly = directly + growth(row.count + 4.0, r.accumulate) * (row.p * dp_size).sum(-1, keepdim=True)
        stored = half_spacing(o, r.output, r.output_tiny).square() / 3.0
        centre = (row.p * w.drift).sum(-1, keepdim=True)
        drift = row.p * (w.drift - centre)
        # dO/N and its product with v, N as a kernel scales it.
        high = dp_size * w.lift.clamp(min=1.0) >= _largest(r) / 2.0
        return cls(
            weighed=w,
            weights=row.p,
            base=row.lse,
            given=do,
            unit=0.0,
            products=dp,
            products_size=dp_size,
            products_certain=dp_certain,
            level=-dot,
            level_size=dot_size,
            level_certain=torch.maximum(from_output, directly),
            level_variance=(do.square() * (quotient.variance + stored)).sum(-1, keepdim=True),
            level_drift=-(drift * dp).sum(-1, keepdim=True),
            common_certain=log_certain,
            common_variance=log_variance,
            centre=centre,
            tiny=tiny,
            lost=quotient.lost.any(-1, keepdim=True) | (high & (seen > 0)).any(-1, keepdim=True),
        )

    @classmethod
    def of_final(cls, errors: RowErrors, final: FinalWeights, du: torch.Tensor, dw: torch.Tensor) -> Asked:
        """The final state with the cotangents ``du`` (B, H, 1, 1) and ``dw`` (B, H, 1, E)."""
        r, w = errors.r, final.weighed
        unit = max(r.input, r.operand)
        products, size, certain = _products(r, dw, w.v, unit)
        zero = torch.zeros_like(du)
        high = (size >= _largest(r) / 2.0) & (w.row.x > -torch.inf)
        return cls(
            weighed=w,
            weights=final.e,
            base=w.frame,
            given=dw,
            unit=unit,
            products=products,
            products_size=size,
            products_certain=certain,
            level=du,
            level_size=du.abs(),
            level_certain=unit * du.abs(),
            level_variance=zero,
            level_drift=zero,
            common_certain=final.m_error,
            common_variance=final.m_variance + 4.0 * r.elementwise**2,
            centre=zero,
            tiny=r.probabilities_tiny * torch.ones_like(zero),
            lost=w.lost | high.any(-1, keepdim=True),
        )


def _largest(r: Roundings) -> float:
    """The largest number of the accumulation and of stored dP."""
    return min(r.largest, r.storage("dscores")[2])


def _products(
    r: Roundings, given: torch.Tensor, v: torch.Tensor, unit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """given·v with Σ|given·v| and its errors, stored as dP; ``unit`` of the rounding of ``given``."""
    width, dscores = v.shape[-1], r.storage("dscores")[0]
    products, size = given @ v.mT, given.abs() @ v.abs().mT
    operands = (1.0 + unit) * (1.0 + r.input) - 1.0 + growth(width + 4.0, r.accumulate)
    certain = (operands + dscores * (1.0 + operands)) * size
    return products, size, certain + r.operand_tiny + r.accumulate_tiny * (1.0 + v.abs().sum(-1)[:, :, None])


def _stepped(r: Roundings, asked: Asked) -> torch.Tensor:
    """A recurrence backwards multiplies and adds in every step, (B, H, R, 1)."""
    count, state = asked.weighed.row.count, r.storage("state")[0]
    steps = growth(2.0 * count + float(asked.given.shape[-1]) + 8.0, r.accumulate)
    return steps + (growth(count + 1.0, state) if state > r.elementwise else 0.0)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What the rows say to every column, (B, H, R, C).

    Attributes:
        weights: value, bound, variance and drift of the weights.
        terms: of dS: value, bound, variance, Σ of absolute terms, and drift.
    """

    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    terms: _Terms

    @classmethod
    def of(cls, r: Roundings, asked: Asked) -> Pairs:
        """Of rows with what they ask."""
        w, p, relative, stepped = asked.weighed, asked.weights, asked.relative, _stepped(r, asked)
        width = asked.given.shape[-1]
        stored, (dscores, dscores_tiny, _) = max(r.probabilities, r.operand), r.storage("dscores")
        seen = (w.row.x > -torch.inf).double()
        tiny = asked.tiny * seen
        rounded = stored + r.input + asked.unit + stepped
        p_certain = p * (relative + rounded * (1.0 + relative)) + tiny
        dp, level = asked.products, asked.level
        size = asked.products_size + asked.level_size
        g = dp + level
        g_certain = asked.products_certain + asked.level_certain + r.elementwise * (dp.abs() + level.abs())
        ds = p * g
        ds_certain = p * relative * (g.abs() + g_certain) + tiny * (size + g_certain) + p * g_certain
        ds_certain = ds_certain + dscores * (ds.abs() + ds_certain) + stepped * p * size
        ds_certain = ds_certain + (dscores_tiny + r.accumulate_tiny) * seen
        p_relative = w.variance + asked.common_variance
        p_variance = p.square() * (p_relative + MEAN_SQUARE * stored**2) + tiny.square() / 3.0
        summed = asked.given.square() @ w.v.square().mT
        dp_variance = MEAN_SQUARE * (dscores**2 * dp.square() + r.accumulate**2 * width * summed)
        carried = r.accumulate**2 * MEAN_SQUARE * 2.0 * (dp.square() + level.square())
        g_variance = dp_variance + asked.level_variance + carried
        kept = MEAN_SQUARE * (dscores**2 + r.operand**2)
        ds_variance = p.square() * (g.square() * (p_relative + kept) + g_variance)
        ds_variance = ds_variance + (tiny * size).square() / 3.0
        drift = asked.drift
        return cls(
            (p, p_certain, p_variance, drift),
            (ds, ds_certain, ds_variance, p * size, drift * g + p * asked.level_drift),
        )


@dataclass(frozen=True, eq=False)
class InitialPairs:
    """What the rows say to the initial state together: value, bound, variance, sizes, squares and drift.

    Attributes:
        weighted: of dw₀, (B, H, 1, E); mass: of du₀, (B, H, 1, 1).
    """

    weighted: _Sums
    mass: _Sums

    @classmethod
    def of(cls, r: Roundings, asked: Asked, start: Start, value: torch.Tensor) -> InitialPairs:
        """Of rows with what they ask, and the value w₀/u₀ (B, H, 1, E) of the state as a key."""
        present = (start.x > -torch.inf).double()
        exponent = torch.where(present > 0, start.x - asked.base, -torch.inf)
        p = torch.exp(exponent.clamp(max=_LARGEST_EXPONENT))
        error = (start.certain + asked.common_certain).clamp(max=_LARGEST_EXPONENT)
        relative, stepped = torch.expm1(error), _stepped(r, asked)
        stored = max(r.probabilities, r.operand)
        rounded = stored + r.input + asked.unit + stepped
        tiny = asked.tiny * present
        certain = p * (relative + rounded * (1.0 + relative)) + tiny
        # Rows between which the level does not rise share one e^{m₀ − m}: its errors add up as drifts do.
        drift = p * ((start.drift - asked.centre).square() + start.variance).sqrt()
        variance = asked.common_variance
        given, level = asked.given, asked.level
        product = (given * value).sum(-1, keepdim=True)
        across = (given.abs() * value.abs()).sum(-1, keepdim=True) + asked.level_size
        level_certain = asked.level_certain + r.elementwise * across
        mass_certain = certain * (level.abs() + level_certain) + p * level_certain
        mass_certain = mass_certain + rounded * p * across + tiny * across + r.accumulate_tiny * present
        kept = variance + MEAN_SQUARE * stored**2
        carried = 2.0 * MEAN_SQUARE * r.accumulate**2 * (product.square() + level.square())
        mass_variance = p.square() * (level.square() * kept + carried + asked.level_variance)
        mass_variance = mass_variance + (tiny * across).square() / 3.0
        weighted_variance = p.square() * kept + tiny.square() / 3.0

        def over_rows(weights: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            return weights.mT @ by

        return cls(
            (
                over_rows(p, given),
                over_rows(certain, given.abs()) + over_rows(present, r.operand_tiny * torch.ones_like(given)),
                over_rows(weighted_variance, given.square()),
                over_rows(p, given.abs()),
                over_rows(p.square(), given.square()),
                over_rows(drift, given),
            ),
            (
                (p * level).sum(2, keepdim=True),
                mass_certain.sum(2, keepdim=True),
                mass_variance.sum(2, keepdim=True),
                (p * across).sum(2, keepdim=True),
                (p * across).square().sum(2, keepdim=True),
                (drift * level + p * asked.level_drift).sum(2, keepdim=True),
            ),
        )
