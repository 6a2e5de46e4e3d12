"""Small wrong kernels as modules in a folder, and a probe that judges calls of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from attnproof.interface import make_subject
from attnproof.properties.case import Case, Inputs
from attnproof.trials import JudgedCall, Subject, judge_call
from attnproof.workers import WorkerPool

OPTIONS = ("causal", "window", "softcap", "bias", "sinks", "return_lse")

RIGHT = '''
import math

import torch

def attention(
    q, k, v, *, scale, causal=False, window=None, softcap=None, bias=None, sinks=None, return_lse=False
):
    """A right kernel for every option but packing; computes in float64."""
    h, g, m, n = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(h // g, 1).double(), v.repeat_interleave(h // g, 1).double()
    s = q.double() @ k.mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    i, j = torch.arange(m)[:, None] + n - m, torch.arange(n)[None, :]
    seen = torch.ones(m, n, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        left, right = window
        seen &= torch.ones_like(seen) if left is None else j >= i - left
        seen &= torch.ones_like(seen) if right is None else j <= i + right
    s = s.masked_fill(~seen, -torch.inf)
    zero = s.new_full((*s.shape[:-1], 1), -torch.inf)
    extra = zero if sinks is None else sinks.double().reshape(1, -1, 1, 1).expand(zero.shape)
    lse = torch.logsumexp(torch.cat([s, extra], -1), -1, keepdim=True)
    p = torch.softmax(torch.cat([s, extra], -1), -1)[..., :-1].nan_to_num()
    o = (p @ v).to(q.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (o, lse.squeeze(-1).to(wide)) if return_lse else o
'''

PADDED = """zero = zero if n % 16 == 0 else torch.full_like(zero, math.log(-n % 16))
    extra = zero if sinks is None else"""
BUGS = {
    "causal": [("seen &= j <= i\n", "seen &= j < i\n")],
    "padding": [("extra = zero if sinks is None else", PADDED)],
    "scale": [("@ k.mT * scale", "@ k.mT * (scale * 1.01)")],
    "groups": [("k.repeat_interleave(h // g, 1)", "k.repeat(1, h // g, 1, 1)")],
    "truncated": [
        (
            "o = (p @ v).to(q.dtype)",
            "o = (p @ v).float().view(torch.int32).bitwise_and(-65536 * 8).view(torch.float32).to(q.dtype)",
        )
    ],
    "mutation": [("    h, g, m, n =", "    q *= scale\n    scale = 1.0\n    h, g, m, n =")],
    "tail": [("    i, j =", "    s[..., 64:] += 0.25\n    i, j =")],
    "exception": [("    i, j =", "    assert n < 40, f'{n} keys do not fit'\n    i, j =")],
}
MEMO = (
    RIGHT
    + """
_right, _memo = attention, {}

def attention(q, *rest, **options):
    key = tuple(q.shape)
    if key not in _memo:
        _memo[key] = _right(q, *rest, **options)
    return _memo[key].clone()
"""
)


def written(folder: Path, name: str, *, memo: bool = False) -> str:
    """The module of a bug ("right" for none); its target."""
    text = MEMO if memo else RIGHT
    for old, new in BUGS.get(name, ()):
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the kernel"
        text = text.replace(old, new)
    (folder / f"kernel_{name}.py").write_text(textwrap.dedent(text))
    return f"kernel_{name}:attention"


def subject_of(target: str, options: Sequence[str] = OPTIONS) -> Subject:
    return make_subject(target, "softmax", ("float32", "float16", "bfloat16"), options, None, "cpu", {})


class CountingProbe:
    """A probe of calls in this process, or, with ``isolated``, in workers."""

    def __init__(self, subject: Subject, *, isolated: bool = False) -> None:
        self.subject, self.isolated, self.calls = subject, isolated, 0
        self.pool = self._new()

    def _new(self) -> WorkerPool:
        return WorkerPool(jobs=1, spares=0, isolation="process" if self.isolated else "none")

    def __call__(
        self,
        case: Case,
        inputs: Inputs | None = None,
        *,
        history: Sequence[Case] = (),
        fresh: bool = False,
        repeat: bool | None = None,
    ) -> JudgedCall:
        self.calls += 1
        if (fresh or history) and self.isolated:
            with self._new() as pool:
                for earlier in history:
                    judge_call(self.subject, earlier, pool.call)
                return judge_call(self.subject, case, pool.call, inputs, repeat=repeat)
        return judge_call(self.subject, case, self.pool.call, inputs, repeat=repeat)
