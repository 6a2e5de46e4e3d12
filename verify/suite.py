"""The suite's own kernels: what `attnproof verify` judges, with the verdict that each is expected to get.

The naive examples are listed with the theory that says, case by case, where they must fail (``predictions``);
one that passes there, or fails elsewhere, is as much a defect as a failure of a correct kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from attnproof.properties.contract import Contract, contract_of
from attnproof.targets import Importable, resolve
from attnproof.trials import Subject

__all__ = ["ENTRIES", "STATE_FORMS", "Entry", "default_device", "subjects"]


@dataclass(frozen=True)
class Entry:
    """A kernel of the suite: its name in reports, its target, for examples what predicts their failures."""

    name: str
    target: str
    prediction: str = ""


_KERNELS = "attnproof.kernels"
_EXAMPLES = f"{_KERNELS}.examples"

STATE_FORMS = {
    "linear": ("attention", "parallel", "recurrent"),
    "gated_linear": ("attention", "recurrent"),
    "retention": ("attention", "parallel", "recurrent"),
    "rwkv6": ("attention", "recurrent"),
    "mlstm": ("attention", "attention_recurrent"),
    "delta": ("attention", "recurrent"),
    "ssm": ("recurrent", "scan", "convolution", "fft"),
    "h3": ("attention", "composed"),
    "selective_scan": ("scan", "recurrent"),
    "ssd": ("attention", "parallel", "recurrent"),
    "prefix_scan": ("attention", "recurrent", "hillis_steele", "blelloch"),
    "rwkv4": ("attention", "recurrent"),
}
"""Kernels of families with a state: each form by its name in ``attnproof.kernels``."""

ENTRIES: tuple[Entry, ...] = (
    Entry("logsumexp", f"{_KERNELS}.logsumexp:logsumexp"),
    Entry("softmax_rows", f"{_KERNELS}.softmax_rows:softmax_rows"),
    Entry("softmax.attention", f"{_KERNELS}.softmax:attention"),
    Entry("softmax.attention_split", "attnproof.adapters:attention_split_in_three"),
    Entry("softmax.attention_atomic", f"{_KERNELS}.softmax:attention_atomic"),
    *(
        Entry(f"{family}.attention", f"{_KERNELS}.{family}:attention")
        for family in ("sigmoid", "relu", "batch_normalised", "scaled_head", "differential", "easy")
    ),
    *(
        Entry(f"{family}.{form}", f"{_KERNELS}.{family}:{form}")
        for family, forms in STATE_FORMS.items()
        for form in forms
    ),
    *(
        Entry(f"{family}.handed_over", f"attnproof.adapters:{family}_handed_over")
        for family in STATE_FORMS
        if family != "h3"  # which begins without a state
    ),
    Entry("examples.unshifted_logsumexp", f"{_EXAMPLES}.logsumexp:unshifted_logsumexp", "unshifted"),
    Entry("examples.unshifted_softmax_rows", f"{_EXAMPLES}.softmax_rows:unshifted_softmax_rows", "unshifted"),
    Entry(
        "examples.division_free_softmax_rows",
        f"{_EXAMPLES}.softmax_rows:division_free_softmax_rows",
        "division-free",
    ),
    Entry("examples.unshifted_attention", f"{_EXAMPLES}.softmax:unshifted_attention", "unshifted"),
    Entry("examples.three_pass_attention", f"{_EXAMPLES}.softmax:three_pass_attention", "division-free"),
    Entry("examples.tanh_sigmoid", f"{_EXAMPLES}.sigmoid_tanh:tanh_sigmoid_attention", "tanh-approx"),
)


def default_device() -> str:
    """The machine's GPU if there is one, else the emulator."""
    return "cuda" if torch.cuda.is_available() else "emulator:sm_90"


def subjects(families: Iterable[str] = ()) -> list[Subject]:
    """The suite's kernels of ``families`` (all if empty), under the contracts that stand beside them."""
    wanted = tuple(families)
    found = []
    for entry in ENTRIES:
        contract = contract_of(resolve(entry.target))
        assert isinstance(contract, Contract), f"{entry.target} has no contract"
        if not wanted or contract.family in wanted:
            found.append(
                Subject(entry.name, Importable(entry.target), contract, default_device(), entry.prediction)
            )
    return found
