"""Every mutant through a default search, and through the rules of other projects.

    python -m tests.quality.detection.run [NAME …] [--judges ours|peers|both] [--sample N] [--write]

Each mutant and each correct implementation is searched with the very same arguments as the kernel that it
derives from: a search of a differentiable kernel judges its gradients without being asked. Results are kept
in a record as they come, so that an interrupted run goes on where it stopped; ``--write`` makes the finding
that reports show (``verify/data/detection.json``) of it. The peers re-express forward tests of softmax
attention, and are put to the mutants of that alone. They take several times as long: ``--sample`` lets them
judge the first N of an order drawn by a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from attnproof import calibration
from attnproof.interface import fuzz
from attnproof.properties.contract import contract_of
from attnproof.search.engine import DEFAULT_SECONDS
from attnproof.suite import default_device
from attnproof.targets import resolve
from tests.quality.detection.table import OURS, Verdict, finding, kill_table
from tests.quality.mutants.mutant import Mutant, MutantError, all_mutants
from tests.quality.peers.run import judge_all

__all__ = ["correct_implementations", "main", "searched"]

_DATA = Path(__file__).parents[3] / "verify" / "data" / "detection.json"
_PEER_SECONDS = 60.0
_PEERS_FAMILY = "softmax"
_ORDER_SEED = 20261122


def device_of(target: str) -> str:
    """Plain torch runs as it is, which is quickest; Triton kernels on the GPU or in the emulator."""
    return "cpu" if target.startswith("attnproof.healthy") and "triton" not in target else default_device()


def correct_implementations(families: Collection[str]) -> tuple[str, ...]:
    """Targets of the calibration's correct implementations of these families."""
    return tuple(t for t in calibration.IMPLEMENTATIONS if _family(t) in families)


def _family(target: str) -> str:
    contract = contract_of(resolve(target))
    assert contract is not None, f"{target} declares no contract"
    return contract.family


def searched(kernel: str, target: str, base: str, shows: Sequence[str], seconds: float) -> Verdict:
    """A default search of ``target`` under the contract of ``base``, without shrinking: nobody reads it."""
    contract = contract_of(resolve(base))
    assert contract is not None
    found = fuzz(
        target, contract.family, contract=contract, device=device_of(base), seconds=seconds, minimise=False
    )
    if found.verdict == "UNVERIFIED":
        return Verdict(kernel, OURS, False, False, found.seconds, len(found.results), found.reason)
    if found.counterexample is None:
        return Verdict(kernel, OURS, False, False, found.seconds, len(found.results), "nothing failed")
    failures = found.counterexample.verdict.failures
    fits = not shows or any(failure.rule in shows for failure in failures)
    reason = "; ".join(f"{failure.rule}: {failure.reason}" for failure in failures[:2])
    return Verdict(
        kernel, OURS, True, fits, found.counterexample.seconds, found.counterexample.cases, reason[:600]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the kill table; exit code 1 if a mutant lives or a correct implementation is accused."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality.detection.run", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants; all, and the correct implementations, if none")
    parser.add_argument("--judges", choices=("ours", "peers", "both"), default="ours")
    parser.add_argument("--sample", type=int, default=10**6, help="mutants that the peers judge")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of one search")
    parser.add_argument("--record", type=Path, default=Path("reports/out/mutants.jsonl"))
    parser.add_argument("--write", action="store_true", help="write verify/data/detection.json")
    chosen = parser.parse_args(arguments)
    mutants = [m for m in all_mutants() if not chosen.names or m.name in chosen.names]
    if unknown := set(chosen.names) - {m.name for m in mutants}:
        raise MutantError(f"no mutant is called {min(unknown)!r}")
    bases = tuple(dict.fromkeys(m.base for m in mutants))
    others = () if chosen.names else correct_implementations({m.family for m in mutants})
    correct = tuple(dict.fromkeys((*bases, *others)))
    verdicts = _Record(chosen.record)
    if chosen.judges != "peers":
        _ask_ours(verdicts, correct, mutants, chosen.seconds)
    if chosen.judges != "ours":
        forward = [m for m in mutants if m.family == _PEERS_FAMILY and not m.backward]
        known = [target for target in correct if _family(target) == _PEERS_FAMILY]
        _ask_peers(verdicts, known, _shuffled(forward)[: chosen.sample])
    wanted = {*correct, *(m.name for m in mutants)}
    found = [v for v in verdicts.all if v.kernel in wanted]
    print(kill_table(mutants, found))
    told = finding(mutants, found)
    _tell_survivors(mutants, found)
    print(f"{told.verdict}: {told.evidence}")
    if chosen.write:
        _DATA.write_bytes(msgspec.json.format(msgspec.json.encode(told)) + b"\n")
    ours = [v for v in found if v.judge == OURS]
    return 0 if all((v.rejected and v.fits) != (v.kernel in correct) for v in ours) else 1


def _ask_ours(verdicts: _Record, correct: Sequence[str], mutants: Sequence[Mutant], seconds: float) -> None:
    for target in correct:
        if not verdicts.has(target, OURS):
            verdicts.add(searched(target, target, target, (), seconds))
    for mutant in mutants:
        if not verdicts.has(mutant.name, OURS):
            verdicts.add(searched(mutant.name, mutant.target, mutant.base, mutant.shows, seconds))


def _ask_peers(verdicts: _Record, correct: Sequence[str], mutants: Sequence[Mutant]) -> None:
    targets = {**{target: target for target in correct}, **{m.name: m.target for m in mutants}}
    for kernel, target in targets.items():
        if any(v.kernel == kernel and v.judge != OURS for v in verdicts.all):
            continue
        for peer, said in judge_all(target, _PEER_SECONDS).items():
            reason = said.reason[:300]
            verdicts.add(Verdict(kernel, peer, not said.accepted, True, said.seconds, said.calls, reason))


def _shuffled(mutants: Sequence[Mutant]) -> list[Mutant]:
    """An order drawn by a recorded seed, so that the first ones are a fair sample."""
    return sorted(mutants, key=lambda m: hashlib.blake2b(f"{_ORDER_SEED} {m.name}".encode()).digest())


def _tell_survivors(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> None:
    known = {mutant.name: mutant for mutant in mutants}
    for v in verdicts:
        if v.judge == OURS and v.kernel in known and not (v.rejected and v.fits):
            print(f"LIVES {v.kernel} ({known[v.kernel].mechanism}): {known[v.kernel].story} | {v.reason}")
        if v.judge == OURS and v.kernel not in known and v.rejected:
            print(f"ACCUSED {v.kernel}: {v.reason}")


class _Record:
    """The verdicts so far, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines() if path.is_file() else []
        self.all = [msgspec.json.decode(line, type=Verdict) for line in lines]

    def has(self, kernel: str, judge: str) -> bool:
        """Whether this verdict is known."""
        return any(v.kernel == kernel and v.judge == judge for v in self.all)

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict, and tell it."""
        self.all.append(verdict)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(verdict) + b"\n")
        word = "rejects" if verdict.rejected else "accepts"
        print(
            f"{verdict.judge} {word} {verdict.kernel} in {verdict.seconds:.1f} s: {verdict.reason[:150]}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
