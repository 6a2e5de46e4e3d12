"""What kernels become on real targets, compiled without a GPU by the assemblers inside Triton's wheel.

A callable is run under a driver that compiles every launch completely and executes none; what the binary
needs is read at the end of the last compilation stage and kept in Triton's own cache beside it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import triton

from attnproof.emulator.driver import LOCK, EmulatorDriver, active_driver
from attnproof.emulator.errors import EmulationError
from attnproof.emulator.machine import Settings
from attnproof.emulator.surroundings import poisoned_empties, pretended_device
from attnproof.emulator.targets import TARGETS, target_named

# Bumped when `_measure` reads more or otherwise: results cached by an older version are then recompiled.
_MEASURE_VERSION = "attnproof-resources-1"

# Mnemonics worth counting, by the name under which they are reported.
_NVIDIA = {
    "HMMA": r"\bHMMA\.",
    "IMMA": r"\bIMMA\.",
    "QMMA": r"\bQMMA\.",
    "DMMA": r"\bDMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "QGMMA": r"\bQGMMA\.",
    "IGMMA": r"\bIGMMA\.",
    "UTCHMMA": r"\bUTCHMMA",
    "UTCQMMA": r"\bUTCQMMA",
    "FFMA": r"\bFFMA2?\b",
    "MUFU.EX2": r"\bMUFU\.EX2",
    "MUFU.RCP": r"\bMUFU\.RCP",
    "MUFU.TANH": r"\bMUFU\.TANH",
    "LDG": r"\bLDG\.",
    "STG": r"\bSTG\.",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "LDGSTS": r"\bLDGSTS\.",
    "UTMALDG": r"\bUTMALDG",
}
_AMD = {
    "mfma": r"\bv_mfma_",
    "v_exp": r"\bv_exp_f32",
    "v_rcp": r"\bv_rcp_f32",
    "buffer_load": r"\bbuffer_load_",
    "global_load": r"\bglobal_load_",
    "buffer_store": r"\bbuffer_store_",
    "global_store": r"\bglobal_store_",
    "scratch_load": r"\bscratch_load_",
    "scratch_store": r"\bscratch_store_",
}
MATRIX_INSTRUCTIONS = frozenset(
    {"HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "mfma"}
)


@dataclass(frozen=True)
class CompiledKernel:
    """What one specialisation of a kernel needs on one target.

    `registers` are per thread (vector registers on gfx942); `spill_bytes` is the stack and local memory of a
    thread (scratch on gfx942), zero for a kernel without spills; `shared_bytes` per program; `instructions`
    counts mnemonics in the binary, each loop body once.
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    stages: int
    instructions: Mapping[str, int]
    binary_bytes: int
    launches: int = 1

    @property
    def matrix_instructions(self) -> int:
        """Matrix instructions of all kinds."""
        return sum(count for name, count in self.instructions.items() if name in MATRIX_INSTRUCTIONS)


def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise EmulationError(
            f"the Triton wheel has no {name} ({path}): "
            f"install the official wheel of triton {triton.__version__}"
        )
    return str(path)


def _count(text: str, mnemonics: Mapping[str, str]) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, text)) for name, pattern in mnemonics.items()}
    return {name: count for name, count in counts.items() if count}


def _measure_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        code = subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    figures = {
        key: max(map(int, re.findall(rf"\b{key}:(\d+)", usage)), default=0)
        for key in ("REG", "STACK", "LOCAL")
    }
    return {
        "registers": figures["REG"],
        "spill_bytes": figures["STACK"] + figures["LOCAL"],
        "instructions": _count(code, _NVIDIA),
        "binary_bytes": len(cubin),
    }


def _amd_metadata(hsaco: bytes) -> dict[str, Any]:
    """The NT_AMDGPU_METADATA note (LLVM, AMDGPUUsage): two sizes, a type, "AMDGPU", msgpack."""
    at = hsaco.find(b"AMDGPU\0\0")
    if at < 12:
        raise EmulationError("the hsaco holds no AMDGPU metadata note")
    size = int.from_bytes(hsaco[at - 8 : at - 4], "little")
    note: dict[str, Any] = msgspec.msgpack.decode(hsaco[at + 8 : at + 8 + size])
    kernel: dict[str, Any] = note["amdhsa.kernels"][0]
    return kernel


def _measure_hsaco(hsaco: bytes, assembly: str) -> dict[str, Any]:
    kernel = _amd_metadata(hsaco)
    return {
        "registers": int(kernel[".vgpr_count"]),
        "spill_bytes": int(kernel[".private_segment_fixed_size"]),
        "instructions": _count(assembly, _AMD),
        "binary_bytes": len(hsaco),
    }


def _measure(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, _: Any = None
) -> Any:
    """A hook into Triton's stages that leaves the binary's figures in the kernel's metadata."""
    if backend is None:
        return _MEASURE_VERSION, _MEASURE_VERSION
    binary = backend.binary_ext
    assemble = stages[binary]

    def assemble_and_measure(source: Any, metadata: dict[str, Any]) -> Any:
        result = assemble(source, metadata)
        metadata["attnproof_resources"] = (
            _measure_cubin(result) if binary == "cubin" else _measure_hsaco(result, str(source))
        )
        return result

    stages[binary] = assemble_and_measure
    return None


class _RecordingLauncher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata

    def __call__(self, *_: Any) -> None:
        driver = triton.runtime.driver.active
        assert isinstance(driver, RecordingDriver)
        driver.note(self.metadata)


class _RecordingUtils:
    def __init__(self, properties: Mapping[str, int]) -> None:
        self.properties = properties

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(self.properties)

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, self.properties["max_threads_per_block"]


class RecordingDriver(EmulatorDriver):
    """Compiles every launch to the target's binary, executes none, and remembers which there were."""

    launcher_cls = _RecordingLauncher  # type: ignore[assignment]

    def __init__(self, target: str) -> None:
        super().__init__(Settings(target))
        # Kernels of the emulator have no binary: keep the two apart in JITFunction's cache.
        self.target = replace(self.target, device=self.target.device + 500)
        self.utils = _RecordingUtils(self.target.properties)  # type: ignore[assignment]
        self.reports: dict[str, CompiledKernel] = {}

    def note(self, metadata: Any) -> None:
        """Count one launch of the kernel with this metadata."""
        if metadata.hash in self.reports:
            report = self.reports[metadata.hash]
            self.reports[metadata.hash] = replace(report, launches=report.launches + 1)
            return
        self.reports[metadata.hash] = CompiledKernel(
            kernel=metadata.name,
            target=self.target.name,
            shared_bytes=metadata.shared,
            warps=metadata.num_warps,
            stages=metadata.num_stages,
            **metadata.attnproof_resources,
        )


@contextmanager
def record(target: str) -> Iterator[RecordingDriver]:
    """Inside, launches are compiled for the target, noted in the driver's `reports`, and not executed."""
    driver = RecordingDriver(target)
    with LOCK, active_driver(driver, _measure), pretended_device(driver.target), poisoned_empties():
        yield driver


def compile_launches(
    call: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    targets: Sequence[str] = tuple(TARGETS),
) -> list[CompiledKernel]:
    """Compile every Triton kernel that `call(*args, **kwargs)` launches, for each target, to its binary.

    Args:
        call: a Python function that launches kernels on CPU tensors. It runs once per target; the kernels
        themselves do
            not execute, so that it sees NaN wherever they would have written.
        targets: any of "sm_80", "sm_90", "sm_100", "gfx942".

    Returns one entry per kernel specialisation and target, in order of first launch, with the number of
    launches.

    Raises ValueError for an unknown target, EmulationError where nothing is launched, and Triton's own errors
    (`OutOfResources`, `CompilationError`) where a kernel cannot be compiled.
    """
    for target in targets:
        target_named(target)
    reports: list[CompiledKernel] = []
    for target in targets:
        with record(target) as driver:
            call(*args, **(kwargs or {}))
        if not driver.reports:
            raise EmulationError(
                f"{getattr(call, '__qualname__', call)!s} launched no Triton kernel: nothing to compile. "
                "Does it fall back to torch for CPU tensors?"
            )
        reports += driver.reports.values()
    return reports
