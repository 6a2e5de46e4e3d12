"""Mutants of the torch flash attention: special values, sums that go wrong, storage that is too narrow."""

from __future__ import annotations

from tests.quality.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_BASE = "attnproof.healthy_flash:tiled_attention"
_NUMERIC = ("certain", "probable-row", "probable-output", "bias")
_SPECIAL = (*_NUMERIC, "nonfinite", "empty-row")

_SHIFT = "shift = torch.where(m_new == -math.inf, 0.0, m_new)"
_SCORE = "(q @ t.k[:, :, columns.start : columns.stop].mT) * t.scale"
_TANH = "torch.tanh(s / t.softcap) * t.softcap"
_P = "p = torch.exp(s - shift[..., None])"


def _special(name: str, edits: dict[str, str], story: str, trigger: str, bug: str = "") -> Mutant:
    return Mutant(name, _BASE, tuple(edits.items()), "special-values", bug, story, trigger, _SPECIAL)


def _numerics(name: str, edits: dict[str, str], story: str, trigger: str, bug: str = "") -> Mutant:
    return Mutant(name, _BASE, tuple(edits.items()), "numerics", bug, story, trigger, _SPECIAL)


MUTANTS: tuple[Mutant, ...] = (
    _special(
        "torch_masked_maximum_subtracted",
        {_SHIFT: "shift = m_new"},
        "A row that has seen no key so far subtracts the maximum -inf from -inf.",
        "softmax:float16:normal:B1,H2,G1,M13,N8,D64,E64:causal:contiguous:1",
        "B03",
    ),
    _special(
        "torch_finite_first_maximum",
        {"m = q.new_full(q.shape[:3], -math.inf)": "m = q.new_full(q.shape[:3], -5000.0)"},
        "The running maximum starts at -5000 as if it were -inf: rows whose logits all lie below get 0.",
        "softmax:bfloat16:below-sentinel:B1,H2,G1,M17,N33,D64,E64:-:contiguous:1",
        "B06",
    ),
    _special(
        "torch_unseen_values_multiplied",
        {"clean = torch.where(finite, v, 0.0).float()": "clean = v.float()"},
        "NaN and inf in values that a row does not see are multiplied by 0.",
        "softmax:float16:unseen-nonfinite:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:1",
        "B21",
    ),
    _special(
        "torch_padding_joins_the_sum",
        {
            "l = l * alpha + p.sum(-1)": "l = l * alpha + p.sum(-1)\n"
            "        if t.band.right is None:\n"
            "            l = l + (_TILE_N - len(columns)) * torch.exp(-shift)"
        },
        "Without a causal mask the padding of the last key tile joins the normaliser with logits of 0.",
        "softmax:float32:zero-queries:B1,H1,G1,M3,N16,D64,E64:-:contiguous:1",
        "B16",
    ),
    _special(
        "torch_empty_row_has_finite_lse",
        {"lse = m + torch.log(total)": "lse = torch.where(l == 0, 0.0, m + torch.log(total))"},
        "The log-sum-exp of a row without keys is 0, so that a merge would count it.",
        "softmax:float16:normal:B1,H2,G1,M13,N8,D64,E64:causal,return_lse:contiguous:1",
        "B05",
    ),
    _special(
        "torch_masked_score_is_finite",
        {"torch.where(seen, s, -math.inf), seen": "torch.where(seen, s, -3e38), seen"},
        "Masked scores are -3e38: a row that sees no key averages the values instead of giving 0.",
        "softmax:bfloat16:normal:B1,H2,G1,M13,N8,D64,E64:causal:contiguous:1",
        "B20",
    ),
    _special(
        "torch_low_bias_is_a_mask",
        {"seen & (b != -math.inf)": "seen & (b > -1e4)"},
        "A bias below -10000 counts as masked, although rows that have nothing else must still have weights.",
        "softmax:float16:finite-sentinel:B1,H2,G1,M33,N17,D64,E64:bias=bhmn:contiguous:1",
        "B06",
    ),
    _special(
        "torch_lse_by_multiplying",
        {"lse = m + torch.log(total)": "lse = torch.log(total * torch.exp(m))"},
        "The log-sum-exp is taken of the sum times e^m, which overflows above 88 and is 0 below -104.",
        "softmax:float32:exp-overflow:B1,H1,G1,M17,N33,D64,E64:return_lse:contiguous:1",
    ),
    _special(
        "torch_poison_spreads_over_the_tile",
        {
            "poisoned = poisoned | touched.any(-1)": "poisoned = poisoned | touched.any(-1)"
            ".any(-1, keepdim=True)"
        },
        "One row of a tile that sees a NaN in V makes all rows of the tile NaN.",
        "softmax:float32:unseen-nonfinite:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:3",
        "B24",
    ),
    _numerics(
        "torch_sink_counted_twice",
        {
            "total = torch.where(l == 0, 1.0, l)": "total = torch.where(l == 0, 1.0, l)\n"
            "    if t.sinks is not None:\n"
            "        total = total + torch.exp(t.sinks[:, None] - m)"
        },
        "The sink enters the normaliser at the start and again at the end.",
        "softmax:float16:normal:B1,H2,G1,M17,N9,D16,E16:sinks:contiguous:1",
    ),
    _numerics(
        "torch_softcap_of_scores_times_scores",
        {_TANH: "torch.tanh(s / t.softcap) * s"},
        "The soft cap multiplies tanh by the score in place of the cap.",
        "softmax:bfloat16:normal:B1,H1,G1,M17,N33,D16,E16:softcap=30.0:contiguous:1",
        "B10",
    ),
    _numerics(
        "torch_softcap_after_the_bias",
        {
            "    if t.softcap is not None:\n        s = torch.tanh(s / t.softcap) * t.softcap\n": "",
            "    return torch.where(seen, s, -math.inf), seen": "    if t.softcap is not None:\n"
            "        s = torch.tanh(s / t.softcap) * t.softcap\n"
            "    return torch.where(seen, s, -math.inf), seen",
        },
        "The soft cap is applied to the score with its bias, not before the bias is added.",
        "softmax:float32:normal:B1,H1,G1,M17,N33,D16,E16:softcap=2.0,bias=bhmn:contiguous:1",
    ),
    _numerics(
        "torch_softcap_by_approximate_tanh",
        {_TANH: "torch.tanh(s / t.softcap).half().float() * t.softcap"},
        "tanh has 11 bits, as tanh.approx.f32 has, which the cap multiplies.",
        "softmax:float32:normal:B1,H2,G1,M33,N65,D64,E64:softcap=30.0:contiguous:1",
        "HW-1",
    ),
    _numerics(
        "torch_small_rises_not_rescaled",
        {"o = o * alpha[..., None]": "o = o * torch.where(m_new - m < 0.5, 1.0, alpha)[..., None]"},
        "Where the maximum rises by less than 1/2 the accumulator is not rescaled, but the sum is.",
        "softmax:float16:normal:B1,H2,G1,M33,N129,D64,E64:-:contiguous:1",
    ),
    _numerics(
        "torch_maximum_of_the_tile",
        {"m_new = torch.maximum(m, s.amax(-1))": "m_new = s.amax(-1)"},
        "Each tile shifts by its own maximum: the rescaling overflows where scores fall, and a tile that is "
        "masked throughout wipes out what came before.",
        "softmax:float32:descending:B1,H1,G1,M17,N512,D64,E64:-:contiguous:1",
    ),
    _numerics(
        "torch_epsilon_in_the_normaliser",
        {"total = torch.where(l == 0, 1.0, l)": "total = l + 2e-6"},
        "Division by zero is avoided by adding 2e-6 to every sum.",
        "softmax:float32:one-hot:B1,H1,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _numerics(
        "torch_half_products",
        {_SCORE: "(q @ t.k[:, :, columns.start : columns.stop].mT).half().float() * t.scale"},
        "q·k is stored in float16 before it is scaled: it loses digits, and overflows above 65504.",
        "softmax:bfloat16:score-overflow:B1,H1,G1,M17,N33,D64,E64:-:contiguous:1",
        "B60",
    ),
    _numerics(
        "torch_fused_scale_and_maximum",
        {
            _SCORE: "(q @ t.k[:, :, columns.start : columns.stop].mT).double() * t.scale",
            "s.amax(-1)": "s.amax(-1).float()",
            _P: "p = torch.exp(s - shift[..., None]).float()",
        },
        "The scaled score is subtracted unrounded from its rounded maximum: at scores of 1e11 the residual "
        "overflows exp.",
        "softmax:bfloat16:identical-huge:B1,H1,G1,M3,N17,D40,E16:-:contiguous:1",
        "B07",
    ),
    _numerics(
        "torch_scores_stored_narrow",
        {"where(seen, s, -math.inf), seen": "where(seen, s.to(t.stored).float(), -math.inf), seen"},
        "Scores are stored in the inputs' dtype before the softmax.",
        "softmax:bfloat16:offset-1e3:B1,H1,G1,M17,N33,D64,E64:-:contiguous:1",
    ),
    _numerics(
        "torch_tf32_queries",
        {"q=q.float(),": "q=(q.float().view(torch.int32) & -8192).view(torch.float32),"},
        "float32 queries are cut to the 10 bits of tf32 before the matmul; the contract says they are not.",
        "softmax:float32:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _numerics(
        "torch_small_weights_dropped",
        {_P: f"{_P}\n        p = torch.where(p < 2.0**-8, 0.0, p)"},
        "Weights below 1/256 of the largest are dropped to save work.",
        "softmax:float16:normal:B1,H1,G1,M33,N197,D64,E64:-:contiguous:1",
    ),
    _numerics(
        "torch_exponent_clamped",
        {_P: "p = torch.exp((s - shift[..., None]).clamp(min=-12.0))"},
        "The argument of exp is kept above -12 against underflow, which gives masked keys a weight.",
        "softmax:float32:normal:B1,H1,G1,M33,N33,D64,E64:causal:contiguous:1",
    ),
)
