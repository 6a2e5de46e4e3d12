"""mLSTM and its gradients against the certified reference: sizes, gates, layouts, states, what must not leak.

Every element is held to the certain budget of the kernel's own declaration, and each tensor's mean square to
the probable one (``tests/properties/test_mlstm_family.py`` shows that wrong kernels exceed them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import emulate
from attnproof.kernels.arguments import ContractError
from attnproof.kernels.mlstm import attention, chunkwise
from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.contract import contract_of
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.mlstm import MLSTM
from attnproof.properties.oracle import evaluate
from tests.kernels.mlstm_reference import DTYPES, FORMS, INPUTS, carried, inputs, options, outputs
from tests.kernels.native import DEVICE, assert_same_bits

pytestmark = pytest.mark.usefixtures("emulated")


def assert_exact(entry: Any, t: Mapping[str, Tensor], scale: float = 0.3) -> dict[str, Tensor]:
    """Every output within its certain budget, and their mean squares near the probable one."""
    contract = contract_of(entry)
    assert contract is not None
    contract = contract.on(DEVICE)
    here = {name: x.cpu() for name, x in t.items()}
    with torch.device("cpu"):
        problem = MLSTM.problem(*(here[name] for name in INPUTS), scale=scale, **options(here))
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        cotangents = {name: here[f"d{name}"] for name in ("o", "state", "n") if f"d{name}" in here}
        gradient = GradientProblem(problem, forward, cotangents)
        exact = evaluate(gradient, EnclosureArithmetic())
        budgets = {**problem.budgets(forward, contract), **gradient.budgets(exact, contract)}
    got = outputs(entry, t, scale)
    for name, x in got.items():
        reference, budget = {**forward, **exact}[name], budgets[name]
        assert x.shape == reference.value.shape, name
        assert x.dtype == (torch.float32 if name in ("state", "n", "m") else t.get(name[1:], t["q"]).dtype)
        error = ((x.detach().cpu().double() - reference.value).abs() - reference.radius).clamp(min=0.0)
        error = torch.where(x.cpu() == reference.value, 0.0, error)  # of −∞ too
        judged = ~budget.open
        if not bool(judged.any()):
            continue
        # what is exact, such as the state of no positions, has no budget either
        worst = torch.where(error == 0, 0.0, error / budget.certain)[judged].max().item()
        assert worst <= 1, f"{name} is off by {worst:.3g} times the certain budget"
        deviations = torch.where(error == 0, 0.0, error / budget.probable)[judged]
        mean = deviations.square().mean().sqrt().item()
        assert mean <= 2.0, f"{name} is off by {mean:.3g} standard deviations on average"
    return got


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("chunks of 32", torch.float32),
        ("chunks of 32", torch.float16),
        ("chunks of 16", torch.bfloat16),
        ("steps", torch.float32),
        ("steps", torch.float16),
    ],
    ids=str,
)
def test_forms(form: str, dtype: torch.dtype) -> None:
    assert_exact(FORMS[form], inputs(dtype, h=1, n=70, d=40, e=20))


@pytest.mark.parametrize(
    ("form", "dtype", "cu_seqlens"),
    [
        ("chunks of 16", torch.float32, [0, 0, 17, 17, 37, 37]),
        ("chunks of 32", torch.float16, None),
        ("steps", torch.bfloat16, [0, 1, 1, 37]),
    ],
    ids=str,
)
def test_states(form: str, dtype: torch.dtype, cu_seqlens: list[int] | None) -> None:
    assert_exact(FORMS[form], carried(inputs(dtype, h=1), cu_seqlens))


@pytest.mark.parametrize("form", ["chunks of 16", "steps"])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
def test_sizes(n: int, form: str) -> None:
    got = assert_exact(FORMS[form], inputs(n=n))
    if not n:
        assert not got["state"].any()
        assert not got["n"].any()
        assert bool((got["m"] == -math.inf).all())


@pytest.mark.parametrize(("d", "e"), [(1, 40), (72, 3), (33, 65)])
def test_widths(d: int, e: int) -> None:
    for form in ("chunks of 16", "steps"):
        assert_exact(FORMS[form], inputs(torch.bfloat16, n=20, d=d, e=e))


def test_no_batch() -> None:
    got = outputs(attention, inputs(b=0, n=5))
    assert got["dk"].shape == (0, 2, 5, 16)


def extreme(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Input gates up to ±100, forget gates from −1000 to 1000 and some of −∞, float32."""
    choices = torch.tensor([-1000.0, -104.0, -20.0, 0.0, 6.0, 30.0, 1000.0, 1000.0, 30.0, -math.inf])
    t["f"] = choices[torch.randint(0, len(choices), t["f"].shape)]
    t["i"] = (torch.rand(t["i"].shape) * 2.0 - 1.0) * 100.0
    return t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["chunks of 16", "steps"])
def test_extreme_gates(form: str, dtype: torch.dtype) -> None:
    t = extreme(inputs(dtype, n=40))
    got = assert_exact(FORMS[form], t)
    assert all(bool(x.isfinite().all()) for x in got.values())
    assert not got["df"][t["f"] == -math.inf].any()


@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_every_input_gate_alike(gate: float) -> None:
    """e^100 and e^−100 are no numbers of float32: one must cancel, and one leaves o at 0."""
    t = inputs(n=20)
    t["i"] = torch.full_like(t["i"], gate)
    for form in ("chunks of 16", "steps"):
        o = assert_exact(FORMS[form], t)["o"]
        assert bool((o.abs().amax(-1) > 0.01).all()) is (gate > 0)


@pytest.mark.parametrize("form", ["chunks of 16", "steps"])
def test_a_large_gate_leaves_later_ones_their_bits(form: str) -> None:
    """After log σ = −1000 a difference of running sums would know the next decays to 6e-5 only."""
    t = inputs(n=16, forget=0.0)
    t["f"][:, :, 1] = -1000.0
    got = outputs(FORMS[form], t)
    with torch.device("cpu"):
        problem = MLSTM.problem(*(t[name].cpu() for name in INPUTS), scale=0.3)
        exact = evaluate(problem, EnclosureArithmetic())["o"].value
    error = (got["o"].cpu().double() - exact).abs()
    assert (error / exact.abs().amax(-1, keepdim=True)).max() <= 3e-6


def test_a_tie_of_the_denominator_is_shared() -> None:
    """q·k = 1 and i = 0: |Σ P| is exactly 1, and half of its gradient counts, as torch.maximum has it."""
    t = {name: torch.ones(1, 1, 1, *((1,) if name not in ("i", "f") else ())) for name in (*INPUTS, "do")}
    t["i"], t["v"] = torch.zeros(1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    for entry in FORMS.values():
        assert outputs(entry, t, 1.0)["dq"].item() == 1.5


def test_layouts() -> None:
    t = carried(inputs(n=40))
    want = outputs(attention, t)
    strided = {
        name: x[..., None].transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for name, x in t.items()
    }
    strided["k"] = torch.randn(1, 2, 16, 40, 3)[..., 1].mT.copy_(t["k"])
    strided["i"] = torch.randn(1, 40, 2, 2)[..., 1].mT.copy_(t["i"])
    assert_same_bits([*outputs(attention, strided).values()], [*want.values()])
    one = inputs(torch.bfloat16, n=20)
    one["v"], one["do"] = (
        one["v"][..., :1].expand(1, 2, 20, 16),
        torch.ones(1).bfloat16().expand(1, 2, 20, 16),
    )
    one["f"] = one["f"].float()
    for form in ("chunks of 16", "steps"):
        assert_exact(FORMS[form], one)


def test_only_one_input_requires_a_gradient() -> None:
    t = inputs(n=20)
    want = outputs(attention, t)
    for chosen in INPUTS:
        leaves = {name: t[name].clone().requires_grad_(name == chosen) for name in INPUTS}
        attention(*leaves.values(), scale=0.3).backward(t["do"])
        assert torch.equal(leaves[chosen].grad, want[f"d{chosen}"])
        assert all(x.grad is None for name, x in leaves.items() if name != chosen)


def test_inputs_stay_and_runs_agree() -> None:
    t = carried(inputs(torch.float16))
    before = {name: x.clone() for name, x in t.items()}
    first = outputs(attention, t)
    assert all(torch.equal(t[name], before[name]) for name in t)
    assert all(torch.equal(x, y) for x, y in zip(first.values(), outputs(attention, t).values(), strict=True))
    state = attention(*(t[name] for name in INPUTS), scale=0.3, return_state=True)
    assert len({x.untyped_storage().data_ptr() for x in state}) == 4


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [(torch.float32, math.nan), (torch.float16, math.nan), (torch.float16, math.inf)],
    ids=str,
)
@pytest.mark.parametrize("name", INPUTS)
def test_rows_before_a_bad_input_do_not_see_it(name: str, poison: float, dtype: torch.dtype) -> None:
    t = inputs(dtype, n=40)
    for form in ("chunks of 16", "steps"):
        clean = FORMS[form](*(t[x] for x in INPUTS), scale=0.3)
        changed = {**t, name: t[name].clone()}
        changed[name][:, 1, 20] = poison
        o = FORMS[form](*(changed[x] for x in INPUTS), scale=0.3)
        kept = torch.ones(2, 40, dtype=torch.bool)
        kept[1, 20 : 21 if name == "q" else None] = False
        assert torch.equal(o[:, kept], clean[:, kept])
        if math.isnan(poison):
            assert bool(o[:, 1, 20].isnan().all())


def test_memory_beyond_the_end_does_not_leak() -> None:
    t = inputs(n=21, d=19, e=18)
    wide = {}
    for name, x in t.items():
        hole = torch.full([size + 20 for size in x.shape], math.nan, dtype=x.dtype)
        wide[name] = hole[tuple(slice(size) for size in x.shape)].copy_(x)
    for form in ("chunks of 16", "steps"):
        want = outputs(FORMS[form], t)
        for x, y in zip(outputs(FORMS[form], wide).values(), want.values(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_every_target(target: str) -> None:
    with emulate(target):
        assert_exact(FORMS["chunks of 16"], inputs(torch.bfloat16, h=1, n=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"i": torch.zeros(1, 2, 36)}, r"i has shape \(1, 2, 36\)"),
        ({"f": torch.zeros(1, 2, 37, 16)}, r"f has shape \(1, 2, 37, 16\)"),
        ({"f": torch.zeros(1, 2, 37).half()}, "float16"),
        ({"q": torch.zeros(1, 4, 37, 16)}, "as many query heads"),
        ({"scale": math.nan}, "scale=nan"),
        ({"initial_state": torch.zeros(1, 2, 16, 16)}, r"Tensor: expected a tuple \(state, n, m\)"),
        (
            {"initial_state": (torch.zeros(1, 2, 16, 16), None, torch.zeros(1, 2))},
            "n of initial_state is None",
        ),
        (
            {"initial_state": (torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2, 1))},
            r"m of initial_state has shape \(1, 2, 1\): expected \(1, 2\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 36], dtype=torch.int32)}, "rise from 0 to the length 37"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    t = inputs()
    call = {**{name: t[name] for name in INPUTS}, "scale": 1.0, **change}
    with pytest.raises(ContractError, match=message):
        attention(**call)


def test_contract() -> None:
    for entry in FORMS.values():
        contract = contract_of(entry)
        assert contract is not None
        assert (contract.family, contract.options) == (
            "mlstm",
            ("initial_state", "cu_seqlens", "return_state"),
        )
    with pytest.raises(ContractError, match="chunk=20"):
        chunkwise(20)
    wide = torch.zeros(1, 1, 3, 257)
    with pytest.raises(NotImplementedError, match="up to 256"):
        attention(wide, wide, wide, *torch.zeros(2, 1, 1, 3), scale=1.0)
