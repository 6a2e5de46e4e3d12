"""A kernel that misbehaves on request; runs in workers, never in the tests' own process."""

from __future__ import annotations

import builtins
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

WAYS: dict[str, Callable[..., Any]] = {}
_calls = 0
_kept: list[Any] = []


def _way(function: Callable[..., Any]) -> Callable[..., Any]:
    WAYS[function.__name__] = function
    return function


def kernel(x: torch.Tensor, *rest: Any, how: str = "double", **options: Any) -> Any:
    """Doubles ``x`` in the named way."""
    return WAYS[how](x, *rest, **options)


@_way
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@_way
def segfault(x: torch.Tensor) -> None:
    ctypes.string_at(0)


@_way
def abort_on_bad_alloc(x: torch.Tensor) -> None:
    sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


@_way
def hang(x: torch.Tensor) -> None:
    while True:
        pass


@_way
def hang_in_c_ignoring_sigterm(x: torch.Tensor) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the GIL: no Python thread runs any more


@_way
def allocate(x: torch.Tensor) -> torch.Tensor:
    """1 GiB, never touched: the address space alone counts."""
    _kept.append(torch.empty(1 << 28))
    return x * 2


@_way
def allocate_unlimited(x: torch.Tensor) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    while True:
        _kept.append(torch.ones(1 << 22))
        time.sleep(0.01)


@_way
def allocate_in_a_child(x: torch.Tensor) -> torch.Tensor:
    code = "import time; kept = bytearray(b'1') * (700 << 20); time.sleep(60)"
    subprocess.run([sys.executable, "-c", code], check=True)
    return x * 2


@_way
def chatter(x: torch.Tensor, mebibytes: int = 3) -> torch.Tensor:
    for _ in range(mebibytes):
        sys.stdout.write("x" * (1 << 20))
    print("the last words")
    return x * 2


@_way
def chatter_and_hang(x: torch.Tensor) -> None:
    while True:
        os.write(1, b"y" * 65536)


@_way
def fail(x: torch.Tensor) -> None:
    raise ValueError("scale must be positive")


class _UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


@_way
def fail_unprintably(x: torch.Tensor) -> None:
    raise _UnprintableError


@_way
def fail_at_length(x: torch.Tensor) -> None:
    raise ValueError("z" * (8 << 20))


@_way
def decline(x: torch.Tensor) -> None:
    raise NotImplementedError("head_dim 40 is not supported")


@_way
def leave(x: torch.Tensor) -> None:
    sys.exit(0)


@_way
def interrupt(x: torch.Tensor) -> None:
    raise KeyboardInterrupt


@_way
def leave_at_once(x: torch.Tensor) -> None:
    os._exit(0)


@_way
def close_everything(x: torch.Tensor) -> torch.Tensor:
    os.closerange(0, 4096)
    return x * 2


@_way
def write_garbage(x: torch.Tensor) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_blocking(int(name), False)
                os.write(int(name), b"\x93\x01GARBAGE" * 40)
            except OSError:
                continue
    time.sleep(30)


@_way
def truncate_shared_memory(x: torch.Tensor) -> torch.Tensor:
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:" in os.readlink(f"/proc/self/fd/{name}"):
                os.ftruncate(int(name), 0)
        except OSError as error:
            print("refused:", error)
    return x * 2


@_way
def return_none(x: torch.Tensor) -> None:
    return None


@_way
def return_mixture(x: torch.Tensor) -> Any:
    return [
        x * 2,
        (x.sum(), {"a": 1}),
        3.5,
        x.to_sparse(),
        torch.empty(3, device="meta"),
        x.expand(10**9, *x.shape),
    ]


@_way
def mutate(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    result = x * 2
    x[1, 2] = 7.0
    return result


@_way
def mutate_and_fail(x: torch.Tensor) -> None:
    x[0, 0] = 7.0
    raise ValueError("and then it failed")


@_way
def transpose_in_place(x: torch.Tensor) -> torch.Tensor:
    result = x * 2
    x.t_()
    return result


@_way
def write_beyond_the_view(x: torch.Tensor) -> torch.Tensor:
    """``x`` is a slice of a larger storage; writes into the part that was not handed over."""
    x.as_strided((1,), (1,), 0).fill_(5.0)
    return x * 2


@_way
def write_guards(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    ctypes.memset(x.data_ptr() - 3, 0, 2)
    ctypes.memset(x.data_ptr() + x.numel() * x.element_size() + 8, 0, 5)
    return x * 2


@_way
def read_before_and_after(x: torch.Tensor) -> torch.Tensor:
    """Bytes around the tensor, which must be poison."""
    size = x.numel() * x.element_size()
    around = ctypes.string_at(x.data_ptr() - 64, 64) + ctypes.string_at(x.data_ptr() + size, 64)
    return torch.frombuffer(bytearray(around), dtype=torch.float32)


@_way
def return_input(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1)


@_way
def return_pair_of_one_storage(x: torch.Tensor, overlap: bool = True) -> Any:
    both = torch.empty(x.numel() * 2, dtype=x.dtype)
    both[:] = 1
    first, second = both[0::2], both[1::2]
    return (both[: x.numel()], both[x.numel() - 1 :]) if overlap else (first, second)


@_way
def reuse_output(x: torch.Tensor) -> torch.Tensor:
    if not _kept:
        _kept.append(torch.empty_like(x))
    kept: torch.Tensor = _kept[0]
    kept.copy_(x * 2)
    return kept


@_way
def vary(x: torch.Tensor) -> torch.Tensor:
    global _calls
    _calls += 1
    result = x * 2
    result[1, 1] += _calls
    return result


@_way
def random_values(x: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(x)


@_way
def leave_output_unwritten(x: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x)
    result[:-1] = x[:-1] * 2
    return result


@_way
def patch_torch(x: torch.Tensor) -> torch.Tensor:
    result = x * 2
    torch.matmul = lambda *a: result  # type: ignore[assignment]
    torch.Tensor.contiguous = lambda *a, **k: 1 / 0  # type: ignore[assignment, method-assign]
    torch.allclose = lambda *a, **k: True  # type: ignore[assignment]
    builtins.len = lambda *a: 0  # type: ignore[assignment]
    os.write = os._exit = os.getcwd = lambda *a: 0  # type: ignore[assignment]
    return result


@_way
def matmul_works(x: torch.Tensor) -> torch.Tensor:
    return torch.matmul(x, torch.eye(x.shape[1])) * len([1, 2])


@_way
def change_settings(x: torch.Tensor) -> torch.Tensor:
    result = x * 2
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.set_default_device("meta")
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()
    sys.stdout = None  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    faulthandler.disable()
    return result


@_way
def report_settings(x: torch.Tensor) -> torch.Tensor:
    print(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.empty(1).device)
    print(
        os.getcwd(),
        "PATH" in os.environ,
        bool(sys.path),
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN,
    )
    return torch.tensor([sys.float_info.min / 2 > 0], dtype=torch.float32)


@_way
def leave_a_thread(x: torch.Tensor) -> torch.Tensor:
    def spin() -> None:
        while True:
            time.sleep(0.01)

    threading.Thread(target=spin, daemon=True, name="spinner").start()
    return x * 2


@_way
def leave_a_daemon(x: torch.Tensor, file: str) -> torch.Tensor:
    """A grandchild in a session of its own, orphaned at once, that holds every pipe it got."""
    code = (
        "import os, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        f"open({file!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, close_fds=False)
    while not os.path.exists(file) or not os.path.getsize(file):
        time.sleep(0.01)
    return x * 2


@_way
def fork_and_exit(x: torch.Tensor, file: str) -> None:
    """Leaves a forked copy of the worker, pipes and all, and exits without a word."""
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(600)
    with open(file, "w", encoding="ascii") as listing:
        listing.write(str(child))
    os._exit(3)


@_way
def fork_and_return_twice(x: torch.Tensor) -> torch.Tensor:
    """The copy returns first; it must end there, and the parent answer."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return torch.tensor(os.getpid())


@_way
def describe_input(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """Prints what arrived; returns copies of the tensors."""
    for value in (x, *rest, *options.values()):
        if isinstance(value, torch.Tensor):
            print(
                tuple(value.shape), value.stride(), value.storage_offset(), value.data_ptr() % 64, value.dtype
            )
        else:
            print(repr(value))
    return tuple(value.clone() for value in (x, *rest, *options.values()) if isinstance(value, torch.Tensor))


@_way
def process_id(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([os.getpid(), torch.get_num_threads()])


class _Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"no backward for strides {gradients[0].stride()}")


@_way
def fail_in_backward(x: torch.Tensor) -> Any:
    return _Halve.apply(x)


@_way
def product(x: torch.Tensor, y: torch.Tensor, unused: torch.Tensor) -> Any:
    return x * y, (x * y).sum(-1).detach()
