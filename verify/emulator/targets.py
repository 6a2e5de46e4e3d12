"""The GPUs that can be emulated and compiled for: what Triton and third-party code ask about them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """One GPU: Triton's target triple, a device number that keeps its kernels apart, a board's properties."""

    name: str
    board: str
    backend: str
    arch: int | str
    warp_size: int
    device: int
    capability: tuple[int, int]
    properties: dict[str, int] = field(hash=False)


def _properties(
    processors: int, shared: int, registers: int, warp: int, memory_clock: int, bus: int
) -> dict[str, int]:
    return {
        "max_shared_mem": shared,
        "max_num_regs": registers,
        "multiprocessor_count": processors,
        "warpSize": warp,
        "max_threads_per_block": 1024,
        "sm_clock_rate": 1_410_000,
        "mem_clock_rate": memory_clock,
        "mem_bus_width": bus,
    }


# Board figures: NVIDIA's data sheets and tuning guides (shared memory per block, opt-in), AMD's CDNA 3 white
# paper.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "sm_80",
            "A100",
            "cuda",
            80,
            32,
            9080,
            (8, 0),
            _properties(108, 166_912, 65536, 32, 1_215_000, 5120),
        ),
        Target(
            "sm_90",
            "H100",
            "cuda",
            90,
            32,
            9090,
            (9, 0),
            _properties(132, 232_448, 65536, 32, 2_619_000, 5120),
        ),
        Target(
            "sm_100",
            "B200",
            "cuda",
            100,
            32,
            9100,
            (10, 0),
            _properties(148, 232_448, 65536, 32, 3_996_000, 8192),
        ),
        Target(
            "gfx942",
            "MI300X",
            "hip",
            "gfx942",
            64,
            9942,
            (9, 4),
            _properties(304, 65_536, 65536, 64, 2_600_000, 8192),
        ),
    )
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises ValueError, listing the names, for any other.
    """
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}: choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
