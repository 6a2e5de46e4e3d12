"""Scripts run in a process of their own: 1 for a wrong kernel, 0 for a right one, 2 for an absent one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attnproof.healthy_prefix_scans import recurrent_rwkv4
from attnproof.properties.case import Case
from attnproof.properties.contract import Supports, contract_of
from attnproof.search.evidence import Evidence
from attnproof.search.scripts import script, values_in_words
from attnproof.search.shrinking import shrink
from attnproof.targets import Importable, describe
from attnproof.trials import Subject
from tests.verify.search.failing_kernels import RIGHT, CountingProbe, subject_of, written

SMALL = "softmax:float32:normal:B1,H2,G1,M5,N20,D4,E4:{}:{}:7"

# By name: what replaces what in the right kernel, options and view of the case, and what the script says.
BROKEN = {
    "causal": ("j <= i\n", "j < i\n", "causal", "contiguous", "is not within"),
    "strides": (
        "s = q.double() @ k.mT",
        "s = q.as_strided(q.shape, torch.empty(q.shape).stride()).double() @ k.mT",
        "-",
        "transposed",
        "is not within",
    ),
    "nonfinite": ("o = (p @ v)", "o = (p @ v / (n - 20))", "-", "contiguous", "= inf"),
    "empty": (
        "(p @ v)",
        "(p @ v + (~seen.any(-1))[:, None])",
        "causal",
        "contiguous",
        "is not within 0 of 0.0",
    ),
    "mutation": ("    h, g, m, n =", "    q *= 2\n    h, g, m, n =", "-", "contiguous", "changed the memory"),
    "aliasing": (
        "return (o, lse",
        "return q.copy_(o) if m == n else (o, lse",
        "-",
        "contiguous",
        "lies in the memory",
    ),
    "determinism": ("o = (p @ v)", "o = (p @ v + 1e-9 * torch.rand(()))", "-", "contiguous", "other bits"),
    "exception": ("    i, j =", "    assert n != 20\n    i, j =", "-", "contiguous", "raised"),
    "shape": (
        "return (o, lse",
        "return o[0] if n == 20 else (o, lse",
        "-",
        "contiguous",
        "asked: (1, 2, 5, 4)",
    ),
    "crash": ("    i, j =", "    import os\n    os._exit(7)\n    i, j =", "-", "contiguous", "status 7"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def run(source: str, folder: Path, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script with an environment that holds nothing but the kernels' folder."""
    file = folder / "script.py"
    file.write_text(source)
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(path or folder)}
    command = [sys.executable, "-W", "error", str(file)]
    return subprocess.run(command, env=clean, cwd="/", capture_output=True, text=True, check=False)


def failing(target: str, text: str, *, isolated: bool = False) -> tuple[CountingProbe, Evidence]:
    probe = CountingProbe(subject_of(target), isolated=isolated)
    judged = probe(Case.parse(text), repeat=True)
    probe.pool.close()
    assert judged.event.verdict == "FAIL", judged.event
    return probe, Evidence(judged)


@pytest.mark.parametrize("name", BROKEN)
def test_a_script_tells_the_wrong_kernel_from_the_right_one(name: str, folder: Path) -> None:
    old, new, options, view, words = BROKEN[name]
    assert RIGHT.count(old) == 1
    module = folder / f"broken_{name}.py"
    module.write_text(RIGHT.replace(old, new))
    text = SMALL.format(options, view)
    # More queries than keys leave the first rows of a causal mask empty; equal shapes let an output alias q.
    text = text.replace("M5", {"empty": "M24", "aliasing": "M20"}.get(name, "M5"))
    text = text.replace("H2", "H1") if name == "aliasing" else text
    probe, evidence = failing(f"broken_{name}:attention", text, isolated=name == "crash")
    source = script(evidence, probe.subject, ("It is wrong.", 'A "quoted" \\ sentence.'))
    wrong = run(source, folder)
    assert wrong.returncode == 1, wrong
    assert words in wrong.stdout + wrong.stderr
    assert "attnproof" not in source
    module.write_text(RIGHT)
    right = run(source, folder)
    assert right.returncode == 0, right
    assert right.stdout.endswith("right\n")


def test_a_minimal_script_states_its_inputs_as_plain_numbers(folder: Path) -> None:
    probe, evidence = failing(written(folder, "scale"), SMALL.format("-", "contiguous"))
    small = shrink(evidence, probe, deadline=time.monotonic() + 30.0, supports=Supports())
    source = script(small, probe.subject, ("The scores are 1.01 times what they should be.",))
    assert "v = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float32)" in source
    assert "b85decode" not in source
    assert len(source.splitlines()) < 150
    assert run(source, folder).returncode == 1


def test_earlier_calls_are_made_first(folder: Path) -> None:
    probe = CountingProbe(subject_of(written(folder, "memo", memo=True)), isolated=True)
    probe.pool.close()
    case, earlier = (Case.parse(SMALL.format("-", "contiguous").replace(":7", f":{s}")) for s in (1, 2))
    judged = probe(case, history=[earlier])
    assert judged.event.verdict == "FAIL"
    source = script(Evidence(judged, history=(earlier,)), probe.subject, ())
    assert run(source, folder).returncode == 1
    alone = script(Evidence(judged), probe.subject, ())
    assert run(alone, folder).returncode == 0


@pytest.mark.parametrize("rule", ["probable-row", "probable-output", "bias"])
def test_statistics_are_computed_again(rule: str, folder: Path) -> None:
    probe, evidence = failing(written(folder, "scale"), SMALL.format("-", "contiguous"))
    event = evidence.judged.event
    values = {name: getattr(event.failures[0], name) for name in event.failures[0].__struct_fields__}
    failure = type(event.failures[0])(**{**values, "rule": rule})
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    judged = dataclasses.replace(evidence.judged, event=type(event)(**{**fields, "failures": (failure,)}))
    source = script(Evidence(judged), probe.subject, ())
    source = source.replace("CHECKS = [wrong_elements, ", "CHECKS = [")
    assert "CHECKS = [wrong_statistics]" in source
    if rule != "bias":  # one wrong factor of the scores has no sign
        assert run(source, folder).returncode == 1
    (folder / "kernel_scale.py").write_text(RIGHT)
    assert run(source, folder).returncode == 0


def test_a_kernel_that_is_not_there_is_told_from_a_wrong_one(folder: Path, tmp_path: Path) -> None:
    probe, evidence = failing(written(folder, "causal"), SMALL.format("causal", "contiguous"))
    (tmp_path / "elsewhere").mkdir()
    absent = run(script(evidence, probe.subject, ()), tmp_path / "elsewhere", path=Path("/nonexistent"))
    assert absent.returncode == 2
    assert "PYTHONPATH" in absent.stdout


def test_a_target_may_come_from_a_module_getattr_and_be_called_in_layout_bnhd(folder: Path) -> None:
    written(folder, "causal")
    (folder / "lazy.py").write_text(
        "def __getattr__(name):\n"
        "    if name != 'Kernels':\n"
        "        raise AttributeError(name)\n"
        "    from kernel_causal import attention\n"
        "    class Kernels:\n"
        "        @staticmethod\n"
        "        def forward(q, k, v, *, scale, causal=False):\n"
        "            o = attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, causal=causal)\n"
        "            return o.transpose(1, 2)\n"
        "    return Kernels\n"
    )
    plain = subject_of("lazy:Kernels.forward", ("causal",))
    contract = dataclasses.replace(plain.contract, layout="bnhd")
    probe = CountingProbe(Subject(plain.name, plain.source, contract, "cpu"))
    evidence = Evidence(probe(Case.parse(SMALL.format("causal", "contiguous"))))
    source = script(evidence, probe.subject, ())
    assert run(source, folder).returncode == 1
    (folder / "kernel_causal.py").write_text(RIGHT)
    assert run(source, folder).returncode == 0


def test_a_function_without_a_name_travels_in_the_script(folder: Path) -> None:
    def zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
        return torch.zeros(*q.shape[:-1], v.shape[-1])

    plain = subject_of("unused:unused", ())
    probe = CountingProbe(Subject("zeros", describe(zeros), plain.contract, "cpu"))
    evidence = Evidence(probe(Case.parse(SMALL.format("-", "contiguous"))))
    result = run(script(evidence, probe.subject, ()), folder, path=Path(os.environ.get("PYTHONPATH", "")))
    assert result.returncode == 1, result
    assert "is not within" in result.stdout


def test_an_emulated_kernel_takes_a_gpu_or_the_emulator(folder: Path) -> None:
    probe, evidence = failing(written(folder, "causal"), SMALL.format("causal", "contiguous"))
    source = script(evidence, dataclasses.replace(probe.subject, device="emulator:sm_90"), ())
    assert "torch.cuda.is_available()" in source
    assert "emulate('sm_90')" in source
    result = run(source, folder)
    assert result.returncode == 1, result


HANDED = """
from attnproof.healthy_prefix_scans import recurrent_rwkv4

def rwkv4(*tensors, initial_state, **options):
    a, b, p = initial_state
    return recurrent_rwkv4(*tensors, initial_state=(a, 1.25 * b, p), **options)
"""


def test_a_state_of_several_parts_and_its_gradients_are_in_the_script(folder: Path) -> None:
    (folder / "handed.py").write_text(HANDED)
    contract = contract_of(recurrent_rwkv4)
    assert contract is not None
    probe = CountingProbe(Subject("rwkv4", Importable("handed:rwkv4"), contract, "cpu", gradients=True))
    text = "rwkv4:float32:normal:B1,H2,N5:initial_state,return_state,cotangents=normal:contiguous:3"
    evidence = Evidence(probe(Case.parse(text)))
    source = script(evidence, probe.subject, ())
    assert "'dinitial_b'" in source
    wrong = run(source, folder)
    assert (wrong.returncode, "b[0, 0]" in wrong.stdout) == (1, True), wrong
    (folder / "handed.py").write_text(HANDED.replace("1.25 * b", "b"))
    assert run(source, folder).returncode == 0


def test_values_are_told_in_words(folder: Path) -> None:
    probe, evidence = failing(written(folder, "causal"), SMALL.format("causal", "contiguous"))
    assert values_in_words(evidence) == ()
    small = shrink(evidence, probe, deadline=time.monotonic() + 30.0, supports=Supports())
    assert values_in_words(small) == (
        "q: all 1 entries are 0",
        "k: all 1 entries are 0",
        "v: 1 of 1 entries is not 0: v[0, 0, 0, 0] = 1.0",
        "scale: 1.0",
    )
