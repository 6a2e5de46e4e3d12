"""The README's quick start, run as it stands there: what it shows is what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from attnproof.ledger import read_lock

README = (Path(__file__).parents[1] / "README.md").read_text()
START = README.partition("## Quick start")[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    """The fenced blocks of the quick start in ``language``."""
    return re.findall(rf"```{language}\n(.*?)```", START, re.DOTALL)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the quick start, with this environment's programs first."""
    program, *arguments = shlex.split(command)
    assert program == "attnproof"
    started = [sys.executable, "-c", "from attnproof.cli import main; main()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        started, cwd=folder, env=environment, capture_output=True, text=True, timeout=300.0, check=False
    )


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    (text,) = blocks("python")
    path = tmp_path / "mysoftmax.py"
    path.write_text(text)
    return path


def test_the_quick_start_has_ten_lines() -> None:
    (text,) = blocks("python")
    assert len(text.splitlines()) <= 10


def test_the_first_command_finds_the_row_that_the_quick_start_tells_of(kernel: Path) -> None:
    first, _ = (line for block in blocks("sh") for line in block.splitlines())
    done = run(first, kernel.parent)
    assert done.returncode == 1, done.stdout + done.stderr
    (told,) = blocks("text")
    for line in told.splitlines()[:2]:
        assert line.strip() in done.stdout
    again = subprocess.run(
        [sys.executable, "attnproof-failure.py"], cwd=kernel.parent, capture_output=True, check=False
    )
    assert again.returncode == 1, "the script shows the failure"


def test_the_mended_kernel_passes_the_second_command(kernel: Path) -> None:
    (mended,) = blocks("diff")
    text = kernel.read_text()
    for old, new in zip(
        re.findall(r"^-(.*)$", mended, re.MULTILINE),
        re.findall(r"^\+(.*)$", mended, re.MULTILINE),
        strict=True,
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    kernel.write_text(text)
    _, second = (line for block in blocks("sh") for line in block.splitlines())
    done = run(second, kernel.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASS")


def test_the_figures_of_the_ledger_are_the_recorded_ones() -> None:
    text = README.partition("## The theory ledger")[2].partition("\n## ")[0]
    counts = Counter(read_lock().values())
    told = {name: int(re.findall(rf"(\d+)\s+(?:are\s+)?{name[:4]}", text)[0]) for name in counts}
    assert told == dict(counts)
    assert f"{sum(counts.values())} claims" in text
