"""Correct implementations of state spaces and selective scans, for calibration.

Plain torch that autograd differentiates, each family by a recurrence in float32 and by another form: the
whole sequence at once (a convolution, a masked matrix, two passes), or pairs that double their reach at every
round. None shares code with the suite's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from attnproof.healthy_gradients import Storage
from attnproof.properties.contract import Contract, promises

__all__ = [
    "convolved_ssm",
    "doubling_selective_scan",
    "matrix_h3",
    "matrix_ssd",
    "recurrent_h3",
    "recurrent_selective_scan",
    "recurrent_ssd",
    "recurrent_ssm",
]

_CARRYING = ("initial_state", "cu_seqlens", "return_state")
_SSM = Contract(family="ssm", options=_CARRYING, unseen_nonfinite="may-leak")
_H3 = replace(_SSM, family="h3", options=())
_SELECTIVE = replace(
    _SSM,
    family="selective_scan",
    options=("z", "delta_bias", "delta_softplus", "discretization", *_CARRYING),
)
_SSD = replace(_SSM, family="ssd")

Tensors = tuple[torch.Tensor, ...]
# From sequences in float32 and a state to outputs (B, H, n, …) and the last state.
Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _by_sequence(
    run: Run,
    tensors: Tensors,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``run`` on each packed sequence, all of whose tensors have positions on axis 2, or on the batch."""
    if cu_seqlens is None:
        return run(*tensors, state)
    bounds = cu_seqlens.tolist()
    found = [
        run(*(x[:, :, start:stop] for x in tensors), state[index : index + 1])
        for index, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    return torch.cat([o for o, _ in found], 2), torch.cat([last for _, last in found], 0)


def _first_state(
    like: torch.Tensor, shape: tuple[int, ...], initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The states before the first positions, (sequences, *shape) float32."""
    if initial is not None:
        return initial.float()
    count = like.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return torch.zeros(count, *shape)


def _stacked(outputs: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs, 2) if outputs else like[:, :, :0].float()


def _returned(o: torch.Tensor, state: torch.Tensor, wanted: bool) -> Any:
    return (o, state) if wanted else o


# ---- time-invariant state spaces


def _complex(x: torch.Tensor, paired: bool) -> torch.Tensor:
    """(…, 2) as complex numbers."""
    x = x.float()
    return torch.complex(x[..., 0], x[..., 1]) if paired else x


def _space_steps(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Run:
    """x ← a x + b u, y = Re Σ c x; u (B, H, n), x (B, H, D)."""

    def run(u: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = []
        for t in range(u.shape[2]):
            x = a * x + b * u[:, :, t, None]
            outputs.append((c * x).sum(-1).real if c.is_complex() else (c * x).sum(-1))
        return _stacked(outputs, u), x

    return run


def _powers(a: torch.Tensor, count: int) -> torch.Tensor:
    """a⁰ … a^(count − 1) by doubling, (count, H, D)."""
    table = torch.ones_like(a)[None]
    step = a
    while len(table) < count:
        table = torch.cat([table, table * step])
        step = step * step
    return table[:count]


def _lower(taps: torch.Tensor, length: int) -> torch.Tensor:
    """The matrix (H, n, n) with taps_{t−s} at row t, column s ≤ t; taps (n, H)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return (taps[distance.clamp(min=0)] * (distance >= 0)[..., None]).permute(2, 0, 1)


def _space_matrix(storage: Storage, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Run:
    """The convolution with the kernel K_i = Re Σ c aⁱ b, as a product with a matrix."""

    def run(u: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = u.shape[2]
        powers = _powers(a, length + 1)
        taps, answer = (powers[:-1] * b * c).sum(-1), powers[1:] * c
        y = torch.einsum("hts,bhs->bht", storage.operand(_lower(taps.real, length)), u)
        y = y + torch.einsum("thd,bhd->bht", answer, x).real
        written = torch.einsum("shd,bhs->bhd", powers[:-1].flip(0) * b, u.to(a.dtype))
        return y, powers[-1] * x + written

    return run


def _ssm(form: Callable[..., Run], *tensors: Any, **options: Any) -> Any:
    u, a, b, c, *rest = tensors
    paired = a.dim() == 3
    poles = tuple(_complex(x, paired) for x in (a, b, c))
    cu_seqlens = options.get("cu_seqlens")
    initial = options.get("initial_state")
    state = _first_state(u, tuple(a.shape), initial, cu_seqlens)
    values = u.float()
    y, last = _by_sequence(form(*poles), (values,), _complex(state, paired), cu_seqlens)
    if rest and rest[0] is not None:
        y = y + rest[0].float()[:, None] * values
    last = torch.view_as_real(last) if paired else last
    return _returned(y.to(u.dtype), last, options.get("return_state", False))


@promises(_SSM)
def recurrent_ssm(*tensors: Any, **options: Any) -> Any:
    """A diagonal state space, step by step in float32."""
    return _ssm(_space_steps, *tensors, **options)


@promises(_SSM)
def convolved_ssm(*tensors: Any, **options: Any) -> Any:
    """A diagonal state space as a convolution, its kernel an operand in the inputs' dtype."""
    storage = Storage(tensors[0].dtype, True)
    return _ssm(lambda *poles: _space_matrix(storage, *poles), *tensors, **options)


def _shifted(k: torch.Tensor, taps: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Σ_i taps_i ∘ k_{t−i} + skip ∘ k_t."""
    length = k.shape[2]
    total = torch.zeros_like(k) if skip is None else skip[:, None] * k
    for i in range(min(taps.shape[2], length)):
        total = total + torch.nn.functional.pad(k[:, :, : length - i], (0, 0, i, 0)) * taps[:, None, :, i]
    return total


def _h3(matrix: Storage | None, *tensors: Any) -> Any:
    q, k, v, taps, a, b, c = tensors[:7]
    d_shift, d_diag = (None if x is None else x.float() for x in (*tensors[7:], None, None)[:2])
    keys = _shifted(k.float(), taps.float(), d_shift)
    poles = tuple(_complex(x, a.dim() == 3) for x in (a, b, c))
    length, queries, values = q.shape[2], q.float(), v.float()
    if matrix is None:
        written = keys[..., :, None] * values[..., None, :]
        flat = written.flatten(3).permute(0, 3, 1, 2)  # (B, D·E, H, N)
        many = flat.flatten(0, 1)
        start = torch.zeros(len(many), *poles[0].shape, dtype=poles[0].dtype)
        kept, _ = _space_steps(*poles)(many, start)
        kept = kept.reshape(flat.shape).permute(0, 2, 3, 1).reshape(written.shape)
        if d_diag is not None:
            kept = kept + d_diag[:, None, None, None] * written
        return (queries[..., None] * kept).sum(-2).to(q.dtype)
    powers = _powers(poles[0], max(length, 1))
    mask = _lower((powers * poles[1] * poles[2]).sum(-1).real, length)
    if d_diag is not None:
        mask = mask + d_diag[:, None, None] * torch.eye(length)
    weights = (queries @ matrix.operand(keys).mT) * mask
    return (matrix.operand(weights) @ values).to(q.dtype)


@promises(_H3)
def recurrent_h3(*tensors: Any) -> Any:
    """H3 with its state spaces step by step in float32."""
    return _h3(None, *tensors)


@promises(_H3)
def matrix_h3(*tensors: Any) -> Any:
    """H3 as attention under a Toeplitz mask, operands in the inputs' dtype."""
    return _h3(Storage(tensors[0].dtype, True), *tensors)


# ---- selective scans


def _doubling(decay: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All prefixes of maps h → decay·h + added along axis 2, each round doubling what a pair covers."""
    reach = 1
    while reach < decay.shape[2]:
        before = tuple(x[:, :, :-reach] for x in (decay, added))
        after = tuple(x[:, :, reach:] for x in (decay, added))
        joined = after[0] * before[0], after[0] * before[1] + after[1]
        decay, added = (
            torch.cat([x[:, :, :reach], y], 2) for x, y in zip((decay, added), joined, strict=True)
        )
        reach *= 2
    return decay, added


def _selective_steps(
    decay: torch.Tensor, added: torch.Tensor, read: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for t in range(decay.shape[2]):
        h = decay[:, :, t] * h + added[:, :, t]
        outputs.append((read[:, :, t] * h).sum(-1))
    return _stacked(outputs, decay[..., 0]), h


def _selective_doubling(
    decay: torch.Tensor, added: torch.Tensor, read: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not decay.shape[2]:
        return decay[..., 0], h
    through, inner = _doubling(decay, added)
    states = through * h[:, :, None] + inner
    return (read * states).sum(-1), states[:, :, -1]


def _selective(run: Run, *tensors: Any, **options: Any) -> Any:
    u, delta, rates, write, read, *rest = tensors
    steps = delta.float()
    if options.get("delta_bias") is not None:
        steps = steps + options["delta_bias"].float()[:, None]
    if options.get("delta_softplus"):
        steps = torch.nn.functional.softplus(steps, threshold=30.0)
    exponent = steps[..., None] * rates.float()[:, None]
    gain = steps[..., None].expand(exponent.shape)
    if options.get("discretization", "euler") == "zoh":
        # The quotient's derivative cancels near 0, and there is none at 0.
        near = exponent.abs() < 0.125
        x = torch.where(near, exponent, 0.0)
        series = 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
        gain = gain * torch.where(near, series, torch.expm1(exponent) / torch.where(near, 1.0, exponent))
    inputs, outputs = (x.float().transpose(1, 2)[:, None] for x in (write, read))
    values = u.float()
    added = gain * inputs * values[..., None]
    cu_seqlens = options.get("cu_seqlens")
    state = _first_state(u, tuple(rates.shape), options.get("initial_state"), cu_seqlens)
    given = torch.exp(exponent), added, outputs.expand(exponent.shape)
    y, last = _by_sequence(run, given, state, cu_seqlens)
    if rest and rest[0] is not None:
        y = y + rest[0].float()[:, None] * values
    if options.get("z") is not None:
        y = y * torch.nn.functional.silu(options["z"].float())
    return _returned(y.to(u.dtype), last, options.get("return_state", False))


@promises(_SELECTIVE)
def recurrent_selective_scan(*tensors: Any, **options: Any) -> Any:
    """Mamba's selective scan, step by step in float32."""
    return _selective(_selective_steps, *tensors, **options)


@promises(_SELECTIVE)
def doubling_selective_scan(*tensors: Any, **options: Any) -> Any:
    """Mamba's selective scan by Hillis' and Steele's rounds in float32."""
    return _selective(_selective_doubling, *tensors, **options)


def _dual_steps(
    x: torch.Tensor, g: torch.Tensor, k: torch.Tensor, q: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for t in range(x.shape[2]):
        h = torch.exp(g[:, :, t])[..., None, None] * h + k[:, :, t, :, None] * x[:, :, t, None]
        outputs.append((q[:, :, t, None] @ h)[:, :, 0])
    return _stacked(outputs, x), h


def _dual_matrix(storage: Storage) -> Run:
    """Attention under the mask exp(segment sums), weights and operands in the inputs' dtype."""

    def run(
        x: torch.Tensor, g: torch.Tensor, k: torch.Tensor, q: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = x.shape[2]
        below = torch.ones(length, length, dtype=torch.bool).tril(-1)
        sums = torch.where(below, g[..., :, None], 0.0).cumsum(2)
        mask = torch.exp(sums.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf))
        x = storage.operand(x)
        y = storage.operand((q @ k.mT) * mask) @ x
        if not length:
            return y, h
        since = torch.exp(g.cumsum(2))[..., None]
        y = y + storage.operand(q * since) @ storage.operand(h)
        return y, since[:, :, -1:] * h + storage.operand(k * mask[:, :, -1, :, None]).mT @ x

    return run


def _dual(run: Run, *tensors: Any, **options: Any) -> Any:
    x, dt, rates, write, read, *rest = tensors
    group = x.shape[1] // write.shape[1]
    k, q = (t.float().repeat_interleave(group, 1) for t in (write, read))
    steps, cu_seqlens = dt.float(), options.get("cu_seqlens")
    shape = (x.shape[1], k.shape[3], x.shape[3])
    state = _first_state(x, shape, options.get("initial_state"), cu_seqlens)
    values = x.float()
    given = steps[..., None] * values, steps * rates.float()[:, None], k, q
    y, last = _by_sequence(run, given, state, cu_seqlens)
    if rest and rest[0] is not None:
        y = y + rest[0].float()[:, None, None] * values
    return _returned(y.to(x.dtype), last, options.get("return_state", False))


@promises(_SSD)
def recurrent_ssd(*tensors: Any, **options: Any) -> Any:
    """Mamba-2, step by step in float32."""
    return _dual(_dual_steps, *tensors, **options)


@promises(_SSD)
def matrix_ssd(*tensors: Any, **options: Any) -> Any:
    """Mamba-2 as attention under a semiseparable mask, operands in the inputs' dtype."""
    return _dual(_dual_matrix(Storage(tensors[0].dtype, True)), *tensors, **options)
