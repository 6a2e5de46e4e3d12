"""Every peer on one kernel, in processes of their own.

A kernel that deceives patches torch in the process that calls it, as it would in a peer's own test run; no
other process may suffer. So a fresh process imports torch, Triton and the peers, but not the kernel, and
forks a child for each peer; the child imports the kernel, judges it and sends the verdict back. A child that
dies or does not answer in time counts as a rejection, with that as its reason.

    python -m tests.quality.peers.run TARGET…
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tests.quality.peers.peer import Peer, PeerVerdict

__all__ = ["judge_all", "main", "peers"]

ROOT = Path(__file__).resolve().parents[3]
DTYPES = ("float32", "float16", "bfloat16")
START_LIMIT = 120.0


def peers() -> tuple[Peer, ...]:
    """All peers, in the order of the table."""
    from tests.quality.peers import PEERS

    return PEERS


def judge_all(target: str, timeout: float, only: Collection[str] = ()) -> dict[str, PeerVerdict]:
    """Ask every peer about one kernel, in a fresh process.

    Args:
        target: ``package.module:attribute`` of a softmax kernel; what it lists in the options of its contract
            is passed to it, and where it has no contract, nothing is.
        timeout: seconds that one peer may take.
        only: names of the peers to ask; all, where there are none.

    Raises:
        ValueError: ``only`` names a peer that does not exist.
        RuntimeError: the kernel cannot be imported or is not of the softmax family, or the process that is to
            judge broke off; with what it wrote to stderr.
    """
    asked = chosen(only)
    names = [peer.name for peer in asked]
    command = [sys.executable, "-m", "tests.quality.peers.run", "--serve", target, str(timeout), *names]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    limit = START_LIMIT + timeout * len(asked)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    verdicts = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            name = entry.pop("peer")
            verdicts[name] = PeerVerdict(**entry)
    missing = [name for name in names if name not in verdicts]
    if missing:
        raise RuntimeError(
            f"{target}: the judging process ended with {done.returncode} before {', '.join(missing)} "
            f"answered: {done.stderr[-2000:]}"
        )
    return verdicts


def chosen(only: Collection[str]) -> tuple[Peer, ...]:
    """The peers of these names, all where there are none, in the order of the table."""
    known = [peer.name for peer in peers()]
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise ValueError(f"only={unknown}: no such peers; there are {', '.join(known)}")
    return tuple(peer for peer in peers() if not only or peer.name in only)


def serve(target: str, timeout: float, only: Collection[str]) -> None:
    """In the fresh process: fork a child for each peer, write a line of JSON for each verdict."""
    out = os.fdopen(os.dup(1), "w")  # the kernel may print
    os.dup2(2, 1)
    warm_up()
    for peer in chosen(only):
        verdict = in_child(peer, target, timeout)
        out.write(json.dumps({"peer": peer.name, **asdict(verdict)}) + "\n")
        out.flush()


def warm_up() -> None:
    """Import and start once what every child needs, with a kernel that no peer judges."""
    import torch

    import attnproof.kernels.softmax
    import attnproof.targets  # noqa: F401
    from attnproof.emulator import emulate
    from attnproof.kernels.softmax_rows import softmax_rows

    torch.set_num_threads(1)
    with emulate("sm_90"):
        torch.testing.assert_close(softmax_rows(torch.zeros(2, 4)), torch.full((2, 4), 0.25))


def in_child(peer: Peer, target: str, timeout: float) -> PeerVerdict:
    """The verdict of one peer from a forked child, which is killed after ``timeout`` seconds."""
    started = time.perf_counter()
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        run_child(peer, target, sender)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        text = read_until(pipe, started + timeout)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    if text is None:
        return PeerVerdict(False, seconds, f"no answer in {timeout:g} s", 0)
    try:
        answer = json.loads(text)
        unjudged = answer.pop("unjudged", "")
        verdict = PeerVerdict(**answer)
    except (ValueError, TypeError, AttributeError):
        code = os.waitstatus_to_exitcode(status)
        return PeerVerdict(False, seconds, f"the process died without an answer (exit code {code})", 0)
    if unjudged:
        raise RuntimeError(unjudged)
    return verdict


def read_until(pipe: IO[bytes], deadline: float) -> str | None:
    """All that a pipe gives before it is closed, or None at the deadline (of time.perf_counter)."""
    chunks: list[bytes] = []
    while True:
        left = deadline - time.perf_counter()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return None
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            return b"".join(chunks).decode(errors="replace")
        chunks.append(chunk)


def run_child(peer: Peer, target: str, sender: int) -> None:
    """In the forked child: import the kernel, judge it, send the verdict, leave without any clean-up."""
    code = 1
    try:
        os.setsid()
        with os.fdopen(sender, "w") as pipe:
            pipe.write(json.dumps(answer_of(peer, target)))
        code = 0
    finally:
        os._exit(code)


def answer_of(peer: Peer, target: str) -> dict[str, Any]:
    """Fields of the verdict; "unjudged" says why there is none, where the kernel cannot be had."""
    started = time.perf_counter()
    try:
        kernel, options = imported(target)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"unjudged": text, **asdict(PeerVerdict(False, 0.0, text, 0))}
    try:
        verdict = peer.judge(kernel, options, DTYPES)
    except BaseException as error:  # the kernel may raise SystemExit, or break what the peer is made of
        reason = f"{type(error).__name__}: {error}"
        verdict = PeerVerdict(False, time.perf_counter() - started, reason, 0)
    return asdict(verdict)


def imported(target: str) -> tuple[Callable[..., Any], frozenset[str]]:
    """A kernel in layout bhnd, and the keywords that it takes.

    Raises:
        TargetError: it cannot be imported.
        ValueError: its contract is not of the softmax family.
    """
    from attnproof.properties.contract import contract_of
    from attnproof.targets import resolve

    kernel = resolve(target)
    contract = contract_of(kernel)
    if contract is None:
        return kernel, frozenset()
    if contract.family != "softmax":
        raise ValueError(f"{target}: peers judge softmax attention, this kernel promises {contract.family}")
    options = frozenset(contract.options)
    return (transposed(kernel) if contract.layout == "bnhd" else kernel), options


def transposed(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of layout bnhd, called in bhnd."""

    def call(*tensors: Any, **options: Any) -> Any:
        result = kernel(*(x.transpose(1, 2).contiguous() for x in tensors), **options)
        if isinstance(result, tuple):
            return result[0].transpose(1, 2), result[1].transpose(1, 2)
        return result.transpose(1, 2)

    return call


def main(arguments: list[str]) -> None:
    """Print a table of verdicts, one block a target."""
    if arguments[:1] == ["--serve"]:
        serve(arguments[1], float(arguments[2]), arguments[3:])
        return
    for target in arguments:
        started = time.perf_counter()
        verdicts = judge_all(target, 60.0)
        accepted = sum(verdict.accepted for verdict in verdicts.values())
        print(f"{target}: accepted by {accepted} of {len(verdicts)}, {time.perf_counter() - started:.1f} s")
        for name, verdict in verdicts.items():
            word = "accepts" if verdict.accepted else "REJECTS"
            print(f"  {name:24} {word} {verdict.calls:4} calls {verdict.seconds:6.2f} s  {verdict.reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
