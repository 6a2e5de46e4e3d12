"""Initial and final states of mLSTM, and packed sequences: what they mean, and which gradients there are.

Against a recurrence in torch with detached levels, and against calls that must give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels.mlstm import attention
from tests.kernels.mlstm_reference import (
    FORMS,
    INPUTS,
    STATE,
    carried,
    inputs,
    mlstm,
    neutral_head,
    options,
    outputs,
)

pytestmark = pytest.mark.usefixtures("emulated")


def assert_defined(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Near the recurrence: a rule that is another one differs by parts of a whole, rounding by 1e-5 here."""
    for name, exact in want.items():
        finite = exact.isfinite()
        assert torch.equal(got[name][~finite].double(), exact[~finite].double()), name
        error = (got[name].double() - exact.double())[finite].abs().max()
        assert error <= 1e-4 * exact[finite].abs().max(), name


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 16, 16, 37]], ids=str)
def test_recurrence(cu_seqlens: list[int] | None) -> None:
    t = neutral_head(carried(inputs(), cu_seqlens))
    t["f"][:, 1, [16, 20]] = -math.inf
    wide = {name: x.double() if x.is_floating_point() else x for name, x in t.items()}
    want = outputs(mlstm, wide)
    for entry in FORMS.values():
        assert_defined(outputs(entry, t), want)


@pytest.mark.parametrize(("first", "second"), [("chunks of 16", "steps"), ("steps", "chunks of 32")])
def test_hand_over(first: str, second: str) -> None:
    """Two calls are one, and so are their gradients, though neither differentiates a level."""
    t = neutral_head(carried(inputs()))

    def in_two(*tensors: Tensor, scale: float, initial_state: Any, return_state: bool) -> tuple[Tensor, ...]:
        assert return_state
        early, *state = FORMS[first](
            *(x[:, :, :19] for x in tensors), scale=scale, initial_state=initial_state, return_state=True
        )
        late, *state = FORMS[second](
            *(x[:, :, 19:] for x in tensors), scale=scale, initial_state=tuple(state), return_state=True
        )
        return torch.cat((early, late), 2), *state

    assert_defined(outputs(in_two, t), outputs(FORMS[second], t))


def test_sequences_without_positions_hand_on() -> None:
    t = carried(inputs(n=5), [0, 0, 5, 5])
    for entry in FORMS.values():
        got = outputs(entry, t)
        for final, initial in zip(("state", "n", "m"), STATE, strict=True):
            assert torch.equal(got[final][[0, 2]], t[initial][[0, 2]])
            assert final == "m" or torch.equal(got[f"d{initial}"][[0, 2]], t[f"d{final}"][[0, 2]])


@pytest.mark.parametrize("bad", [0, 1])
def test_sequences_do_not_see_each_other(bad: int) -> None:
    t = carried(inputs(n=20), [0, 9, 20])
    halves = (slice(0, 9), slice(9, 20))
    changed = {name: x.clone() for name, x in t.items()}
    for name, x in changed.items():
        if name in (*INPUTS, "do"):
            x[:, :, halves[bad]] = math.nan
        elif name != "cu_seqlens":
            x[bad] = math.nan
    for entry in FORMS.values():
        got, want = outputs(entry, changed), outputs(entry, t)
        for name, x in want.items():
            positions = (slice(None), slice(None), halves[1 - bad])
            good = positions if x.shape[2:3] == (20,) else 1 - bad
            assert torch.equal(got[name][good], x[good]), name


def test_nothing_before_is_a_neutral_state() -> None:
    t = neutral_head(neutral_head(carried(inputs(n=20))), 1)
    plain = {name: x for name, x in t.items() if name not in STATE}
    for entry in FORMS.values():
        got, want = outputs(entry, t), outputs(entry, plain)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        assert not got["dinitial_state"].any()
        assert not got["dinitial_n"].any()


def test_a_closed_gate_cuts_the_initial_state_off() -> None:
    t = carried(inputs(n=20))
    t["f"][:, :, 0] = -math.inf
    plain = {name: x for name, x in t.items() if name not in STATE}
    for entry in FORMS.values():
        got, want = outputs(entry, t), outputs(entry, plain)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        assert not got["dinitial_state"].any()
        assert not got["dinitial_n"].any()
        assert not got["df"][:, :, 0].any()


def test_only_the_final_state_is_asked_for() -> None:
    """No cotangent of o, and a level that asks for a gradient, which it does not get."""
    t = carried(inputs(n=20))
    level = t["initial_m"].requires_grad_()
    leaves = [t[name].requires_grad_() for name in ("k", "initial_n")]
    _, _, n, m = attention(*(t[name] for name in INPUTS), scale=0.3, **options(t))
    assert not m.requires_grad
    n.backward(t["dn"])
    assert level.grad is None
    without = {**{name: x.detach() for name, x in t.items()}, "do": torch.zeros_like(t["do"])}
    want = outputs(attention, {name: x for name, x in without.items() if name != "dstate"})
    assert torch.equal(leaves[0].grad, want["dk"])
    assert torch.equal(leaves[1].grad, want["dinitial_n"])
