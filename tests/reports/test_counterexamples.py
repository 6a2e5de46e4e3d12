"""The smallest failing input, in every report that shows one."""

from __future__ import annotations

from pathlib import Path

from attnproof.reports import html, markdown
from attnproof.reports.counterexamples import lines
from attnproof.reports.record import CaseJudged, Counterexample, Event, RunFinished
from tests.reports.synthetic import HOSTILE, build_events


def found(events: list[Event], sentence: str = "The causal mask is strict.") -> Counterexample:
    """A counterexample made of the first failing case of a record."""
    failing = next(e for e in events if isinstance(e, CaseJudged) and e.failures)
    return Counterexample(
        kernel=failing.kernel,
        found=failing.case,
        case=failing.case,
        verdict=failing,
        sentences=(sentence,),
        script="import torch\nraise SystemExit(1)\n",
        tensors=("q: 1 of 4 entries is not 0: q[0] = 1.0", "scale: 1.0"),
        phase="opening",
        invariant="ones",
        cases=7,
        seconds=3.2,
        shrinking_seconds=0.5,
    )


def test_the_lines_hold_case_tensors_words_and_the_judges_reason() -> None:
    events = list(build_events(60))
    example = found(events)
    text = "\n".join(lines(example))
    for part in (
        f"FAIL  {example.case.id}",
        "invariant ones",
        *example.tensors,
        *example.sentences,
        example.verdict.failures[0].reason,
        "3.20 s (7 cases, phase opening)",
    ):
        assert part in text, part


def test_page_and_markdown_show_it_with_its_script_and_escape_what_it_holds(tmp_path: Path) -> None:
    events = list(build_events(60))
    example = found(events, HOSTILE)
    page = html.render([*events, example, RunFinished("FAIL", 1, 1.0)], tmp_path / "p.html").read_text()
    assert 'id="counterexamples"' in page
    assert "raise SystemExit(1)" in page
    assert HOSTILE not in page.partition('id="counterexamples"')[2].partition("</section>")[0]
    text = markdown.render([*events, example])
    assert "### Smallest failing inputs" in text
    assert "```python\nimport torch" in text
    assert (
        "counterexamples" not in html.render(events, tmp_path / "q.html").read_text().partition("<main>")[2]
    )
