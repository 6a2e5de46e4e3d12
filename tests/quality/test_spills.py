"""The scan for spilled registers: what it compiles, and that it says so where something is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from attnproof.emulator import CompiledKernel
from tests.quality import spills

HEALTHY = CompiledKernel("walk_kernel", "sm_80", 96, 0, 1024, 4, 1, {}, 5000)
SMALL = ["rwkv6", "--targets", "sm_80", "--widths", "16", "--dtypes", "float16"]


def compiling(monkeypatch: pytest.MonkeyPatch, *kernels: CompiledKernel) -> None:
    monkeypatch.setattr(spills, "compile_launches", lambda *_: list(kernels))


def test_a_family_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled for real, forward and backward."""
    assert spills.main(SMALL) == 0
    header, *rows, verdict = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "sm_80"
    assert [row.split()[:4] for row in rows] == [
        ["rwkv6", form, "float16", "16"] for form in ("attention", "recurrent")
    ]
    assert all(16 < int(row.split()[4]) <= 255 for row in rows)
    assert verdict.startswith("0 of 2")


def test_a_spill_is_named_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiling(monkeypatch, HEALTHY, dataclasses.replace(HEALTHY, kernel="gradient_kernel", spill_bytes=8))
    assert spills.main(SMALL) == 1
    out = capsys.readouterr().out
    assert "sm_80: gradient_kernel spills 8 bytes" in out
    assert "walk_kernel" not in out
    assert "2 of 2" in out


def test_a_kernel_that_is_not_compiled_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> list[CompiledKernel]:
        raise RuntimeError("out of shared memory\nat line 1")

    monkeypatch.setattr(spills, "compile_launches", fail)
    assert spills.main(SMALL) == 1
    assert "sm_80: RuntimeError: out of shared memory\n" in capsys.readouterr().out


def test_every_form_is_asked_for_every_target_dtype_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, HEALTHY)
    results = [
        x for row in spills.scan(list(spills.FAMILIES), spills.TARGETS, (16, 128), ["float16"]) for x in row
    ]
    assert {x.target for x in results} == set(spills.TARGETS)
    forms = {(x.family, x.form) for x in results if x.width == 128}
    assert {family for family, _ in forms} == set(spills.FAMILIES)
    assert forms < {(x.family, x.form) for x in results if x.width == 16}
    assert len(forms) == sum(form.max_width == 128 for make in spills.FAMILIES.values() for form in make())


def test_a_family_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        spills.main(["softmax"])
    assert "choose from linear, gated_linear" in capsys.readouterr().err
