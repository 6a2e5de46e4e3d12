"""Right implementations of families with a state are not accused where whole products are subnormal.

Each case was accused once, by budgets that knew only errors relative to the factors of a product.
"""

from __future__ import annotations

import pytest
import torch

import attnproof
from attnproof.properties.contract import contract_of
from attnproof.targets import resolve

CASES = (
    (
        "recurrent_linear linear:float32:subnormal-values:B2,H1,N33,D32,E64:"
        "feature_map=relu,cotangents=aligned:columns:120"
    ),
    (
        "chunked_gated_linear gated_linear:float32:subnormal-values:B2,H2,N51,D5,E3:"
        "gate=head,cotangents=normal:transposed:313"
    ),
    (
        "recurrent_retention retention:float32:subnormal-values:B1,H3,N15,D64,E32:"
        "cu_seqlens=5+0+10,return_state,cotangents=one-hot:contiguous:314"
    ),
    (
        "chunked_rwkv6 rwkv6:float32:subnormal-values:B1,H3,N32,D1,E5:"
        "cu_seqlens=10+0+22,cotangents=one-hot:columns:245"
    ),
    (
        "recurrent_delta delta:float32:subnormal-values:B2,H3,N15,D128,E128:"
        "gate=channel,cotangents=one-hot:transposed:44"
    ),
    "chunked_delta delta:float16:subnormal-values:B3,H2,N17,D1,E5:gate=head,cotangents=aligned:contiguous:61",
)


@pytest.mark.parametrize("text", CASES)
def test_a_right_kernel_passes_where_everything_is_subnormal(text: str) -> None:
    name, case = text.split()
    target = f"attnproof.healthy_states:{name}"
    result = attnproof.check(target, case, device="cpu", contract=contract_of(resolve(target)))
    assert result.verdict == "PASS", result


def forgetful(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """Retention that forgets everything at position 8."""
    from attnproof import healthy_states

    cut = min(8, q.shape[2])
    parts = [
        healthy_states.recurrent_retention(q[:, :, s], k[:, :, s], v[:, :, s], scale=options["scale"])
        for s in (slice(0, cut), slice(cut, None))
    ]
    return torch.cat(parts, 2)


def test_a_wrong_kernel_is_still_accused_there() -> None:
    contract = attnproof.Contract(family="retention", differentiable=False)
    case = "retention:float32:subnormal-values:B1,H2,N24,D8,E8:-:contiguous:3"
    result = attnproof.check(forgetful, case, device="cpu", contract=contract)
    assert result.verdict == "FAIL"
    assert {failure.rule for failure in result.failures} == {"certain"}
