"""Mutants of softmax attention's backward pass in addresses, in atomic sums and in storage narrower than
declared.
"""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import ATOMIC, BACKWARD, FAULT, GRADIENTS, NUMERIC, SOFTMAX, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, module=BACKWARD, mechanism="gradient", bug="", shows=NUMERIC)
_inaccurate = partial(
    Mutant, base=WHOLE, module=BACKWARD, mechanism="accuracy", bug="", shows=NUMERIC, accuracy_only=True
)

_ROWS = "tl.store(p_scale + o_row, tl.where(b_max == -INF, 0.0, 1.0 / b_total), mask=m_q)"
_DP = "b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)"
_DQ_SUM = "b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION) * b_factor"
_DK_SUM = "b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION) * b_factor"

MUTANTS = (
    _mutant(
        name="triton_backward_cotangent_assumed_contiguous",
        module=GRADIENTS,
        edits=(('(do, "bhme")', '(saved.o, "bhme")'),),
        bug="B56",
        story="The cotangent is read by the strides of the output.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N33,D16,E16:cotangents=normal:transposed:1",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _mutant(
        name="triton_backward_cotangent_in_the_other_layout",
        module=GRADIENTS,
        edits=(('(do, "bhme")', '(do, "bmhe")'), ('"bhme": "o"', '"bmhe": "o"')),
        bug="B12",
        story="The strides of heads and rows of the cotangent are swapped.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N33,D16,E16:cotangents=normal:transposed:2",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _mutant(
        name="triton_backward_delta_assumes_contiguous",
        module=GRADIENTS,
        edits=(("delta, parts, *do.stride(),", "delta, parts, *saved.o.stride(),"),),
        bug="B56",
        story="Δ reads the cotangent by the strides of the output.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N33,D16,E16:cotangents=normal:transposed:3",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _mutant(
        name="triton_backward_lse_cotangent_assumed_contiguous",
        module=GRADIENTS,
        edits=(
            (
                "*((0, 0, 0) if dlse is None else dlse.stride())",
                "*((0, 0, 0) if dlse is None else delta.stride())",
            ),
        ),
        bug="B56",
        story="The cotangent of the log-sum-exp is read as if it were contiguous.",
        trigger="softmax:float16:normal:B2,H2,G1,M17,N33,D16,E16:return_lse,cotangents=normal:sliced:4",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _mutant(
        name="triton_backward_atomic_part_unscaled",
        base=ATOMIC,
        edits=(("* (b_factor * scale)", "* b_factor"),),
        story="The parts of dQ that are added atomically lack the scale.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:5",
    ),
    _mutant(
        name="triton_backward_atomic_sums_not_cleared",
        base=ATOMIC,
        module=GRADIENTS,
        edits=(
            (
                "sums = torch.zeros(q.shape, dtype=torch.float32",
                "sums = torch.empty(q.shape, dtype=torch.float32",
            ),
        ),
        story="The memory in which dQ is summed is not cleared.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:6",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_backward_sums_not_atomic",
        base=ATOMIC,
        mechanism="race",
        edits=(
            (
                'tl.atomic_add(p_dq + o_dq, b_dq, mask=m_m[:, None] & (o_d < D)[None, :], sem="relaxed")',
                "tl.store(p_dq + o_dq, b_dq, mask=m_m[:, None] & (o_d < D)[None, :])",
            ),
        ),
        story="The last tile of keys that writes dQ wins: parts are stored, not added.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N65,D16,E16:cotangents=normal:contiguous:7",
        shows=(*NUMERIC, "determinism"),
    ),
    _mutant(
        name="triton_backward_dp_in_bfloat16",
        edits=(
            (
                _DP,
                f"{_DP}.to(tl.bfloat16).to(tl.float32)",
            ),
        ),
        bug="B64",
        story="dP is rounded to bfloat16 before Δ is subtracted, in every dtype.",
        trigger="softmax:float32:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:8",
    ),
    _inaccurate(
        name="triton_backward_row_scale_in_bfloat16",
        module=SOFTMAX,
        edits=(
            (
                _ROWS,
                _ROWS.replace("1.0 / b_total", "(1.0 / b_total).to(tl.bfloat16).to(tl.float32)"),
            ),
        ),
        story="The normaliser of a row is kept for the backward pass in bfloat16, in every dtype.",
        trigger="softmax:float16:normal:B1,H2,G1,M65,N65,D32,E32:cotangents=normal:contiguous:9",
    ),
    _mutant(
        name="triton_backward_row_maximum_narrow",
        module=SOFTMAX,
        edits=(
            (
                "tl.where(b_max == -INF, 0.0, b_max), mask=m_q)",
                "tl.where(b_max == -INF, 0.0, b_max.to(p_q.dtype.element_ty).to(tl.float32)), mask=m_q)",
            ),
        ),
        story="The maximum of a row is kept for the backward pass in the inputs' dtype.",
        trigger="softmax:bfloat16:large-logits:B1,H1,G1,M17,N33,D32,E32:cotangents=normal:contiguous:10",
    ),
    _inaccurate(
        name="triton_backward_weights_in_bfloat16",
        edits=(
            (
                "b_dv = tl.dot((b_p * P_UP).to(b_do.dtype), b_do",
                "b_dv = tl.dot((b_p * P_UP).to(tl.bfloat16).to(b_do.dtype), b_do",
            ),
        ),
        story="P is rounded to bfloat16 for dV, in every dtype.",
        trigger="softmax:float16:normal:B1,H2,G1,M65,N65,D32,E32:cotangents=normal:contiguous:11",
    ),
    _inaccurate(
        name="triton_backward_score_gradients_in_bfloat16",
        edits=(("return b_ds.to(dtype), b_factor", "return b_ds.to(tl.bfloat16).to(dtype), b_factor"),),
        story="dS is rounded to bfloat16, in every dtype.",
        trigger="softmax:float16:normal:B1,H2,G1,M65,N65,D32,E32:cotangents=normal:contiguous:12",
    ),
    _inaccurate(
        name="triton_backward_queries_summed_narrow",
        edits=((_DQ_SUM, f"{_DQ_SUM}\n            b_dq = b_dq.to(b_k.dtype).to(tl.float32)"),),
        story="dQ is rounded to the inputs' dtype after each tile of keys.",
        trigger="softmax:bfloat16:normal:B1,H1,G1,M33,N300,D32,E32:cotangents=normal:contiguous:13",
    ),
    _inaccurate(
        name="triton_backward_keys_summed_narrow",
        edits=((_DK_SUM, f"{_DK_SUM}\n                b_dk = b_dk.to(b_q.dtype).to(tl.float32)"),),
        story="dK is rounded to the inputs' dtype after each tile of queries.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M160,N33,D32,E32:cotangents=normal:contiguous:14",
    ),
    _mutant(
        name="triton_backward_products_in_tf32",
        mechanism="accuracy",
        module=GRADIENTS,
        edits=(('"PRECISION": call.input_precision,', '"PRECISION": "tf32",'),),
        story="The backward pass rounds the operands of float32 matmuls to tf32, where ieee is declared.",
        trigger="softmax:float32:normal:B1,H1,G1,M33,N33,D32,E32:cotangents=normal:contiguous:15",
    ),
)
