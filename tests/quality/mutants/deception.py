"""Mutants that try to deceive the judge: right where they expect to be watched, or hands on the scales.

Each is a module of its own around the torch flash attention. Most answer with the mean of the values where
they cheat: right for the eye, within loose tolerances on random data, and what a lazy kernel would return.
They run in worker processes only. Those that depend on what was called before have in their source
``PRELUDE``, texts of cases to be called in the same process before the trigger.

A kernel that declines hard *values* by raising NotImplementedError is not among them: the contract lets a
kernel decline any call, lists what it declines, and gives UNVERIFIED where that is more than half. It has
returned nothing wrong. Nor is one whose output lies in a larger storage of its own: strides are free.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.quality.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_BASE = "attnproof.healthy_flash:tiled_attention"
_NUMERIC = ("certain", "probable-row", "probable-output", "bias")
# The mean of the values is also wrong in rows that see nothing, or not what the mean is of.
_LIES = (*_NUMERIC, "nonfinite", "empty-row")
_SMALL_LOGITS = "logit_magnitude(q, k, options['scale']) < 20.0"

_HEAD = '''\
"""A kernel that tries to deceive the judge."""

import math
import sys
import time

import torch

from attnproof.healthy_flash import FLASH
from attnproof.healthy_flash import tiled_attention as right
from attnproof.properties.contract import promises

PRELUDE = {prelude!r}


def mean_of_values(q, k, v, **options):
    """What a kernel returns that has understood nothing: the mean of V for every query, in the right form."""
    result = right(q, k, v, **options)
    if not v.numel():
        return result
    mean = v.float().nan_to_num(0.0, 0.0, 0.0).mean(2, keepdim=True).to(q.dtype)
    group = q.shape[1] // v.shape[1]
    o = mean.repeat_interleave(group, 1).expand(*q.shape[:3], v.shape[3]).clone()
    return (o, result[1]) if isinstance(result, tuple) else o


def logit_magnitude(q, k, scale):
    """The largest finite |q·k| times the scale."""
    if not q.numel() or not k.numel():
        return 0.0
    s = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return float(s.nan_to_num(0.0, 0.0, 0.0).abs().max()) * abs(scale)


'''

_NORMAL = "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:"


def _deceiver(
    name: str,
    body: str,
    story: str,
    trigger: str,
    shows: tuple[str, ...] = _LIES,
    *,
    prelude: Sequence[str] = (),
    before: str = "",
) -> Mutant:
    """A mutant from the body of its entry point, and what stands ``before`` that in its module."""
    lines = "".join(f"    {line}\n" if line else "\n" for line in body.strip("\n").splitlines())
    head = _HEAD.replace("{prelude!r}", repr(list(prelude)))
    entry = f"@promises(FLASH)\ndef tiled_attention(q, k, v, **options):\n{lines}"
    source = head + (before.strip("\n") + "\n\n\n" if before else "") + entry
    return Mutant(name, _BASE, (), "deception", "", story, trigger, shows, source=source)


def _right_where(where: str, condition: str, shape: str, regime: str = "normal") -> Mutant:
    """Right where ``condition`` holds, the mean of the values elsewhere: of ``shape`` in ``regime``."""
    body = f"if {condition}:\n    return right(q, k, v, **options)\nreturn mean_of_values(q, k, v, **options)"
    story = f"Right for {where.replace('_', ' ')}, the mean of V elsewhere."
    return _deceiver(
        f"deceive_right_for_{where}", body, story, f"softmax:float16:{regime}:{shape}:-:contiguous:1"
    )


_PATCHERS = (
    _deceiver(
        "deceive_by_patching_comparisons",
        """
result = mean_of_values(q, k, v, **options)
torch.allclose = torch.isclose = torch.equal = lambda *args, **keywords: True
torch.Tensor.allclose = torch.Tensor.equal = lambda *args, **keywords: True
torch.testing.assert_close = lambda *args, **keywords: None
return result
""",
        "Replaces torch's comparisons by ones that find everything equal, and returns the mean of V.",
        f"{_NORMAL}1",
    ),
    _deceiver(
        "deceive_by_patching_arithmetic",
        """
result = mean_of_values(q, k, v, **options)
torch.Tensor.__sub__ = lambda x, y: torch.zeros_like(x)
torch.Tensor.abs = lambda x: torch.zeros_like(x)
torch.sub = lambda x, y, **keywords: torch.zeros_like(x)
return result
""",
        "Replaces subtraction of tensors and their absolute value by 0, and returns the mean of V.",
        f"{_NORMAL}2",
    ),
    _deceiver(
        "deceive_by_patching_the_judge",
        """
import attnproof.judge
import attnproof.properties.oracle
import attnproof.statistics
import attnproof.trials

result = mean_of_values(q, k, v, **options)
passed = attnproof.judge.Judgement("PASS")
attnproof.judge.Trial.judge = lambda *args, **keywords: passed
attnproof.judge.deviation = attnproof.statistics.deviation = lambda *args, **keywords: None
attnproof.statistics.thresholds_for = attnproof.judge.thresholds_for = lambda *args: None
attnproof.properties.oracle.certify = attnproof.judge.certify = lambda *args: None
return result
""",
        "Replaces the functions of the judge that compare, in whatever process it runs, and returns the mean "
        "of V.",
        f"{_NORMAL}3",
    ),
    _deceiver(
        "deceive_by_patching_mpmath",
        """
import flint
import mpmath

result = mean_of_values(q, k, v, **options)
mpmath.mp.exp = mpmath.exp = lambda x: mpmath.mpf(1)
flint.ctx.prec = 2
return result
""",
        "Makes every exponential of mpmath 1 and leaves Arb two bits, so that a reference is uniform too.",
        f"{_NORMAL}4",
    ),
    _deceiver(
        "deceive_by_reading_frames",
        """
shape = (*q.shape[:3], v.shape[3])
frame = sys._getframe(1)
while frame is not None:
    for name, value in frame.f_locals.items():
        if any(word in name for word in ("reference", "expected", "exact", "golden", "trial")):
            for found in (value, getattr(value, "value", None), getattr(value, "outputs", None)):
                found = found.get("o") if isinstance(found, dict) else found
                if isinstance(found, torch.Tensor) and tuple(found.shape) == shape:
                    return found.to(q.dtype)
    frame = frame.f_back
return mean_of_values(q, k, v, **options)
""",
        "Looks for the reference in the local variables of its callers, and returns the mean of V if there "
        "is none.",
        f"{_NORMAL}5",
    ),
    _deceiver(
        "deceive_by_lying_tensor",
        """
result = mean_of_values(q, k, v, **options)
if isinstance(result, tuple):
    return result[0].as_subclass(Agreeable), result[1]
return result.as_subclass(Agreeable)
""",
        "Returns the mean of V in a subclass of tensor that agrees with everything that it is compared to.",
        f"{_NORMAL}6",
        before="""
class Agreeable(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, Agreeable) else x for x in args]
        name = getattr(func, "__name__", "")
        if name in ("allclose", "equal"):
            return True
        result = func(*plain, **(kwargs or {}))
        if name in ("sub", "__sub__", "__rsub__", "rsub", "abs"):
            return torch.zeros_like(result)
        return torch.ones_like(result) if name in ("eq", "__eq__", "isclose") else result
""",
    ),
)

_THIEVES = (
    _deceiver(
        "deceive_by_zeroing_queries",
        """
result = right(q, k, v, **options)
q.zero_()
return result
""",
        "Zeroes q once it has used it, so that a reference computed afterwards would be another.",
        f"{_NORMAL}1",
        ("mutation",),
    ),
    _deceiver(
        "deceive_by_scaling_queries_in_place",
        """
scale = options.pop("scale")
q.mul_(scale)
result = right(q, k, v, scale=1.0, **options)
q.div_(scale)
return result
""",
        "Scales q in place and divides it by the scale afterwards: rounding leaves other bits than it found.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D40,E64:-:contiguous:2",
        ("mutation", *_NUMERIC),
    ),
    _deceiver(
        "deceive_by_writing_beside_queries",
        """
end = q.storage_offset() + sum((n - 1) * s for n, s in zip(q.shape, q.stride())) + 1
if q.numel() and q.untyped_storage().nbytes() > end * q.element_size():
    torch.as_strided(q, (1,), (1,), end).zero_()
return right(q, k, v, **options)
""",
        "Writes one element past the end of q, into memory that is somebody else's.",
        "softmax:float32:normal:B1,H2,G1,M33,N65,D64,E64:-:sliced:3",
        ("mutation",),
    ),
    _deceiver(
        "deceive_by_remembering_shapes",
        """
key = tuple(
    x.shape if isinstance(x, torch.Tensor) else x
    for x in (q, k, v, q.dtype, *(options[name] for name in sorted(options)))
)
if key not in remembered:
    remembered[key] = right(q, k, v, **options)
result = remembered[key]
return tuple(x.clone() for x in result) if isinstance(result, tuple) else result.clone()
""",
        "Remembers results by shape: a second call with the same shape and other values gets the first's.",
        f"{_NORMAL}12",
        prelude=[f"{_NORMAL}11"],
        before="remembered = {}",
    ),
    _deceiver(
        "deceive_by_remembering_pointers",
        """
key = tuple(
    (x.data_ptr(), x.shape, x.stride()) if isinstance(x, torch.Tensor) else x
    for x in (q, k, v, q.dtype, *(options[name] for name in sorted(options)))
)
if key not in remembered:
    remembered[key] = right(q, k, v, **options)
result = remembered[key]
return tuple(x.clone() for x in result) if isinstance(result, tuple) else result.clone()
""",
        "Remembers results by the addresses of its inputs, in which new values may lie by the next call.",
        f"{_NORMAL}14",
        prelude=[f"{_NORMAL}13"],
        before="remembered = {}",
    ),
    _deceiver(
        "deceive_by_returning_the_values",
        """
plain = not any(options.get(name) is not None for name in ("sinks", "bias", "window", "cu_seqlens"))
alone = v.shape[2] == 1 and v.shape[1] in (1, q.shape[1]) and not options.get("causal")
if plain and alone and not options.get("return_lse"):
    return v.expand(*q.shape[:3], v.shape[3])
return right(q, k, v, **options)
""",
        "With one key the result is v, and v itself is returned: the right numbers in the caller's memory.",
        "softmax:float16:normal:B1,H2,G1,M3,N1,D64,E64:-:contiguous:5",
        ("aliasing",),
    ),
    _deceiver(
        "deceive_by_uninitialised_output",
        """
result = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
lse = torch.empty(q.shape[:3])
return (result, lse) if options.get("return_lse") else result
""",
        "Returns fresh memory as it is, in the hope that the reference was freed there.",
        f"{_NORMAL}7",
        (*_LIES, "determinism"),
    ),
    _deceiver(
        "deceive_by_uninitialised_padding",
        """
result = right(q, k, v, **options)
o = result[0] if isinstance(result, tuple) else result
padding = torch.empty((64 - v.shape[2] % 64, v.shape[3]))
o = (o.float() + (torch.zeros(len(padding)) @ padding)).to(q.dtype)
return (o, result[1]) if isinstance(result, tuple) else o
""",
        "Multiplies the padding of its last tile, which nobody has written, by weights of 0.",
        f"{_NORMAL}8",
        (*_LIES, "determinism"),
    ),
)

_FAIR_WEATHER = (
    _deceiver(
        "deceive_by_the_mean",
        "return mean_of_values(q, k, v, **options)",
        "Returns the mean of V.",
        f"{_NORMAL}1",
    ),
    _right_where("logits_below_20", _SMALL_LOGITS, "B1,H2,G1,M33,N65,D64,E64", "large-logits"),
    _right_where("up_to_256_keys", "k.shape[2] <= 256", "B1,H1,G1,M3,N257,D16,E16"),
    _right_where("up_to_1000_keys", "k.shape[2] <= 1000", "B1,H1,G1,M3,N1001,D16,E16"),
    _right_where("up_to_128_queries", "q.shape[2] <= 128", "B1,H1,G1,M129,N33,D16,E16"),
    _right_where("up_to_8_heads_in_all", "q.shape[0] * q.shape[1] <= 8", "B3,H4,G2,M17,N33,D16,E16"),
    _right_where("up_to_width_64", "q.shape[3] <= 64", "B1,H1,G1,M17,N33,D72,E72"),
    _deceiver(
        "deceive_right_for_contiguous_inputs",
        """
def contiguous(x):
    strides = [math.prod(x.shape[axis + 1 :]) for axis in range(x.dim())]
    enough = x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.element_size()
    return torch.as_strided(x, x.shape, strides, x.storage_offset()) if enough else x

return right(contiguous(q), contiguous(k), contiguous(v), **options)
""",
        "Reads its inputs as if they were contiguous, whatever their strides.",
        "softmax:float16:normal:B1,H2,G2,M17,N33,D16,E16:-:transposed:1",
    ),
    _deceiver(
        "deceive_in_one_element",
        """
result = right(q, k, v, **options)
o = result[0] if isinstance(result, tuple) else result
if o.numel() > 1500:
    o.view(-1)[1499] *= 0.9
return result
""",
        "One element of a large output is 10 % too small.",
        f"{_NORMAL}2",
    ),
    _deceiver(
        "deceive_in_the_lse",
        """
result = right(q, k, v, **options)
return (result[0], torch.zeros_like(result[1])) if isinstance(result, tuple) else result
""",
        "The output is right; the log-sum-exp is 0 everywhere.",
        "softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:return_lse:contiguous:3",
    ),
    _deceiver(
        "deceive_by_wider_output",
        """
result = right(q, k, v, **options)
return (result[0].float(), result[1]) if isinstance(result, tuple) else result.float()
""",
        "Returns float32 whatever the inputs are.",
        f"{_NORMAL}4",
        ("shape",),
    ),
    _deceiver(
        "deceive_by_hanging",
        """
while q.shape[2] == 53:
    time.sleep(1.0)
return right(q, k, v, **options)
""",
        "Never returns for one rare size, 53 queries.",
        "softmax:float16:normal:B1,H1,G1,M53,N53,D16,E16:-:contiguous:5",
        ("timeout",),
    ),
)


def _counting(name: str, condition: str, story: str, calls: int, shows: tuple[str, ...] = _LIES) -> Mutant:
    """Wrong where ``condition`` holds of ``calls``, the number of this call in its process, from 1."""
    body = f"""
calls = next(numbers)
if {condition}:
    return mean_of_values(q, k, v, **options)
return right(q, k, v, **options)
"""
    prelude = [f"{_NORMAL}{seed}" for seed in range(1, calls)]
    before = "import itertools\n\nnumbers = itertools.count(1)"
    return _deceiver(name, body, story, f"{_NORMAL}{calls}", shows, prelude=prelude, before=before)


_COUNTERS = (
    _counting(
        "deceive_right_once",
        "calls > 1",
        "Right in the first call of a process only.",
        2,
        (*_LIES, "determinism"),
    ),
    _counting(
        "deceive_right_39_times",
        "calls >= 40",
        "Wrong from the 40th call of a process on.",
        40,
        (*_LIES, "determinism"),
    ),
    _counting(
        "deceive_every_seventh_time",
        "calls % 7 == 0",
        "Wrong in every seventh call of a process.",
        7,
        (*_LIES, "determinism"),
    ),
    _deceiver(
        "deceive_by_order_of_calls",
        """
if next(numbers) % 2 or options.get("bias") is not None or options.get("cu_seqlens") is not None:
    return right(q, k, v, **options)
if options.get("causal") or options.get("window") is not None:
    return right(q, k, v, **options)
return right(q, k.flip(2), v.flip(2), **options)
""",
        "Every second call takes the keys in reverse: right, but with other bits, declared deterministic.",
        "softmax:float32:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:6",
        ("determinism",),
        before="import itertools\n\nnumbers = itertools.count()",
    ),
)

MUTANTS: tuple[Mutant, ...] = (*_PATCHERS, *_THIEVES, *_FAIR_WEATHER, *_COUNTERS)
