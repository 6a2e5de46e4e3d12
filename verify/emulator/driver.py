"""The Triton driver that runs kernels in the emulator, and every private interface of Triton that this takes.

Triton asks its active driver for the target, the device, a launcher and a loader of binaries. Compilation is
cut off after TTIR (`add_stages_inspection_hook`), and the TTIR's text itself takes the binary's place. Each
target has a device number of its own, because `JITFunction` caches compiled kernels by device.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from attnproof.emulator.errors import EmulationError
from attnproof.emulator.launch import launch, lower_kernel
from attnproof.emulator.machine import Settings
from attnproof.emulator.targets import TARGETS, Target, target_named

_CACHES = {True: "attnproof-ttir", False: "attnproof-binaries"}
# Triton has one active driver for the process.
LOCK = threading.RLock()


def _keep_only_ttir(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, _: Any = None
) -> Any:
    """Replaces everything after TTIR by one stage that hands the TTIR on as if it were the binary."""
    if backend is None:
        # Called without arguments for a key and a hash, which keep these kernels apart in both of Triton's
        # caches.
        return "attnproof-emulator-ttir", "attnproof-emulator-ttir"

    def finish(module: Any, metadata: dict[str, Any]) -> bytes:
        text = str(module)
        name = re.search(r"tt\.func public @(\"[^\"]*\"|[\w$.]+)", text)
        if name is None:
            raise EmulationError("the front end produced a module without a public function")
        metadata.update(
            name=name.group(1).strip('"'),
            shared=0,
            tmem_size=0,
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
            tensordesc_meta=[],
        )
        return text.encode()

    for stage in list(stages):
        if stage != "ttir":
            del stages[stage]
    stages[backend.binary_ext] = finish
    return None


class _Utils:
    """What the compiled-kernel object asks of a driver's C library."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(self.target.properties)

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, object, int, int, int]:
        # Without a module Triton has nothing to unload, which it would ask of whatever driver is active at
        # that time.
        return None, lower_kernel(binary, name), 0, 0, self.target.properties["max_threads_per_block"]

    def unload_module(self, module: object) -> None:
        """Never asked, since there are no modules."""


def runtime_arguments(signature: dict[str, Any], arguments: Sequence[Any]) -> list[Any]:
    """The launch's arguments without constexprs, tuples flattened, in the order of the IR."""
    kept: list[Any] = []

    def visit(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for inner_kind, inner in zip(kind, value, strict=True):
                visit(inner_kind, inner)
        elif kind != "constexpr":
            kept.append(value)

    for kind, value in zip(signature.values(), arguments, strict=True):
        visit(kind, value)
    return kept


class _Launcher:
    """Called by Triton in place of cuLaunchKernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature: dict[str, Any] = dict(src.signature)
        self.name: str = metadata.name

    def __call__(
        self,
        grid0: int,
        grid1: int,
        grid2: int,
        stream: int,
        function: Any,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *arguments: Any,
    ) -> None:
        active = triton.runtime.driver.active
        if not isinstance(active, EmulatorDriver):
            raise EmulationError(
                f"kernel {self.name} was compiled for the emulator and launched outside of it: "
                "enter attnproof.emulator.emulate()"
            )
        if enter_hook is not None:
            enter_hook(launch_metadata)
        grid = (int(grid0), int(grid1), int(grid2))
        launch(function, grid, runtime_arguments(self.signature, arguments), active.settings)
        if exit_hook is not None:
            exit_hook(launch_metadata)


class EmulatorDriver:
    """A `triton.runtime.driver` for one target."""

    launcher_cls = _Launcher

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.target = target_named(settings.target)
        self.utils = _Utils(self.target)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        return self.target.device

    def set_current_device(self, device: int) -> None:
        """There is one device at a time: the target's."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return self.target.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Callable[..., Any]:
        """One call is enough: emulated time says nothing about a GPU's, every configuration ties."""

        def benchmark(call: Callable[[], Any], *, quantiles: Sequence[float] | None = None, **_: Any) -> Any:
            call()
            return [0.0] * len(quantiles) if quantiles else 0.0

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is no cache to clear."""


@contextmanager
def emulate(
    target: str = "sm_90",
    *,
    undefined_is_nan: bool = False,
    poison: bool = True,
    races: str = "ignore",
    memory_limit: int = 512 << 20,
) -> Iterator[EmulatorDriver]:
    """Run every `@triton.jit` kernel launched inside on CPU tensors, as the target would.

    Args:
        target: "sm_80", "sm_90", "sm_100" or "gfx942". Triton's front end compiles for it, so its defaults
        hold
            (a float32 `tl.dot` rounds its operands to tf32 on sm_*, not on gfx942).
        undefined_is_nan: what a masked-out load without `other` gives: NaN, to find kernels that rely on it;
        by
            default zero, as on NVIDIA and AMD GPUs today.
        poison: fill what `torch.empty`, `empty_like`, `empty_strided`, `new_empty` and `new_empty_strided`
        return with
            NaN (integers with a large odd number), so that elements which a kernel forgets to write are seen.
        races: "ignore", "warn" or "raise": what happens when two programs of one launch store different
        values to one
            address.
        memory_limit: bytes that the live values of one batch of programs may take; results do not depend on
        it.

    Contexts nest, and restore the previous driver when left, by an exception too. Triton's active driver
    belongs to the process: contexts entered from several threads wait for each other.

    Raises ValueError for an unknown target or option. Inside: MemoryFault, EmulationError, RaceFault.
    """
    if races not in ("ignore", "warn", "raise"):
        raise ValueError(f"races must be 'ignore', 'warn' or 'raise', got {races!r}")
    if memory_limit < 1 << 20:
        raise ValueError(f"memory_limit must be at least 1 MiB (1048576 bytes), got {memory_limit}")
    driver = EmulatorDriver(Settings(target, undefined_is_nan, memory_limit, races))
    from attnproof.emulator.surroundings import poisoned_empties, pretended_device

    with LOCK, active_driver(driver), pretended_device(driver.target):
        if poison:
            with poisoned_empties():
                yield driver
        else:
            yield driver


@contextmanager
def active_driver(driver: Any, hook: Any = _keep_only_ttir) -> Iterator[None]:
    """Make a driver Triton's active one, with a hook into its compilation stages; restore both afterwards."""
    config, knobs = triton.runtime.driver, triton.knobs.runtime
    previous, previous_hook = config._active, knobs.add_stages_inspection_hook
    config.set_active(driver)
    knobs.add_stages_inspection_hook = hook
    try:
        with warnings.catch_warnings(), triton.knobs.cache.scope():
            # Triton 3.6 leaves the hook out of its key on disk: TTIR and binaries get folders of their own.
            folder = Path(triton.knobs.cache.dir)
            base = folder.parent if folder.name in _CACHES.values() else folder
            triton.knobs.cache.dir = str(base / _CACHES[hook is _keep_only_ttir])
            # Fusion is decided by the compiler after TTIR, where the emulator has already stopped.
            warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
            yield
    finally:
        config._active = previous
        knobs.add_stages_inspection_hook = previous_hook


__all__ = ["LOCK", "TARGETS", "EmulatorDriver", "active_driver", "emulate", "runtime_arguments"]
