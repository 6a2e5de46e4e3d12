"""What is said of a failure is what was done to the kernel, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnproof.properties.case import Case
from attnproof.properties.contract import Supports
from attnproof.search import diagnosis
from attnproof.search.evidence import Evidence
from attnproof.search.places import ranges
from attnproof.search.shrinking import shrink
from tests.verify.search.failing_kernels import BUGS, RIGHT, CountingProbe, subject_of, written

PLAIN = "softmax:float32:normal:B2,H4,G2,M33,N65,D16,E8:{}:contiguous:7"

MASK = "    s = s.masked_fill("
EXP = "p = torch.softmax(torch.cat([s, extra], -1), -1)[..., :-1].nan_to_num()"
REPEAT = "k.repeat_interleave(h // g, 1).double(), v.repeat_interleave(h // g, 1)"
EXP_UNSHIFTED = "p = torch.exp(s.float()).double()\n    p = p / p.sum(-1, keepdim=True)"
LOG2 = "0.6931471805599453"

# Replacement in the right kernel, options of the failing case, and what must be said.
CAUSES: Mapping[str, tuple[str, str, str, str]] = {
    "causal strict": (*BUGS["causal"][0], "causal", "the causal mask is strict"),
    "causal wide": ("j <= i\n", "j <= i + 1\n", "causal", "one key beyond the causal diagonal"),
    "causal aligned top-left": ("j <= i\n", "j <= i - n + m\n", "causal", "aligned top-left"),
    "causal ignored": ("seen &= j <= i\n", "pass\n", "causal", "The causal mask is ignored"),
    "window left": ("j >= i - left", "j > i - left", "window=5..3", "left side is one key too narrow"),
    "window right": ("j <= i + right", "j <= i + right + 1", "window=5..3", "right side is one key too wide"),
    "window ignored": ("window is not None", "False", "window=5..3", "The window is ignored"),
    "bias ignored": ("bias is not None", "False", "bias=bhmn", "The bias is ignored"),
    "bias scaled": ("bias.double()", "bias.double() * scale", "bias=bhmn", "multiplied by the scale"),
    "soft cap ignored": ("softcap is not None", "False", "softcap=2.0", "The soft cap is ignored"),
    "sinks ignored": ("sinks is None", "True", "sinks", "The sinks are ignored"),
    "padding": (*BUGS["padding"][0], "-", "up to a multiple of 16, join the normaliser"),
    "tail tile": (MASK, f"    seen &= j < n - n % 32\n{MASK}", "-", "incomplete tile of 32 keys is left out"),
    "last key": (MASK, f"    seen &= j < n - 1\n{MASK}", "-", "The last key is left out"),
    "scale twice": ("* scale\n", "* scale**2\n", "-", "The scale is applied twice"),
    "scale of D": ("* scale\n", "/ q.shape[-1]\n", "-", "The scale is 1/D"),
    "scale off": (*BUGS["scale"][0], "-", "The scores are 1.01 times"),
    "base 2": (MASK, f"    s = s * {LOG2}\n{MASK}", "-", "to base 2"),
    "mean of values": ("* scale\n", "* 0\n", "-", "The scores are ignored"),
    "groups": (REPEAT, REPEAT.replace("_interleave(h // g, 1)", "(1, h // g, 1, 1)"), "-", "h mod G"),
    "output scaled": ("(p @ v)", "(p @ v * 1.005)", "-", "o is 1.005 times the exact result"),
    "output zero": ("(p @ v)", "(p @ v * 0)", "-", "o is 0 everywhere"),
    "lse in bits": (
        "lse.squeeze(-1)",
        f"(lse / {LOG2}).squeeze(-1)",
        "return_lse",
        "(log2 e) times the exact",
    ),
    "output in bfloat16": ("(p @ v)", "(p @ v).bfloat16()", "-", "a number of bfloat16"),
    "overflow": (EXP, EXP_UNSHIFTED, "-", "the maximum is not subtracted"),
}


BEFORE_SHRINKING = ("causal ignored", "groups", "output scaled")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def broken(folder: Path, name: str, old: str, new: str) -> str:
    assert RIGHT.count(old) == 1, f"{old!r} stands {RIGHT.count(old)} times in the kernel"
    module = "broken_" + "".join(c if c.isalnum() else "_" for c in name)
    (folder / f"{module}.py").write_text(RIGHT.replace(old, new))
    return f"{module}:attention"


def failing(target: str, text: str) -> tuple[CountingProbe, Evidence]:
    probe = CountingProbe(subject_of(target))
    judged = probe(Case.parse(text))
    assert judged.event.verdict == "FAIL", judged.event
    return probe, Evidence(judged)


def said(probe: CountingProbe, evidence: Evidence) -> tuple[str, ...]:
    return diagnosis.diagnose(evidence, probe, deadline=time.monotonic() + 60.0)


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_told_first_before_and_after_shrinking(name: str, folder: Path) -> None:
    old, new, options, words = CAUSES[name]
    text = PLAIN.format(options)
    if name == "overflow":
        text = text.replace(":normal:", ":exp-overflow:")
    probe, evidence = failing(broken(folder, name, old, new), text)
    if name in BEFORE_SHRINKING:
        sentences = said(probe, evidence)
        assert words in sentences[0], sentences
    small = shrink(evidence, probe, deadline=time.monotonic() + 30.0, supports=Supports())
    sentences = said(probe, small)
    assert words in sentences[0], (small.case, sentences)


def test_no_cause_is_told_that_the_kernel_has_not(folder: Path) -> None:
    """A quarter added to the scores of keys beyond 64 is none of the hypotheses."""
    probe, evidence = failing(written(folder, "tail"), PLAIN.format("-").replace("N65", "N129"))
    small = shrink(evidence, probe, deadline=time.monotonic() + 30.0, supports=Supports())
    assert said(probe, small) == ("64 keys are right, 65 are wrong: beyond a tile of 64.",)


def test_a_minimal_call_alone_does_not_decide_between_causes(folder: Path) -> None:
    """With one key, a key left out, a strict mask and a zeroed output look alike: larger calls decide."""
    probe, evidence = failing(
        broken(folder, "zero", "o = (p @ v)", "o = (p @ v * 0)"), PLAIN.format("causal")
    )
    small = shrink(evidence, probe, deadline=time.monotonic() + 30.0, supports=Supports())
    assert small.case["N"] == 1
    assert said(probe, small)[0] == "o is 0 everywhere."


def test_where_it_is_wrong_is_told(folder: Path) -> None:
    target = broken(folder, "rows", "    return (o, lse", "    o[:, 1, 30:] += 1\n    return (o, lse")
    probe, evidence = failing(target, PLAIN.format("-"))
    sentences = " ".join(said(probe, evidence))
    assert "heads 1 of 4; queries 30…" in sentences


def test_options_dtypes_and_layouts_without_which_it_is_right_are_told(folder: Path) -> None:
    old = "    i, j ="
    new = (
        "    if bias is not None and not q.is_contiguous() and q.dtype == torch.float16:\n"
        "        s = s + torch.arange(n) / n\n    i, j ="
    )
    target = broken(folder, "sibling", old, new)
    probe, evidence = failing(
        target, "softmax:float16:normal:B1,H4,G2,M33,N65,D16,E8:causal,bias=bhmn:transposed:7"
    )
    sentences = said(probe, evidence)
    assert "Wrong in float16, right in float32 and bfloat16." in sentences
    assert "Right without bias, wrong with it." in sentences
    assert "Right on contiguous tensors, wrong in the memory layout 'transposed'." in sentences
    assert not any("without causal" in sentence for sentence in sentences)


def test_mutation_and_exceptions_are_told_plainly(folder: Path) -> None:
    probe, evidence = failing(written(folder, "mutation"), PLAIN.format("-"))
    assert "writes into its own inputs" in said(probe, evidence)[0]
    probe, evidence = failing(written(folder, "exception"), PLAIN.format("-"))
    assert "AssertionError: 65 keys do not fit" in said(probe, evidence)[0]
    assert "kernel_exception.py:" in said(probe, evidence)[0]


def test_a_result_kept_from_an_earlier_call_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    probe = CountingProbe(subject_of(written(folder, "memo", memo=True)), isolated=True)
    case, earlier = (
        Case.parse(f"softmax:float32:normal:B1,H1,G1,M3,N5,D4,E4:-:contiguous:{s}") for s in (1, 2)
    )
    evidence = Evidence(probe(case, history=[earlier]), history=(earlier,))
    probe.pool.close()
    assert evidence.kind == "numeric"
    (sentence,) = said(probe, evidence)
    assert "wrong after one earlier call of the same shape" in sentence
    assert "the result of that earlier call was returned again" in sentence


def test_ranges_join_neighbours() -> None:
    assert ranges([0, 1, 2, 7, 9, 10]) == ["0…2", "7", "9…10"]
    assert ranges([]) == []
