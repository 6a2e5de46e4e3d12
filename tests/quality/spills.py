"""Which kernels of the families with a state spill registers, compiled for every target without a GPU.

    python -m tests.quality.spills [FAMILY …] [--targets sm_80 …] [--widths 16 …] [--dtypes float16 …]

compiles every form of every family, forward and backward, and prints one line a form, dtype and width: for
each target the most registers a thread of any of its kernels takes. A kernel that spills, or that cannot be
compiled, is named below it, and the command then ends with 1. All of it takes hours on one core; Triton's
cache keeps what was compiled, so that a second run, or one after a change of a tile, is short.
:mod:`tests.kernels.test_compiled` compiles a sample in CI.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attnproof.emulator import CompiledKernel, compile_launches
from attnproof.kernels import (
    delta,
    gated_linear,
    h3,
    linear,
    mlstm,
    prefix_scan,
    retention,
    rwkv4,
    rwkv6,
    selective_scan,
    ssd,
    ssm,
)
from attnproof.properties.case import Case, make_inputs
from attnproof.properties.signatures import SIGNATURES

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (16, 32, 64, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# More positions than a chunk of any form holds, and not a multiple of it; heads enough to fill tiles of them.
BATCH, HEADS, LENGTH = 1, 8, 130
# Heads of which a map of products makes as many features as wider heads have entries.
PRODUCT_WIDTH = 16


@dataclass(frozen=True)
class Form:
    """One form of a family, and what it is called with.

    Attributes:
        name: as the table shows it.
        entry: the kernel.
        beside: shapes of the tensors after q, k and v, without batch and heads; D stands for the width.
        options: its keywords.
        state: shapes of the initial state, likewise; nothing for a form that takes none.
        max_width: the widest head that it takes.
        family: where the call is no (q, k, v, …): whose tensors a case makes, with the options ``asked``.
    """

    name: str
    entry: Callable[..., Any]
    beside: tuple[tuple[str, ...] | None, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    state: tuple[tuple[str, ...], ...] = (("D", "D"),)
    max_width: int = WIDTHS[-1]
    family: str = ""
    asked: tuple[tuple[str, Any], ...] = ()


def linear_forms() -> Iterator[Form]:
    """Every form with the maps of most and of least work; the other maps and no mask in the chunkwise one."""
    forms = (linear.attention, linear.parallel, linear.recurrent)
    calls = [(entry, name, norm, True) for entry in forms for name in ("elu1", "identity") for norm in (0, 1)]
    calls += [(linear.attention, name, 1, True) for name in ("relu", "exp")]
    calls += [(entry, "elu1", 1, False) for entry in forms]
    calls += [(linear.with_chunk(16), "elu1", 1, True)]
    products = [(linear.attention, name, 1, True) for name in ("taylor", "squared")]
    for entry, name, norm, causal in calls + products:
        words = (entry.__name__, name, "normalised" if norm else "", "" if causal else "not causal")
        options = (
            ("feature_map", name),
            ("normalize", bool(norm)),
            ("causal", causal),
            ("return_state", True),
        )
        product = name in ("taylor", "squared")
        state = () if product else (("D", "D"), ("D",))[: 1 + norm]
        yield Form(
            " ".join(filter(None, words)), entry, options=options, state=state,
            max_width=PRODUCT_WIDTH if product else WIDTHS[-1],
        )  # fmt: skip


RETURNED = (("scale", 1.0), ("return_state", True))
GATES = {"gate": ("N",), "gates": ("N", "D")}


def gated_forms() -> Iterator[Form]:
    """With a gate a position and a gate a channel, which differ in strides alone."""
    for gates, shape in GATES.items():
        for entry in (gated_linear.attention, gated_linear.recurrent):
            yield Form(f"{entry.__name__}, {gates}", entry, (shape,), RETURNED)
    yield Form("with_chunk(128), gates", gated_linear.with_chunk(128), (("N", "D"),), RETURNED)


def retention_forms() -> Iterator[Form]:
    """All three forms of the paper."""
    for entry in (retention.attention, retention.recurrent, retention.parallel):
        yield Form(entry.__name__, entry, (), RETURNED)


def rwkv6_forms() -> Iterator[Form]:
    """With the bonus u, which has no batch."""
    for entry in (rwkv6.attention, rwkv6.recurrent):
        yield Form(entry.__name__, entry, (("N", "D"), ("H", "D")), RETURNED)


def mlstm_forms() -> Iterator[Form]:
    """From a state (C', n', m) to another, of a batch and of packed sequences, here one."""
    packed = (*RETURNED, ("cu_seqlens", torch.tensor([0, LENGTH], dtype=torch.int32)))
    for entry in (mlstm.attention, mlstm.attention_recurrent):
        for name, options in ((entry.__name__, RETURNED), (f"{entry.__name__}, packed", packed)):
            yield Form(name, entry, (("N",), ("N",)), options, state=(("D", "D"), ("D",), ()))


def delta_forms() -> Iterator[Form]:
    """DeltaNet, Gated DeltaNet and Kimi's."""
    for gates, shape in {"no gate": None, **GATES}.items():
        for entry in (delta.attention, delta.recurrent):
            yield Form(f"{entry.__name__}, {gates}", entry, (("N",), shape), RETURNED)


CARRIED = (("initial_state", True), ("return_state", True))
# Of the families whose calls differ: forms, and the options of their cases.
SCANS: dict[str, tuple[tuple[Callable[..., Any], ...], tuple[tuple[tuple[str, Any], ...], ...]]] = {
    "ssm": (
        (ssm.recurrent, ssm.scan, ssm.convolution),
        ((("complex", True), ("skip", True), *CARRIED), CARRIED),
    ),
    "h3": ((h3.attention,), ((("complex", True), ("skip", True)),)),
    "selective_scan": (
        (selective_scan.scan, selective_scan.recurrent),
        (
            (
                *(("skip", True), ("z", True), ("delta_bias", True), ("delta_softplus", True)),
                *(("discretization", "zoh"), *CARRIED),
            ),
            CARRIED,
        ),
    ),
    "ssd": ((ssd.attention, ssd.parallel, ssd.recurrent), ((("skip", True), *CARRIED),)),
    "prefix_scan": (
        (prefix_scan.attention, prefix_scan.recurrent, prefix_scan.hillis_steele, prefix_scan.blelloch),
        (CARRIED, ()),
    ),
    "rwkv4": ((rwkv4.attention, rwkv4.recurrent), (CARRIED, ())),
}


def scan_forms(family: str) -> Iterator[Form]:
    """Every form with all options of the family, and with as few as it can have."""
    entries, options = SCANS[family]
    for entry, asked in itertools.product(entries, options):
        words = "every option" if asked == options[0] and len(options) > 1 else ""
        name = ", ".join(filter(None, (entry.__name__, words)))
        yield Form(name, entry, family=family, asked=asked)


FAMILIES: dict[str, Callable[[], Iterator[Form]]] = {
    "linear": linear_forms,
    "gated_linear": gated_forms,
    "retention": retention_forms,
    "rwkv6": rwkv6_forms,
    "mlstm": mlstm_forms,
    "delta": delta_forms,
    **{family: functools.partial(scan_forms, family) for family in SCANS},
}


class Result(NamedTuple):
    """One form of ``family`` at one dtype and width on one target: its kernels, or why there are none."""

    family: str
    form: str
    dtype: str
    width: int
    target: str
    kernels: tuple[CompiledKernel, ...]
    error: str

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, one line each."""
        spilled = [f"{k.kernel} spills {k.spill_bytes} bytes" for k in self.kernels if k.spill_bytes]
        return [*spilled, *([self.error] if self.error else [])]


def forward_and_backward(entry: Callable[..., Any], *tensors: torch.Tensor | None, **options: Any) -> None:
    """One pass each way, with cotangents of every output that has one."""
    outputs = entry(*tensors, **options)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    start = options.get("initial_state", ())
    leaves = [*tensors, *(start if isinstance(start, tuple) else (start,))]
    leaves = [x for x in leaves if x is not None and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)


def arguments(form: Form, dtype: torch.dtype, width: int) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """Tensors and keywords of one call; no kernel runs, so that values do not matter."""
    if form.family:
        return case_arguments(form, dtype, width)
    sizes = {"N": LENGTH, "D": width, "H": HEADS}

    def zeros(shape: tuple[str, ...], kind: torch.dtype) -> torch.Tensor:
        before = () if "H" in shape else (BATCH, HEADS)
        return torch.zeros(*before, *(sizes[axis] for axis in shape), dtype=kind, requires_grad=True)

    beside = [None if shape is None else zeros(shape, dtype) for shape in form.beside]
    options = dict(form.options)
    if form.state:
        states = tuple(zeros(shape, torch.float32) for shape in form.state)
        options["initial_state"] = states if len(states) > 1 else states[0]
    return [*(zeros(("N", "D"), dtype) for _ in range(3)), *beside], options


def case_arguments(
    form: Form, dtype: torch.dtype, width: int
) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """The tensors and keywords of a case of the family, all floating ones with a gradient."""
    signature = SIGNATURES[form.family]
    sizes = {"B": BATCH, "H": HEADS, "G": 1, "N": LENGTH, "D": width, "E": width, "T": 4, "P": 16}
    shape = tuple((symbol, sizes[symbol]) for symbol in signature.symbols)
    case = Case(form.family, str(dtype).removeprefix("torch."), shape, "normal", form.asked)
    made = make_inputs(case)
    options = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in made.options.items()
    }
    tensors = [made.tensors.get(name) for name in signature.tensors]
    return [x if x is None else x.requires_grad_() for x in tensors], options


def scan(
    families: Sequence[str], targets: Sequence[str], widths: Sequence[int], dtypes: Sequence[str]
) -> Iterator[list[Result]]:
    """The results of each form, dtype and width, one a target."""
    for family in families:
        for width in widths:
            for form in (form for form in FAMILIES[family]() if width <= form.max_width):
                for dtype in dtypes:
                    yield [compiled(family, form, dtype, width, target) for target in targets]


def compiled(family: str, form: Form, dtype: str, width: int, target: str) -> Result:
    """``form`` compiled for ``target``; whatever a compiler raises becomes the result's error."""
    tensors, options = arguments(form, DTYPES[dtype], width)
    error, kernels = "", []
    try:
        kernels = compile_launches(forward_and_backward, [form.entry, *tensors], options, [target])
    except Exception as caught:
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else 'no message'}"
    return Result(family, form.name, dtype, width, target, tuple(kernels), error)


def line(results: Sequence[Result]) -> str:
    """A row of the table: registers by target, and below it what is wrong."""
    first = results[0]
    registers = (
        f"{'failed' if x.error else max(k.registers for k in x.kernels)!s:>7}{'*' if x.faults else ' '}"
        for x in results
    )
    head = f"{first.family:15}{first.form:36}{first.dtype:9}{first.width:>5}  {''.join(registers)}"
    faults = dict.fromkeys(f"    {x.target}: {fault}" for x in results for fault in x.faults)
    return "\n".join([head.rstrip(), *faults])


def main(words: Sequence[str] | None = None) -> int:
    """The command: 0 if nothing was spilled and everything was compiled, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.quality.spills", description=__doc__.split("\n")[0]
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"any of {', '.join(FAMILIES)}; all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="D and E of q, k and v")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    asked = parser.parse_args(words)
    unknown = sorted(set(asked.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}: choose from {', '.join(FAMILIES)}")
    columns = "".join(f"{target:>7} " for target in asked.targets)
    print(f"{'family':15}{'form':36}{'dtype':9}{'width':>5}  {columns}".rstrip())
    wrong = total = 0
    for results in scan(asked.families or list(FAMILIES), asked.targets, asked.widths, asked.dtypes):
        print(line(results), flush=True)
        total += len(results)
        wrong += sum(bool(x.faults) for x in results)
    print(f"{wrong} of {total} compilations spill registers or fail (* above)")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
