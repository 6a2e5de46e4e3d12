"""What the source articles say, or leave out, that no computation can decide: texts, and timings.

And one implication, which can be decided although its premise is in dispute. The other statements that can be
computed are in the modules named article_… and in worked_example.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from attnproof.properties.claims.base import Check, Claim, ClaimFinding, Laboratory
from attnproof.properties.claims.spline_converse import compiler
from attnproof.properties.forms.relu_encoder import softmax

__all__ = ["CLAIMS", "implied", "undecided"]


def undecided(reason: str) -> Check:
    """A check that reports why nothing was checked."""

    def check(_: Laboratory) -> ClaimFinding:
        return ClaimFinding(status="OPEN", evidence=reason)

    return check


def implied(compiled: ClaimFinding) -> ClaimFinding:
    """Does "every spline is a max–min polynomial" imply "every spline is a ReLU encoder"? As SPL-8b does.

    Args:
        compiled: what :func:`~attnproof.properties.claims.spline_converse.compiler` found.
    """
    good = compiled.status == "HOLDS"
    return replace(
        compiled,
        evidence="the conjecture says that a spline is max_i min_j of finitely many polynomials; "
        + (
            "each of these is an encoder by SPL-8b, which the implication is"
            if good
            else "here these are no encoders, and the implication has lost its second step"
        )
        + f": {compiled.evidence}. The premise is refuted in SPL-9d, so that no spline follows to be an "
        "encoder from this",
    )


def _text(name: str, title: str, statement: str, source: str, reason: str) -> Claim:
    return Claim(
        id=name,
        subject="source articles",
        title=title,
        statement=statement,
        source=source,
        kind="none",
        check=undecided(reason),
        control=None,
    )


_FIRST = "first source article (log-sum-exp trick and flash attention, part 1), {}"
_SECOND = "second source article (linearising attention), {}"
_THIRD = "third source article (summary of sigmoid attention), {}"
_FOURTH = "fourth source article (attention as a spline), {}"

CLAIMS: Final = (
    _text(
        "SEED0-5",
        "flash attention in the title",
        "The article explains flash attention; its definition of attention has no 1/√d and no masks.",
        _FIRST.format("title and definition"),
        "What a page contains is a matter of reading: flash attention is announced for a second part, and "
        "formulas "
        "are images that are missing. Needed: the second part. Checked elsewhere: flash attention's "
        "algorithm and "
        "its traffic (FA1-1, FA1-2), online softmax (ONL-1 to ONL-4).",
    ),
    _text(
        "SEED1-9",
        "lost formulas and the table of gates",
        "The article's formulas and its table of gates are those of arXiv 2312.06635.",
        _SECOND.format("images"),
        "The page is a reposting with synonyms in place of symbols, and its formulas and images are lost. "
        "Needed: the "
        "original page. Checked elsewhere: the table of gates of arXiv 2312.06635 (GLA-1).",
    ),
    _text(
        "SEED2-4",
        "no experiments, no limitations",
        "The paper on sigmoid attention does not validate its claims empirically and discusses no "
        "limitations.",
        _THIRD.format("criticism"),
        "A statement about a text: the abstract of arXiv 2409.04431 reports experiments in vision, speech "
        "and "
        "language, and the need to stabilise norms is discussed; only a reader of the paper can settle it. "
        "Checked "
        "elsewhere: the norm at the start of training (SIG-3).",
    ),
    _text(
        "SEED2-6a",
        "17 % measured",
        "FlashSigmoid's forward kernel is 17 % faster than FlashAttention-2's on an H100.",
        _THIRD.format("results; arXiv 2409.04431"),
        "A timing of two kernels that are not part of this suite, on a graphics processor. Needed: both "
        "kernels and an "
        "H100. What follows from the published figures for a whole step is SEED2-6b.",
    ),
    _text(
        "SEED3-4",
        "connections to recurrent networks, visualisations",
        "The paper on splines draws connections to recurrent networks and visualises its splines.",
        _FOURTH.format("summary"),
        "A statement about a text: neither is in the abstract of arXiv 2408.09624, and both fit the "
        "neighbouring "
        "abstract of arXiv 2405.13956. Needed: the paper. Checked elsewhere: attention as a recurrence "
        "(AAR-1 to "
        "AAR-5).",
    ),
    _text(
        "SEED3-5",
        "attention alone",
        "The paper on splines is about attention alone.",
        _FOURTH.format("summary"),
        "A statement about a text: its abstract names encoders, decoders and transformers too. Needed: the "
        "paper. "
        "Checked elsewhere: feed-forward networks, encoder and decoder blocks as splines (SPL-4, SPL-5).",
    ),
    Claim(
        id="SEED3-6b",
        subject="source articles",
        title="the Pierce–Birkhoff conjecture",
        statement="If the Pierce–Birkhoff conjecture is true, every spline is an encoder with ReLU "
        "attention.",
        source=_FOURTH.format("abstract of Lai, Lim and Liu, arXiv 2408.09624"),
        kind="exact",
        check=lambda lab: implied(compiler(*lab.choose((4, 0, 0), (12, 1, 1)))),
        control=lambda lab: implied(compiler(3, 0, 0, softmax)),
    ),
)
