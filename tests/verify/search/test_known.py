"""Failures are kept in Hypothesis's database and come back as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase, InMemoryExampleDatabase

from attnproof.properties.case import Case, make_inputs
from attnproof.properties.contract import Contract
from attnproof.search.known import Known, forget, recall, remember

CONTRACT = Contract("softmax", options=("causal", "bias", "cu_seqlens"))
CASES = (
    "softmax:bfloat16:normal:B1,H2,G1,M3,N5,D4,E2:causal,bias=b11n:transposed:7",
    "softmax:float16:normal:B1,H1,G1,M5,N5,D4,E2:cu_seqlens=2+0+3:contiguous:1",
    "softmax:float32:normal:B1,H1,G1,M0,N5,D4,E2:-:sliced:1",
)


@pytest.mark.parametrize("text", CASES)
def test_a_failure_with_tensors_of_its_own_survives_storage(text: str, tmp_path: Path) -> None:
    case = Case.parse(text)
    inputs = make_inputs(case)
    inputs.tensors["q"] = inputs.tensors["q"] * 0 + 2.0
    inputs.options["scale"] = 0.25
    database = DirectoryBasedExampleDatabase(tmp_path)
    remember(database, "m:f", CONTRACT, Known(case, inputs, "ones", (case,)))
    (back,) = recall(DirectoryBasedExampleDatabase(tmp_path), "m:f", CONTRACT)
    assert (back.case, back.invariant, back.history) == (case, "ones", (case,))
    assert back.inputs is not None
    assert back.inputs.options["scale"] == 0.25
    for name, tensor in inputs.tensors.items():
        assert torch.equal(back.inputs.tensors[name], tensor)
    bias = inputs.options.get("bias")
    assert bias is None or torch.equal(back.inputs.options["bias"], bias)


def test_a_failure_belongs_to_its_kernel_and_can_be_forgotten() -> None:
    database = InMemoryExampleDatabase()
    known = Known(Case.parse(CASES[0]))
    remember(database, "m:f", CONTRACT, known)
    assert not recall(database, "m:g", CONTRACT)
    assert [k.case for k in recall(database, "m:f", CONTRACT)] == [known.case]
    forget(database, "m:f", CONTRACT, known)
    assert not recall(database, "m:f", CONTRACT)


def test_what_the_declarations_no_longer_allow_or_nobody_can_read_is_passed_over() -> None:
    database = InMemoryExampleDatabase()
    remember(database, "m:f", CONTRACT, Known(Case.parse(CASES[0])))
    (key,) = database.data
    database.save(key, b"no message")
    assert len(recall(database, "m:f", CONTRACT)) == 1
    assert not recall(database, "m:f", Contract("softmax", options=("causal",)))
    assert not recall(database, "m:f", Contract("softmax", dtypes=("float32",), options=CONTRACT.options))
