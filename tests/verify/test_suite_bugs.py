"""Five deliberate bugs, put into a copy of kernels/softmax.py one at a time.

Each must turn the verdict to FAIL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import attnproof
import attnproof.kernels.softmax as original

SOURCE = Path(original.__file__).read_text()

BUGS = {
    "no max subtraction": [
        (
            "b_shift = tl.where(b_new == -INF, 0.0, b_new) if EDGE else b_new",
            "b_shift = tl.zeros_like(b_new)",
        ),
        ("b_max * (LN2 * UNIT) + tl.log2(b_total) * LN2", "tl.log2(b_total) * LN2"),
        ("b_alpha = tl.exp2((b_max - b_shift) * UNIT)", "b_alpha = tl.full([BM], 1.0, dtype=tl.float32)"),
    ],
    "missing tail mask": [("m_n = i_n + o_n < n_k", "m_n = i_n + o_n < n_k + BN")],
    "accumulator not rescaled": [("b_o = b_o * b_alpha[:, None]\n            b_o = tl.dot", "b_o = tl.dot")],
    "causal diagonal off by one": [
        (
            "m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right)",
            "m_s = m_s & (i_n + o_n[None, :] < o_m[:, None] + right)",
        )
    ],
    "bfloat16 accumulation": [
        (
            "b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)",
            "b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
        )
    ],
}


def mutated(folder: Path, name: str, replacements: list[tuple[str, str]]) -> str:
    """Write the kernel with ``replacements`` made into a module of its own; its target."""
    text = SOURCE
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in kernels/softmax.py"
        text = text.replace(old, new)
    module = "mutant_" + "".join(c if c.isalnum() else "_" for c in name)
    (folder / f"{module}.py").write_text(text)
    return f"{module}:attention"


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules worker processes find."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert str(tmp_path) in sys.path
    return tmp_path


def judged(target: str, **sizes: object) -> attnproof.VerifyResult:
    contract = original.attention.contract  # type: ignore[attr-defined]
    return attnproof.verify(target, "softmax", contract=contract, device="emulator:sm_90", jobs=1, **sizes)  # type: ignore[arg-type]


def test_the_unchanged_copy_passes(importable: Path) -> None:
    result = judged(mutated(importable, "unchanged", []), examples=60)
    assert result.verdict == "PASS", result


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_turns_the_verdict_to_fail(name: str, importable: Path) -> None:
    result = judged(mutated(importable, name, BUGS[name]), examples=30)
    assert result.verdict == "FAIL", result
    assert result.failures
    assert all(failure.reason for failure in result.failures)
