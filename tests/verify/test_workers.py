"""Every way in which a kernel can misbehave gives its outcome, and the next call works."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from attnproof.outcomes import (
    CallRequest,
    Crashed,
    Declined,
    Flooded,
    NotATensor,
    Outcome,
    OutOfMemory,
    Raised,
    Returned,
    TimedOut,
    Value,
)
from attnproof.targets import Importable, describe
from attnproof.workers import Limits, Worker, WorkerPool

KERNEL = Importable("misbehaving:kernel")
LIMITS = Limits(memory=512 << 20, timeout=20.0, output=2 << 20, tail=4096)
X = torch.arange(12.0).reshape(3, 4)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        with WorkerPool(jobs=2, limits=LIMITS, spares=1) as workers:
            yield workers
    finally:
        sys.path.remove(str(Path(__file__).parent))


def request(
    how: str, *rest: Value, x: torch.Tensor = X, call: dict[str, Any] | None = None, **options: Value
) -> CallRequest:
    return CallRequest(
        KERNEL,
        arguments=(x.clone() if x is X else x, *rest),
        names=("x", "y"),
        keywords={"how": how, **options},
        **call or {},
    )


def returned(outcome: Outcome) -> Returned:
    assert isinstance(outcome, Returned), outcome
    return outcome


def assert_still_works(pool: WorkerPool) -> Returned:
    outcome = returned(pool.call(request("double")))
    assert isinstance(outcome.value, torch.Tensor)
    assert torch.equal(outcome.value, X * 2)
    assert outcome.mutations == ()
    assert outcome.effects == ()
    assert outcome.residue == ()
    return outcome


# Death and delay


def test_a_segfault_is_a_crash_with_its_stack(pool: WorkerPool) -> None:
    outcome = pool.call(request("segfault"))
    assert isinstance(outcome, Crashed)
    assert (outcome.signal, outcome.exit_code, outcome.phase) == (11, None, "forward")
    assert "Fatal Python error: Segmentation fault" in outcome.output.tail
    assert "in segfault" in outcome.output.tail
    assert "SIGSEGV" in str(outcome)
    assert_still_works(pool)


@pytest.mark.parametrize("how", ["hang", "hang_in_c_ignoring_sigterm"])
def test_a_hang_is_killed_and_its_place_is_told(pool: WorkerPool, how: str) -> None:
    assert_still_works(pool)  # so that the call below measures the hang alone
    begin = time.monotonic()
    outcome = pool.call(request(how, call={"timeout": 0.4}))
    assert isinstance(outcome, TimedOut)
    assert time.monotonic() - begin < 5.0
    assert outcome.limit == 0.4
    assert f"in {how}" in outcome.output.tail
    assert not psutil.pid_exists(outcome.pid)
    assert_still_works(pool)


@pytest.mark.parametrize(("how", "code"), [("leave_at_once", 0), ("close_everything", 70)])
def test_a_process_that_leaves_has_crashed(pool: WorkerPool, how: str, code: int) -> None:
    outcome = pool.call(request(how))
    assert isinstance(outcome, Crashed)
    assert (outcome.signal, outcome.exit_code) == (None, code) or "still running" in outcome.reason
    assert_still_works(pool)


def test_garbage_on_the_pipe_is_a_crash(pool: WorkerPool) -> None:
    outcome = pool.call(request("write_garbage"))
    assert isinstance(outcome, Crashed)
    assert "protocol" in outcome.reason
    assert_still_works(pool)


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("fail", "ValueError", "scale must be positive"),
        ("leave", "SystemExit", "0"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("fail_unprintably", "_UnprintableError", "text cannot be had"),
        ("fail_at_length", "ValueError", "zzz"),
    ],
)
def test_exceptions_come_back_as_text(pool: WorkerPool, how: str, kind: str, text: str) -> None:
    outcome = pool.call(request(how))
    assert isinstance(outcome, Raised)
    assert (outcome.type, outcome.phase) == (kind, "forward")
    assert text in outcome.message
    assert len(outcome.message) < 3000
    assert len(outcome.traceback) < 20000
    assert_still_works(pool)


def test_not_implemented_declines(pool: WorkerPool) -> None:
    outcome = pool.call(request("decline"))
    assert isinstance(outcome, Declined)
    assert outcome.message == "head_dim 40 is not supported"


# Memory


def test_a_huge_allocation_fails_inside(pool: WorkerPool) -> None:
    before = assert_still_works(pool)
    outcome = pool.call(request("allocate"))
    assert isinstance(outcome, OutOfMemory)
    assert outcome.resident is None
    assert outcome.limit == LIMITS.memory
    assert assert_still_works(pool).pid == before.pid


def test_an_allocation_within_the_limit_succeeds(pool: WorkerPool) -> None:
    small = torch.ones(1)
    outcome = returned(pool.call(request("describe_input", torch.ones(16 << 20), x=small)))
    assert outcome.outputs[1].tensor.numel() == 16 << 20


@pytest.mark.parametrize("how", ["allocate_unlimited", "allocate_in_a_child"])
def test_memory_that_escapes_the_inner_limit_is_seen_from_outside(pool: WorkerPool, how: str) -> None:
    outcome = pool.call(request(how))
    assert isinstance(outcome, OutOfMemory)
    assert outcome.resident is not None
    assert outcome.resident < 3 * LIMITS.memory
    assert_still_works(pool)


def test_a_native_allocation_failure_counts_as_memory(pool: WorkerPool) -> None:
    assert isinstance(pool.call(request("abort_on_bad_alloc")), OutOfMemory)


# Output


def test_a_flood_of_output_is_counted_and_the_call_goes_on(pool: WorkerPool) -> None:
    outcome = pool.call(request("chatter", mebibytes=3))
    assert isinstance(outcome, Flooded)
    assert outcome.output.size == (3 << 20) + len("the last words\n")
    assert outcome.output.tail.endswith("xxxthe last words\n")
    assert len(outcome.output.tail) == LIMITS.tail
    assert torch.equal(returned(outcome.ended).outputs[0].tensor, X * 2)
    quiet = returned(pool.call(request("chatter", mebibytes=1)))
    assert quiet.output.size == (1 << 20) + len("the last words\n")
    assert assert_still_works(pool).output.size == 0


def test_an_endless_flood_ends_at_the_timeout(pool: WorkerPool) -> None:
    outcome = pool.call(request("chatter_and_hang", call={"timeout": 0.5}))
    assert isinstance(outcome, Flooded)
    assert isinstance(outcome.ended, TimedOut)


# Inputs


def test_views_arrive_as_they_are(pool: WorkerPool) -> None:
    base = torch.arange(1000, dtype=torch.bfloat16)
    odd = torch.frombuffer(bytearray(200), dtype=torch.uint8)[3:]
    tensors = (
        base.as_strided((4, 6), (0, 3), 7),
        torch.randn(5, 7, dtype=torch.float64).t(),
        torch.randn(8, 8)[1::2, ::3],
        torch.empty(0, 3),
        torch.randn((), dtype=torch.complex64),
        odd,
        torch.tensor([True, False]),
    )
    outcome = returned(pool.call(request("describe_input", *tensors, None, 2.5, (1, None), x=base)))
    lines = outcome.output.tail.splitlines()
    for tensor, line, output in zip((base, *tensors), lines, outcome.outputs, strict=False):
        place = tensor.data_ptr() % 64 if tensor.numel() else 0
        assert (
            line
            == f"{tuple(tensor.shape)} {tensor.stride()} {tensor.storage_offset()} {place} {tensor.dtype}"
        )
        assert output.tensor.dtype == tensor.dtype
        assert torch.equal(output.tensor, tensor)
    assert lines[-3:] == ["None", "2.5", "(1, None)"]


@pytest.mark.parametrize("shape", [(1, 1), (1,), (), (0, 3)])
def test_small_tensors_come_back_whatever_their_strides(pool: WorkerPool, shape: tuple[int, ...]) -> None:
    """One element is contiguous under any stride, and its bytes can be read all the same."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, (17,) * x.dim()).copy_(x)

    x = torch.full(shape, 0.1)
    outcome = returned(pool.call(CallRequest(describe(spread), arguments=(x,))))
    assert isinstance(outcome.value, torch.Tensor)
    assert torch.equal(outcome.value, x)


def test_mutations_are_found_by_the_judge(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("mutate")))
    (mutation,) = outcome.mutations
    assert (mutation.where, mutation.tensor, mutation.index, mutation.count) == ("element", "x", (1, 2), 1)
    assert str(mutation) == "x[1, 2] changed from 6.0 to 7.0; elements of x changed: 1"
    assert_still_works(pool)


def test_mutations_of_a_shared_storage_name_each_view(pool: WorkerPool) -> None:
    x = X.clone()
    outcome = returned(pool.call(request("mutate", x[1:].t(), x=x)))
    assert [(m.tensor, m.index) for m in outcome.mutations] == [("x", (1, 2)), ("y", (2, 0))]


def test_mutations_are_told_of_a_call_that_failed(pool: WorkerPool) -> None:
    outcome = pool.call(request("mutate_and_fail"))
    assert isinstance(outcome, Raised)
    assert outcome.mutations[0].index == (0, 0)


def test_metadata_changed_in_place_is_an_effect(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("transpose_in_place", call={"repeats": 2})))
    assert outcome.effects == ("x was changed in place from shape (3, 4) to (4, 3)",)
    assert outcome.differences == ()


def test_writes_outside_the_view_are_found(pool: WorkerPool) -> None:
    x = torch.arange(20.0)[8:]
    outcome = returned(pool.call(request("write_beyond_the_view", x=x)))
    (mutation,) = outcome.mutations
    assert (mutation.where, mutation.tensor, mutation.index, mutation.count) == ("storage", "x", (2,), 2)


def test_writes_outside_the_storage_are_found(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("write_guards", torch.ones(3))))
    found = [(m.where, m.tensor, m.index, m.count) for m in outcome.mutations]
    assert found == [("guard before", "x", (1,), 2), ("guard after", "x", (8,), 5)]
    assert_still_works(pool)


def test_memory_around_a_tensor_is_poison(pool: WorkerPool) -> None:
    around = returned(pool.call(request("read_before_and_after"))).outputs[0].tensor
    assert around.numel() == 32
    assert bool(around.isnan().all())


def test_the_shared_file_cannot_be_cut_short(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("truncate_shared_memory")))
    assert "refused: [Errno 1] Operation not permitted" in outcome.output.tail


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1, 2],), TypeError, "argument 0 is a list"),
        ((torch.empty(2, device="meta"),), ValueError, "dense CPU tensors"),
        ((torch.zeros(2, dtype=torch.complex64).conj(),), ValueError, "resolve_conj"),
    ],
)
def test_arguments_that_cannot_be_sent(
    pool: WorkerPool, arguments: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pool.call(CallRequest(KERNEL, arguments=arguments))


# Results


def test_results_that_are_no_tensors_are_described(pool: WorkerPool) -> None:
    nothing = returned(pool.call(request("return_none")))
    assert nothing.value == NotATensor("NoneType", "None")
    assert nothing.container == "NoneType"
    outcome = returned(pool.call(request("return_mixture")))
    assert outcome.container == "list"
    assert isinstance(outcome.value, tuple)
    double, nested, number, sparse, meta, huge = outcome.value
    assert torch.is_tensor(double)
    assert isinstance(nested, tuple)
    assert nested[1] == NotATensor("dict", "{'a': 1}")
    assert number == NotATensor("float", "3.5")
    for opaque, word in ((sparse, "sparse"), (meta, "meta"), (huge, "limit")):
        assert isinstance(opaque, NotATensor)
        assert word in opaque.text
    assert len(outcome.outputs) == 2


@pytest.mark.parametrize(
    ("how", "options", "repeats", "expected"),
    [
        ("return_input", {}, 1, [(0, "input x", "memory")]),
        ("return_pair_of_one_storage", {"overlap": True}, 1, [(1, "output 0", "memory")]),
        ("return_pair_of_one_storage", {"overlap": False}, 1, [(1, "output 0", "storage")]),
        ("reuse_output", {}, 2, [(0, "output 0 of the run before", "memory")]),
        ("double", {}, 2, []),
    ],
)
def test_aliases(
    pool: WorkerPool, how: str, options: dict[str, Value], repeats: int, expected: list[Any]
) -> None:
    outcome = returned(pool.call(request(how, call={"repeats": repeats}, **options)))
    assert [(alias.output, alias.other, alias.shares) for alias in outcome.aliases] == expected


def test_repeats_that_differ_are_located(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("vary", call={"repeats": 3})))
    assert [(d.run, d.what, d.index, d.count) for d in outcome.differences] == [
        (1, "output 0", (1, 1), 1),
        (2, "output 0", (1, 1), 1),
    ]
    assert len(outcome.seconds) == 3
    assert returned(pool.call(request("double", call={"repeats": 3}))).differences == ()
    assert returned(pool.call(request("random_values", call={"repeats": 2}))).differences


def test_random_numbers_do_not_depend_on_history(pool: WorkerPool) -> None:
    first, second = (returned(pool.call(request("random_values"))).outputs[0].tensor for _ in range(2))
    assert torch.equal(first, second)


def test_fresh_outputs_are_poisoned_on_request(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("leave_output_unwritten", call={"poison_outputs": True})))
    output = outcome.outputs[0].tensor
    assert bool(output[-1].isnan().all())
    assert torch.equal(output[:-1], X[:-1] * 2)


def test_gradients(pool: WorkerPool) -> None:
    x, y, unused = (torch.randn(4, 3) for _ in range(3))
    cotangent = torch.randn(3).expand(4, 3)
    outcome = returned(
        pool.call(
            CallRequest(
                KERNEL,
                arguments=(x, y, unused),
                names=("x", "y", "unused"),
                keywords={"how": "product"},
                differentiate=("x", "y", "unused"),
                cotangents=(cotangent, torch.ones(4)),
                repeats=2,
            )
        )
    )
    gradients = outcome.gradients
    assert gradients is not None
    assert gradients["unused"] is None
    assert torch.equal(gradients["x"], y * cotangent)  # type: ignore[arg-type]
    assert torch.equal(gradients["y"], x * cotangent)  # type: ignore[arg-type]
    assert [output.requires_grad for output in outcome.outputs] == [True, False]
    assert outcome.differences == ()


def test_a_backward_pass_that_fails_says_so(pool: WorkerPool) -> None:
    call = {"differentiate": ("x",), "cotangents": (torch.ones(1, 1).expand(3, 4),)}
    outcome = pool.call(request("fail_in_backward", call=call))
    assert isinstance(outcome, Raised)
    assert (outcome.phase, outcome.message) == ("backward", "no backward for strides (0, 0)")


# What a call leaves behind


def test_a_patched_torch_is_seen_and_put_back(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("patch_torch")))
    assert torch.equal(outcome.outputs[0].tensor, X * 2)
    for name in (
        "torch.matmul",
        "Tensor.contiguous",
        "torch.allclose",
        "builtins.len",
        "os.write",
        "os._exit",
    ):
        assert f"{name} was replaced" in outcome.effects
    again = returned(pool.call(request("matmul_works")))
    assert torch.equal(again.outputs[0].tensor, X * 2)
    assert again.pid == outcome.pid


def test_settings_are_put_back(pool: WorkerPool) -> None:
    before = returned(pool.call(request("report_settings")))
    outcome = returned(pool.call(request("change_settings")))
    changed = " ".join(outcome.effects)
    for word in (
        "default dtype",
        "grad mode",
        "torch threads",
        "flush-to-zero",
        "default device",
        "working directory",
    ):
        assert word in changed
    for word in ("environment", "sys.path", "sys.stdout", "SIGINT", "alarm"):
        assert word in changed
    after = returned(pool.call(request("report_settings")))
    assert (after.output, after.effects) == (before.output, ())
    assert after.output.tail.startswith("torch.float32 True 1 cpu\n")
    assert torch.equal(after.outputs[0].tensor, torch.ones(1))


def test_threads_left_running_cost_the_worker(pool: WorkerPool) -> None:
    before = assert_still_works(pool)
    outcome = returned(pool.call(request("leave_a_thread")))
    assert outcome.residue == ("thread 'spinner' is still running",)
    assert assert_still_works(pool).pid != before.pid


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_daemons_are_found_and_killed(pool: WorkerPool, tmp_path: Path) -> None:
    outcome = returned(pool.call(request("leave_a_daemon", file=str(tmp_path / "pid"))))
    daemon = int((tmp_path / "pid").read_text())
    assert outcome.residue == (f"child process {daemon} is still running",)
    assert not _is_alive(daemon)
    assert_still_works(pool)


def test_a_daemon_that_holds_the_pipes_does_not_hide_a_death(pool: WorkerPool, tmp_path: Path) -> None:
    outcome = pool.call(request("fork_and_exit", file=str(tmp_path / "pid")))
    assert isinstance(outcome, Crashed)
    assert outcome.exit_code == 3
    assert not _is_alive(int((tmp_path / "pid").read_text()))


def test_a_forked_copy_does_not_answer(pool: WorkerPool) -> None:
    outcome = returned(pool.call(request("fork_and_return_twice")))
    assert outcome.outputs[0].tensor.item() == outcome.pid
    assert_still_works(pool)


# The pool


def test_a_worker_serves_one_kernel_for_many_calls(pool: WorkerPool) -> None:
    pids = {returned(pool.call(request("process_id"))).pid for _ in range(120)}
    assert len(pids) == 1
    other = returned(pool.call(CallRequest(describe(lambda x: torch.tensor(os.getpid())), arguments=(X,))))
    assert other.pid not in pids
    assert other.outputs[0].tensor.item() == other.pid != os.getpid()


def test_a_worker_refuses_another_kernel() -> None:
    with Worker(LIMITS) as worker:
        failed = worker.call(CallRequest(Importable("no.such:kernel")))
        assert isinstance(failed, Raised)
        with pytest.raises(ValueError, match="one kernel"):
            worker.call(CallRequest(Importable("no.other:kernel")))
    with pytest.raises(ValueError, match="ended"):
        worker.call(CallRequest(KERNEL))


def test_a_kernel_that_cannot_be_imported(pool: WorkerPool) -> None:
    outcome = pool.call(CallRequest(Importable("misbehaving:kernle")))
    assert isinstance(outcome, Raised)
    assert (outcome.phase, outcome.type) == ("import", "TargetError")
    assert "nearest names: kernel" in outcome.message


def test_calls_from_several_threads(pool: WorkerPool) -> None:
    outcomes: dict[tuple[int, int], tuple[Outcome, torch.Tensor]] = {}

    def work(thread: int) -> None:
        for call in range(20):
            x = torch.full((4,), float(100 * thread + call))
            outcomes[thread, call] = (pool.call(request("double", x=x)), x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 60
    assert all(torch.equal(returned(outcome).outputs[0].tensor, x * 2) for outcome, x in outcomes.values())
    assert len({outcome.pid for outcome, _ in outcomes.values()}) == 2


def test_closing_the_pool_ends_a_call_under_way() -> None:
    def forever() -> None:
        while True:
            pass

    ended: list[Outcome] = []
    pool = WorkerPool(limits=LIMITS, spares=0)
    thread = threading.Thread(target=lambda: ended.append(pool.call(CallRequest(describe(forever)))))
    thread.start()
    time.sleep(0.3)
    pool.close()
    thread.join(10)
    assert isinstance(ended[0], Crashed)
    with pytest.raises(ValueError, match="closed"):
        pool.call(request("double"))


def test_workers_die_with_their_judge(tmp_path: Path) -> None:
    """And so does the nursery: even while they hang, and even if the judge was killed outright."""
    import subprocess

    script = tmp_path / "judge.py"
    script.write_text(
        "import threading, time\n"
        "from attnproof.targets import describe\n"
        "from attnproof.workers import CallRequest, Worker\n"
        "def hang():\n"
        f"    open({str(tmp_path / 'started')!r}, 'w').close()\n"
        "    while True: pass\n"
        "worker = Worker()\n"
        "print(worker.pid, flush=True)\n"
        "worker.call(CallRequest(describe(hang)))\n"
    )
    judge = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert judge.stdout is not None
    pid = int(judge.stdout.readline())
    worker = psutil.Process(pid)
    nursery = psutil.Process(worker.ppid())
    assert nursery.pid != judge.pid
    while not (tmp_path / "started").exists() and judge.poll() is None:
        time.sleep(0.05)
    judge.kill()
    judge.communicate()
    psutil.wait_procs([worker, nursery], timeout=5)
    assert not worker.is_running()
    assert not nursery.is_running()


def test_in_process_isolation_says_so() -> None:
    with WorkerPool(isolation="none") as pool:
        outcome = returned(
            pool.call(CallRequest(describe(lambda x: x.mul_(2)), arguments=(X.clone(),), names=("x",)))
        )
        assert outcome.isolation == "none"
        assert outcome.pid == os.getpid()
        assert outcome.mutations[0].index == (0, 1)
        assert [alias.other for alias in outcome.aliases] == ["input x"]
        failed = pool.call(CallRequest(Importable("no.such:thing")))
        assert isinstance(failed, Raised)
        assert failed.isolation == "none"
