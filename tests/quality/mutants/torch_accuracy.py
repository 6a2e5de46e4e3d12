"""Mutants of the torch flash attention that compute the right thing, with fewer digits than they declare.

Most lose a small factor, in units of the inputs' dtype, in every row: what error-against-a-tolerance tests
never see. None breaks an edge of the contract.
"""

from __future__ import annotations

from tests.quality.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_BASE = "attnproof.healthy_flash:tiled_attention"
_NUMERIC = ("certain", "probable-row", "probable-output", "bias")

_P = "p = torch.exp(s - shift[..., None])"
# An error of exp that oscillates with its argument, between -1 and 1.
_WAVE = "torch.sin(40.0 * (s - shift[..., None]).clamp(min=-99.0))"
_STORED_P = "p.to(t.stored).float()"
_DIVISION = "o = o / total[..., None]"
_WRITTEN = "o[:, :, into] = o_tile.to(q.dtype)"
_EPS = "torch.finfo(t.stored).eps"


def _accuracy(
    name: str, edits: dict[str, str], story: str, trigger: str, bug: str = "", *, slight: bool = True
) -> Mutant:
    """``slight``: no dtype or regime loses much more than a factor of 8 in o."""
    return Mutant(
        name, _BASE, tuple(edits.items()), "accuracy", bug, story, trigger, _NUMERIC, accuracy_only=slight
    )


MUTANTS: tuple[Mutant, ...] = (
    _accuracy(
        "torch_normaliser_stored_narrow",
        {
            "l = l * alpha + p.sum(-1)": "l = (l * alpha + p.sum(-1)).to(t.stored).float()",
        },
        "The running sum of a row is kept in the inputs' dtype.",
        "softmax:bfloat16:normal:B1,H2,G1,M33,N512,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_weights_in_bfloat16",
        {_STORED_P: "p.to(torch.bfloat16 if t.stored == torch.float16 else t.stored).float()"},
        "float16 inputs have their weights rounded to bfloat16.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_exp_of_low_degree",
        {_P: f"{_P}\n        p = p * (1.0 + 3.0 * {_EPS} * {_WAVE})"},
        "exp has a relative error of up to three units of the inputs' dtype.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_output_truncated",
        {
            _WRITTEN: "dropped = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[q.dtype]\n"
            "            bits = o_tile.contiguous().view(torch.int32)\n"
            "            o[:, :, into] = (bits >> dropped << dropped).view(torch.float32).to(q.dtype)"
        },
        "The result is truncated to its dtype instead of rounded.",
        "softmax:bfloat16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_division_off",
        {_DIVISION: f"o = o / (total * (1.0 + 0.64 * {_EPS}))[..., None]"},
        "The normaliser is too large by 0.5 % in bfloat16, by as many units in the other dtypes.",
        "softmax:bfloat16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_scale_off",
        {
            "* t.scale": f"* (t.scale * (1.0 + 1.5 * {_EPS}))",
        },
        "The scale is too large by 1.5 units of the inputs' dtype, 1.2 % in bfloat16.",
        "softmax:bfloat16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_accumulator_in_bfloat16",
        {
            "o = o * alpha[..., None]": "o = o * alpha[..., None]\n"
            "        o = o.bfloat16().float() if t.stored == torch.bfloat16 else o"
        },
        "For bfloat16 inputs the accumulator is rounded to bfloat16 in every key tile.",
        "softmax:bfloat16:tied-one-sign:B1,H2,G1,M33,N512,D64,E64:-:contiguous:1",
        "B33",
    ),
    _accuracy(
        "torch_output_one_unit_high",
        {
            _WRITTEN: "o_tile = o_tile * (1.0 + torch.finfo(q.dtype).eps)\n"
            "            o[:, :, into] = o_tile.to(q.dtype)"
        },
        "Every output is about one unit of its dtype too far from zero.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_reciprocal_unrefined",
        {_DIVISION: f"o = o * ((1.0 + {_EPS} * torch.sin(97.0 * total)) / total)[..., None]"},
        "The reciprocal of the normaliser lacks its last Newton step: it is off by up to a unit of the "
        "inputs' dtype.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_scaled_queries_rounded",
        {"        q=q.float(),": "        q=(q * scale).float(),", "* t.scale": "* 1.0"},
        "Queries are scaled and rounded to the inputs' dtype before the matmul; the contract declares that "
        "they are not.",
        "softmax:bfloat16:large-logits:B1,H2,G1,M33,N65,D40,E64:-:contiguous:1",
        slight=False,
    ),
    _accuracy(
        "torch_values_in_bfloat16",
        {
            "clean = torch.where(finite, v, 0.0).float()": "clean = torch.where(finite, v, 0.0)\n"
            "    clean = (clean.bfloat16() if v.dtype == torch.float16 else clean).float()"
        },
        "float16 values are rounded to bfloat16 on their way into the second matmul.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _accuracy(
        "torch_weights_in_fp8",
        {_STORED_P: "p.to(torch.float8_e4m3fn).float()"},
        "Weights are stored in 8 bits (e4m3) before the second matmul, which the contract does not declare.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
        slight=False,
    ),
    _accuracy(
        "torch_approximate_exp",
        {_P: f"{_P}\n        p = p * (1.0 + 2.0**-11 * {_WAVE})"},
        "exp has 11 correct bits whatever the dtype.",
        "softmax:float32:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
        "HW-1",
        slight=False,
    ),
    _accuracy(
        "torch_lse_stored_narrow",
        {"lse[:, :, into] = lse_tile": "lse[:, :, into] = lse_tile.to(q.dtype)"},
        "The log-sum-exp is rounded to the inputs' dtype before it is stored.",
        "softmax:bfloat16:normal:B1,H2,G1,M33,N65,D64,E64:return_lse:contiguous:1",
        slight=False,
    ),
)
