"""The worked example of the first source article.

Both of its last steps are refuted, and the checks can say otherwise.
"""

from __future__ import annotations

from fractions import Fraction

import flint
import mpmath
import pytest

from attnproof.properties.claims import worked_example as example


def test_scores_are_the_articles() -> None:
    assert example.scores() == [[1, 1, 0], [0, 1, 1], [1, 2, 1]]


def test_the_articles_p_is_not_the_softmax_of_s() -> None:
    finding = example.check_weights()
    assert finding.status == "REFUTED"
    with mpmath.workdps(30):
        e = mpmath.e
        rows = [(e, e, 1), (1, e, e), (1, e, 1)]
        truth = [float(x / mpmath.fsum(row)) for row in rows for x in row]
    assert finding.table["softmax(S)"] == pytest.approx(truth, abs=1e-15)
    assert "9 of 9 entries" in finding.evidence


def test_even_p_times_v_has_another_third_row() -> None:
    finding = example.check_output()
    assert finding.status == "REFUTED"
    assert finding.evidence == "row 3 is (2.1, 3.1), printed (2.3, 3.5)"


def test_the_check_of_o_can_hold() -> None:
    corrected = [*example.PRINTED_O[:2], [Fraction("2.1"), Fraction("3.1")]]
    assert example.check_output(o=corrected).status == "HOLDS"


def test_the_check_of_p_counts_wrong_entries_only() -> None:
    close = [[Fraction(x) for x in row] for row in ([0.5, 0.5, 0], [0, 0.5, 0.5], [0.2, 0.5, 0.3])]
    assert example.check_weights(close).status == "REFUTED"
    assert "6 of 6" in example.check_weights(close[:2]).evidence


def test_the_check_of_p_can_hold() -> None:
    assert example.check_weights(example.certified_weights()).status == "HOLDS"


def test_the_right_output_against_mpmath() -> None:
    finding = example.right_output()
    assert finding.status == "HOLDS"
    with mpmath.workdps(30):
        p = [[mpmath.exp(int(s)) for s in row] for row in example.scores()]
        for row in p:
            o = [
                mpmath.fsum(w * int(v[j]) for w, v in zip(row, example.V, strict=True)) / mpmath.fsum(row)
                for j in (0, 1)
            ]
            assert "(" + ", ".join(mpmath.nstr(x, 6, strip_zeros=False) for x in o) + ")" in finding.evidence


def test_other_weights_have_another_output() -> None:
    # The same weights for every key: rows 1 and 2 are (2, 3) too.
    one = flint.fmpq_poly([1])
    finding = example.right_output([[one] * 3] * 3)
    assert finding.table["true"] == [True, True, True]
    assert finding.status == "REFUTED"
