"""The command line as a stranger uses it: exit codes, messages, files, interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from attnproof.cli import main
from attnproof.properties.invariants import INVARIANTS
from attnproof.reports.record import CaseJudged, Counterexample, RunFinished, RunStarted, read_record

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-c", "from attnproof.cli import main; main()"]
KERNEL = ["--family", "softmax", "--device", "cpu", "--declare", "unseen_nonfinite=may-leak", "--no-progress"]
KERNEL += ["--jobs", "1"]
CASES_ONLY = ["--declare", "without=" + ",".join(INVARIANTS)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def run(*arguments: str, cwd: Path, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_a_correct_kernel_passes_and_leaves_every_file(tmp_path: Path) -> None:
    files = (
        "--json",
        "out/run.jsonl",
        "--html",
        "out/page.html",
        "--junit",
        "out/j.xml",
        "--sarif",
        "out/s.sarif",
    )
    done = run("verify", "user_kernels:attention", *KERNEL, "--examples", "30", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    events = list(read_record(tmp_path / "out/run.jsonl"))
    assert isinstance(events[0], RunStarted)
    assert events[-1] == RunFinished("PASS", 0, events[-1].seconds)  # type: ignore[union-attr]
    judged = [event for event in events if isinstance(event, CaseJudged)]
    assert sum(not event.invariant for event in judged) == 30
    assert {event.invariant for event in judged} >= {"key-permutation", "ones", "determinism"}
    assert (tmp_path / "out/page.html").stat().st_size > 100_000
    assert (tmp_path / "out/s.sarif").is_file()
    assert ElementTree.parse(tmp_path / "out/j.xml").getroot().tag in ("testsuites", "testsuite")
    again = run("report", "out/run.jsonl", cwd=tmp_path)
    assert again.returncode == 0
    assert "user_kernels:attention" in again.stdout


def test_the_mean_of_v_fails(tmp_path: Path) -> None:
    done = run(
        "verify", "user_kernels:mean_of_values", *KERNEL, *CASES_ONLY, "--examples", "12", cwd=tmp_path
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "reports/out/index.html").is_file()


@pytest.mark.parametrize(
    ("target", "rule", "more"),
    [("crashes_sometimes", "crash", ()), ("hangs_sometimes", "timeout", ("--timeout", "3"))],
)
def test_a_kernel_that_dies_gets_a_verdict_and_the_run_goes_on(
    target: str, rule: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ("--examples", "14", "--dtypes", "float32", "--json", "r.jsonl", *CASES_ONLY, *more)
    done = run("verify", f"user_kernels:{target}", *KERNEL, *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    cases = [event for event in read_record(tmp_path / "r.jsonl") if isinstance(event, CaseJudged)]
    assert len(cases) == 14
    broken = [case for case in cases if any(failure.rule == rule for failure in case.failures)]
    assert broken
    assert all(case.case.shape["N"] > 64 for case in broken)
    assert any(case.verdict == "PASS" for case in cases)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--family", "sofmax"), ("sofmax", "softmax")),
        (("user_kernels:attention",), ("--family",)),
        (("user_kernels:atention", *KERNEL), ("atention", "attention")),
        (("no_such_module:f", *KERNEL), ("no_such_module",)),
        (("user_kernels:wrong_shape", *KERNEL), ("shape (1, 16, 64)", "(1, 1, 16, 64)")),
        (("user_kernels:no_tensor", *KERNEL), ("str", "one tensor, o")),
        (("user_kernels:attention", *KERNEL, "--dtypes", "float31"), ("float31", "float32")),
        (("user_kernels:attention", *KERNEL, "--options", "causl"), ("causl", "causal")),
        (("user_kernels:attention", *KERNEL, "--declare", "layout=bhdn"), ("bhdn", "bhnd, bnhd")),
        (("user_kernels:attention", *KERNEL, "--declare", "shape"), ("shape", "KEY=VALUE")),
        (("user_kernels:attention", *KERNEL, "--precision", "matmul_input=int8"), ("int8", "tf32")),
        (("--declare", "layout=bnhd"), ("TARGETS",)),
    ],
)
def test_bad_arguments_are_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(sys, "argv", ["attnproof", "verify", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("attnproof: ")
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("*.jsonl")), "nothing may be half-written"


def test_a_missing_record_is_a_usage_error(tmp_path: Path) -> None:
    done = run("report", "nowhere.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "attnproof: record nowhere.jsonl: no such file\n")


def test_an_interrupted_run_keeps_its_record_readable(tmp_path: Path) -> None:
    arguments = [
        "verify",
        "user_kernels:slow",
        *KERNEL,
        *CASES_ONLY,
        "--examples",
        "100",
        "--json",
        "r.jsonl",
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, env=environment(), start_new_session=True
    )
    record = tmp_path / "r.jsonl"
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline and (
        not record.exists() or record.read_bytes().count(b"case-judged") < 3
    ):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60.0) == 130
    events = list(read_record(record))
    assert sum(isinstance(event, CaseJudged) for event in events) >= 3
    assert not isinstance(events[-1], RunFinished)
    assert run("report", "r.jsonl", "--html", "page.html", cwd=tmp_path).returncode == 0


FUZZ = ["--family", "softmax", "--device", "cpu", "--time", "40"]


def test_fuzz_finds_words_and_a_script_for_a_wrong_kernel(tmp_path: Path) -> None:
    declared = ["--declare", "unseen_nonfinite=may-leak", "nonempty=true", "--precision", "matmul_input=ieee"]
    files = ["--json", "r.jsonl", "--html", "page.html", "--script", "shows.py"]
    done = run("fuzz", "user_kernels:mean_of_values", *FUZZ, *declared, *files, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("FAIL  softmax:")
    assert "mean" in done.stdout
    events = list(read_record(tmp_path / "r.jsonl"))
    (found,) = (event for event in events if isinstance(event, Counterexample))
    assert "Smallest failing inputs" in (tmp_path / "page.html").read_text()
    assert found.case.id in (tmp_path / "page.html").read_text()
    shown = subprocess.run(
        [sys.executable, "shows.py"], cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert shown.returncode == 1, shown.stderr
    assert list((tmp_path / ".hypothesis/examples").rglob("*")), "the failure is remembered"
    again = run("fuzz", "user_kernels:mean_of_values", *FUZZ, *declared, cwd=tmp_path)
    assert "phase replay" in again.stdout


def test_fuzz_passes_a_right_kernel_in_layout_bnhd(tmp_path: Path) -> None:
    (tmp_path / "swapped.py").write_text(
        "from user_kernels import attention as right\n\n"
        "def __getattr__(name):\n"
        "    if name != 'attention':\n"
        "        raise AttributeError(name)\n"
        "    return lambda q, k, v, *, scale: right(\n"
        "        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale\n"
        "    ).transpose(1, 2)\n"
    )
    arguments = ("--layout", "bnhd", "--declare", "unseen_nonfinite=may-leak", "--examples", "90")
    done = run("fuzz", "swapped:attention", *FUZZ[:4], *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASS in ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("user_kernels:attention", *FUZZ, "--gradients", "--declare", "differentiable=false"),
            ("--gradients", "differentiable=false"),
        ),
        (("user_kernels:attention", *FUZZ, "--declare", "without=oneses"), ("oneses", "ones")),
        (("user_kernels:attention", *FUZZ, "--layout", "bhdn"), ("bhdn", "bhnd, bnhd")),
        (("user_kernels:atention", *FUZZ), ("atention", "attention")),
    ],
)
def test_fuzz_refuses_arguments_in_one_line(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(sys, "argv", ["attnproof", "fuzz", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
