"""The mutants are what they say: edits fit, copies are apart from the kernels, and a sample is proved wrong.

All of them are proved by ``python -m tests.quality.mutants.proof``.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnproof.kernels import merge, softmax
from tests.quality.mutants import built
from tests.quality.mutants import mutant as framework
from tests.quality.mutants.built import build, sources
from tests.quality.mutants.mutant import HELD_OUT_SEED, MECHANISMS, Mutant, MutantError, all_mutants, held_out
from tests.quality.mutants.proof import prove

REPOSITORY = Path(__file__).parents[2]
CASE = "softmax:float16:normal:B1,H2,G1,M9,N17,D16,E16:-:contiguous:1"

GRADIENT = "softmax:float16:normal:B1,H2,G1,M9,N17,D16,E16:causal,cotangents=normal:contiguous:1"

LONG = "softmax:float32:normal:B1,H2,G1,M33,N130,D64,E64:return_lse:contiguous:3"

MUTANTS = {mutant.name: mutant for mutant in all_mutants()}
TRITON = [mutant for mutant in MUTANTS.values() if mutant.name.startswith("triton_")]
SAMPLED = 8


def sample() -> list[Mutant]:
    """One Triton mutant of each mechanism, drawn by the seed, and further ones up to SAMPLED."""
    draw = random.Random(HELD_OUT_SEED)
    shuffled = draw.sample(TRITON, len(TRITON))
    first = {mutant.mechanism: mutant for mutant in reversed(shuffled)}
    chosen = list(first.values())
    return [*chosen, *[m for m in shuffled if m not in chosen and m.accuracy_only]][:SAMPLED]


def example(**changes: object) -> Mutant:
    """A mutant that changes nothing, with ``changes``."""
    fields: dict[str, object] = {
        "name": "nothing_changed",
        "base": "attnproof.kernels.softmax:attention",
        "edits": (("b_sum += 1.0", "b_sum += 1.00"),),
        "mechanism": "numerics",
        "bug": "",
        "story": "Nothing is wrong.",
        "trigger": CASE,
        "shows": ("certain",),
    }
    return Mutant(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("mutant", sample(), ids=lambda m: m.name)
def test_sampled_mutants_are_proved_wrong(mutant: Mutant) -> None:
    proof = prove(mutant)
    assert proof.wrong, proof


@pytest.mark.parametrize("accuracy_only", [False, True])
def test_a_copy_in_which_nothing_changed_is_not_proved_wrong(accuracy_only: bool) -> None:
    proof = prove(example(accuracy_only=accuracy_only))
    assert not proof.wrong
    # The structural proof grants the base half an ulp of its largest value, so that equal errors give less.
    assert 0.0 < proof.factor <= 1.0


def test_a_right_algorithm_that_rounds_otherwise_is_not_proved_wrong() -> None:
    # Smaller tiles of keys: another order of sums and other roundings, all of them declared.
    edit = ("block_n=call.block_n or tiles.block_n", "block_n=call.block_n or 16")
    other = example(edits=(edit,), trigger=LONG)
    assert not prove(other).wrong
    assert not prove(dataclasses.replace(other, accuracy_only=True)).wrong


@pytest.mark.parametrize("accuracy_only", [False, True])
def test_gradients_of_a_copy_in_which_nothing_changed_are_not_proved_wrong(accuracy_only: bool) -> None:
    proof = prove(example(mechanism="gradient", trigger=GRADIENT, accuracy_only=accuracy_only))
    assert not proof.wrong
    assert {"o", "dq", "dk", "dv"} == set(proof.errors)
    assert 0.0 < proof.factor <= 1.0
    # Values of order 1 in float16: an exact result that is off by a thousandth would be seen.
    assert all(base.rms < 2.0**-12 for _, base in proof.errors.values())


def test_a_right_backward_pass_of_other_tiles_is_not_proved_wrong() -> None:
    other = example(
        mechanism="gradient",
        module="attnproof.kernels.softmax_gradients",
        edits=(('"BM": call.block_m or tiles.block_m', '"BM": call.block_m or 16'),),
        trigger=LONG.replace("return_lse", "return_lse,cotangents=normal"),
    )
    assert not prove(other).wrong
    assert not prove(dataclasses.replace(other, accuracy_only=True)).wrong


def test_a_mutant_of_a_gradient_that_changes_an_output_is_not_proved_wrong() -> None:
    forward = MUTANTS["triton_sum_not_rescaled"]
    trigger = forward.trigger.replace("-:contiguous", "cotangents=normal:contiguous")
    proof = prove(dataclasses.replace(forward, mechanism="gradient", trigger=trigger))
    assert not proof.wrong
    assert proof.how == "forward"


def test_gradients_of_inputs_that_are_not_finite_have_no_proof() -> None:
    case = GRADIENT.replace("normal:B1", "seen-nonfinite:B1").replace("causal,", "")
    with pytest.raises(MutantError, match="have no exact value"):
        prove(example(mechanism="gradient", trigger=case))


def test_a_mutant_that_does_not_compile_is_not_proved_wrong() -> None:
    proof = prove(example(name="broken", edits=(("b_max = b_new", "b_max = tl.no_such_function(b_new)"),)))
    assert not proof.wrong
    assert proof.how == "CompilationError"


def test_there_are_enough_mutants_of_every_mechanism() -> None:
    assert len(TRITON) >= 38
    assert sum(mutant.accuracy_only for mutant in TRITON) >= 10
    assert {mutant.mechanism for mutant in TRITON} == set(MECHANISMS) - {"deception"}
    assert len({mutant.trigger for mutant in TRITON}) > len(TRITON) // 2


@pytest.mark.parametrize(
    ("family", "least"),
    [
        ("softmax", 22),
        ("sigmoid", 20),
        *((family, 10) for family in ("relu", "batch_normalised", "scaled_head", "differential", "easy")),
    ],
)
def test_there_are_enough_mutants_of_every_family(family: str, least: int) -> None:
    mutants = [mutant for mutant in TRITON if mutant.family == family]
    backward = [mutant for mutant in mutants if mutant.backward]
    assert len(backward if family == "softmax" else mutants) >= least
    assert "gradient" in {mutant.mechanism for mutant in backward}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=lambda m: m.name)
def test_edits_fit_the_source(mutant: Mutant) -> None:
    text = list(sources(mutant).values())[-1]
    compile(text, mutant.name, "exec")


@pytest.mark.parametrize(("old", "count"), [("b_alpha", 3), ("no such text", 0)])
def test_an_edit_that_does_not_fit_once_is_named(old: str, count: int) -> None:
    message = f"'{old}' occurs {count} times in attnproof.kernels.softmax"
    with pytest.raises(MutantError, match=re.escape(message)):
        sources(example(edits=((old, "x"),)))


def test_a_module_that_the_base_does_not_use_is_named() -> None:
    with pytest.raises(MutantError, match=r"does not import attnproof\.kernels\.logsumexp"):
        sources(example(module="attnproof.kernels.logsumexp"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "two words", "identifier"),
        ("base", "attnproof.kernels.softmax", "package.module:attribute"),
        ("mechanism", "magic", "expected one of masking"),
        ("trigger", "softmax", "trigger"),
        ("mechanism", "gradient", "only a case with cotangents"),
        ("edits", (), "edits"),
        ("shows", (), "shows"),
    ],
)
def test_a_field_that_is_wrong_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(MutantError, match=message):
        example(**{field: value})


def test_copies_lead_from_the_base_to_the_edited_module_and_leave_the_suite_alone() -> None:
    mutant = MUTANTS["triton_merge_weights_swapped"]
    merging, splitting, entry = sources(mutant).items()
    assert f"from {merging[0]} import merged" in splitting[1]
    assert f"from {splitting[0]} import attention_split" in entry[1]
    function = build(mutant)
    copy = sys.modules[splitting[0]]
    assert function.__module__ == entry[0]
    assert copy.merged.__module__ == merging[0]
    assert copy.attention_split is not softmax.attention_split
    assert softmax.merged is merge.merged
    assert function.contract == softmax.attention_split.contract


def test_a_whole_source_is_built_under_the_attribute_of_its_base() -> None:
    mutant = example(edits=(), source="def attention(q, k, v, **options):\n    return q\n")
    assert build(mutant)(1, 2, 3) == 1


def test_a_file_that_was_changed_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mutant = example(name="rewritten", edits=(), source="def attention(q):\n    return 'right'\n")
    (name,) = sources(mutant)
    folder = tmp_path / "attnproof" / "mutants"
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text("def attention(q):\n    return 'planted'\n")
    assert build(mutant)(0) == "right"
    assert sorted(path.name for path in folder.glob("*.py")) == [f"{name}.py"]


def test_an_unknown_name_is_no_mutant() -> None:
    with pytest.raises(AttributeError, match="no mutant is called so"):
        _ = built.no_such_mutant


def test_two_mutants_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.quality.mutants.triton_masking.MUTANTS", (TRITON[0], TRITON[0]))
    with pytest.raises(MutantError, match="defined twice"):
        framework.all_mutants()


def test_a_fresh_process_finds_a_mutant_by_its_target() -> None:
    script = (
        "from attnproof.targets import resolve\n"
        "print(resolve('tests.quality.mutants.built:triton_merge_weights_swapped').__module__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("mutant_triton_merge_weights_swapped_adapters_")


def test_a_third_is_held_out_by_the_recorded_seed() -> None:
    names = [f"mutant_{index}" for index in range(99)]
    held = held_out(names)
    assert len(held) == 33
    assert held == held_out(reversed(names), HELD_OUT_SEED)
    assert held != held_out(names, HELD_OUT_SEED + 1)
    # A chance draw of another order would change half of them.
    assert len(held ^ held_out([*names, "one_more"])) <= 1


def test_held_out_mutants_are_a_third_of_the_real_ones() -> None:
    held = held_out(MUTANTS)
    assert held < set(MUTANTS)
    assert abs(len(held) - len(MUTANTS) / 3) <= 0.5
    assert {MUTANTS[name].mechanism for name in held} >= {"masking", "numerics", "pointers", "accuracy"}
