"""How fast the suite's kernels run on a GPU: a table in Markdown (nox session ``gpu``).

    python -m tests.benchmarks.throughput [FAMILY …] [--length N] [--dtype D]

Milliseconds are the median of CUDA events around whole calls (``triton.testing.do_bench``), with their checks
in Python and all their launches; "both" is forward and backward. The last column compares, within the run,
the forms of a family with its first one, and softmax attention with torch's scaled_dot_product_attention.
These kernels are written to be verified, in tiles that do not spill on four targets, and are tuned for none.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton

from attnproof.properties.case import Case, make_inputs
from attnproof.properties.contract import contract_of
from attnproof.properties.signatures import SIGNATURES
from attnproof.suite import ENTRIES
from attnproof.targets import resolve

# A model of width 1024: heads of 64, or as many channels with states of 16, as Mamba has them.
SIZES = {"B": 2, "H": 16, "G": 16, "D": 64, "E": 64, "T": 4, "P": 16}
CHANNELS = {"ssm": {"H": 1024, "D": 16}, "selective_scan": {"H": 1024, "D": 16}, "rwkv4": {"H": 1024}}
CHANNELS["h3"] = {"H": 128, "D": 8, "E": 8}
# A mixture has a weight for each pair of positions and head.
LONGEST = {"easy": 1024}
DTYPES = ("float32", "float16", "bfloat16")


class Timed(NamedTuple):
    """Median milliseconds of one kernel, or why there are none."""

    family: str
    name: str
    length: int
    forward: float
    both: float
    error: str = ""


class Call(NamedTuple):
    """A call that asks for gradients: ``entry`` and what it is given."""

    entry: Callable[..., Any]
    tensors: list[torch.Tensor | None]
    options: dict[str, Any]

    def outputs(self) -> list[torch.Tensor]:
        found = self.entry(*self.tensors, **self.options)
        return [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]

    def gradients(self) -> tuple[torch.Tensor, ...]:
        outputs = self.outputs()
        leaves = [x for x in (*self.tensors, *self.options.values()) if isinstance(x, torch.Tensor)]
        return torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)))


def prepared(family: str, entry: Callable[..., Any], length: int, dtype: str, device: str) -> Call:
    """A plain case of the family, causal where it can be."""
    signature = SIGNATURES[family]
    sizes = {**SIZES, **CHANNELS.get(family, {}), "N": length, "M": length}
    shape = tuple((symbol, sizes[symbol]) for symbol in signature.symbols)
    # Families with a state are causal unless told otherwise.
    asked = (("causal", True),) if "causal" in signature.options and not signature.stateful else ()
    made = make_inputs(Case(family, dtype, shape, "normal", asked))

    def moved(x: Any) -> Any:
        return x.to(device).requires_grad_() if isinstance(x, torch.Tensor) else x

    tensors = [moved(made.tensors.get(name)) for name in signature.tensors]
    return Call(entry, tensors, {name: moved(x) for name, x in made.options.items()})


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """What torch has for softmax attention."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=options["causal"], scale=options["scale"]
    )


def timed(
    family: str, name: str, entry: Callable[..., Any], length: int, dtype: str, device: str = "cuda"
) -> Timed:
    """Median milliseconds forward, and forward and backward; what a kernel raises becomes the error."""

    def median(call: Callable[[], Any]) -> float:
        return float(triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median"))

    length = min(length, LONGEST.get(family, length))
    try:
        call = prepared(family, entry, length, dtype, device)
        forward = median(call.outputs)
        # Split-KV decoding has no gradients.
        both = median(call.gradients) if call.outputs() else math.nan
        return Timed(family, name, length, forward, both)
    except Exception as caught:
        words = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else 'no message'}"
        return Timed(family, name, length, 0.0, 0.0, words)


def measurements(families: Sequence[str], length: int, dtype: str) -> Iterator[Timed]:
    """Every kernel of the suite that is an attention of its own."""
    if "softmax" in families or not families:
        yield timed("softmax", "torch", flash_attention, length, dtype)
    for entry in ENTRIES:
        kernel = resolve(entry.target)
        contract = contract_of(kernel)
        assert contract is not None
        rows = contract.family in ("logsumexp", "softmax_rows")
        if entry.prediction or rows or entry.name.endswith(".handed_over"):
            continue
        if not families or contract.family in families:
            yield timed(contract.family, entry.name, kernel, length, dtype)


def line(found: Timed, first: Timed) -> str:
    """A row of the table."""
    if found.error:
        return f"| {found.name} | {found.length} | {found.error} | | |"
    alone = first is found or first.error or math.isnan(found.both)
    ratio = "" if alone else f"{found.both / first.both:.2f} × {first.name}"
    both = "" if math.isnan(found.both) else f"{found.both:.3f}"
    return f"| {found.name} | {found.length} | {found.forward:.3f} | {both} | {ratio} |"


def main(words: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if none is named")
    parser.add_argument("--length", type=int, default=4096, help="N")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    asked = parser.parse_args(words)
    unknown = sorted(set(asked.families) - set(SIGNATURES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}: choose from {', '.join(SIGNATURES)}")
    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch here: run this on a machine with a GPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, {asked.dtype}")
    print("\n| kernel | N | forward, ms | both, ms | both, relative |\n|---|---|---|---|---|")
    first: dict[str, Timed] = {}
    for found in measurements(asked.families, asked.length, asked.dtype):
        print(line(found, first.setdefault(found.family, found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
