"""The suite's power on a few mutants, one of each mechanism; all of them are judged by ``nox -s mutants``."""

from __future__ import annotations

import random

import pytest

from tests.quality.detection.run import searched
from tests.quality.detection.table import OURS, Verdict, finding, killed, summary_rows
from tests.quality.mutants.mutant import MECHANISMS, Mutant, all_mutants, held_out

MUTANTS = all_mutants()
SEED = 3
TRIGGER = "softmax:float32:normal:B1,H1,G1,M2,N3,D4,E4:-:contiguous:0"


def one_of_each_mechanism() -> list[Mutant]:
    """Drawn by a seed; mutants that only hang take their timeout and are left to the full run."""
    draw = random.Random(SEED)
    tried = [m for m in MUTANTS if m.shows != ("timeout",)]
    return [draw.choice([m for m in tried if m.mechanism == mechanism]) for mechanism in MECHANISMS]


def test_there_are_as_many_mutants_as_the_table_claims() -> None:
    """The floors that issue 3 sets: 60 of all, 15 that lose accuracy only, 10 deceivers, half Triton."""
    assert len(MUTANTS) >= 60
    assert sum(m.mechanism == "accuracy" for m in MUTANTS) >= 15
    assert sum(m.accuracy_only for m in MUTANTS) >= 15
    assert sum(m.mechanism == "deception" for m in MUTANTS) >= 10
    triton = sum("healthy" not in m.base for m in MUTANTS)
    assert 2 * triton >= len(MUTANTS)
    assert len(held_out(m.name for m in MUTANTS)) == round(len(MUTANTS) / 3)


@pytest.mark.parametrize("mutant", one_of_each_mechanism(), ids=lambda mutant: mutant.mechanism)
def test_a_default_search_kills_a_mutant_for_the_right_reason(mutant: Mutant) -> None:
    verdict = searched(mutant.name, mutant.target, mutant.base, mutant.shows, 55.0)
    assert verdict.rejected, f"{mutant.name} lives: {mutant.story}"
    assert verdict.fits, verdict.reason


def mutant(name: str, base: str = "m:right") -> Mutant:
    return Mutant(name, base, (("a", "b"),), "numerics", "", "wrong", TRIGGER, ("certain",))


def said(kernel: str, judge: str, rejected: bool, fits: bool = True) -> Verdict:
    return Verdict(kernel, judge, rejected, fits, 1.0, 1, "")


def test_a_rejection_is_a_kill_only_for_a_fitting_reason_by_a_judge_who_accepts_the_base() -> None:
    verdict = said("x", OURS, True)
    assert killed(mutant("x"), verdict, [verdict, said("m:right", OURS, False)])
    assert not killed(mutant("x"), verdict, [verdict, said("m:right", OURS, True)])
    assert not killed(mutant("x"), said("x", OURS, True, fits=False), [])
    assert not killed(mutant("x"), said("x", OURS, False), [])


def test_judges_are_compared_on_the_kernels_that_all_of_them_judged() -> None:
    # The peers have no tests of gradients: of y and of m:other only ours says something.
    mutants = [mutant("x"), mutant("y")]
    both = [said(name, judge, name == "x") for name in ("m:right", "x") for judge in (OURS, "peer")]
    judges = finding(mutants, [*both, said("m:other", OURS, False), said("y", OURS, True)]).series[0].columns
    assert judges["judge"] == [OURS, "peer"]
    assert judges["of"] == [1, 1]
    assert judges["correct kernels"] == [1, 1]


def test_the_finding_is_refuted_by_a_mutant_that_lives_and_by_a_peer_that_is_ahead() -> None:
    mutants = [mutant("x"), mutant("y")]
    base = [said("m:right", OURS, False), said("m:right", "peer", False)]
    both = [said(n, OURS, True) for n in "xy"]
    ahead = [*base, *both, said("x", "peer", True), said("y", "peer", False)]
    assert finding(mutants, ahead).verdict == "SUPPORTED"
    assert [row.kills for row in summary_rows(mutants, ahead)] == [2, 1]
    lives = [*base, both[0], said("y", OURS, False), said("x", "peer", True), said("y", "peer", True)]
    assert finding(mutants, lives).verdict == "REFUTED"
    alarm = [said("m:right", OURS, True), *base[1:], *both, said("x", "peer", True), said("y", "peer", True)]
    assert finding(mutants, alarm).verdict == "REFUTED"
