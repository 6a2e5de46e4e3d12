"""The fixed parts of a script: plain Python that needs torch alone. Names between @ signs are put in."""

from __future__ import annotations

__all__ = [
    "ALIASING",
    "CALLING",
    "CANONICAL",
    "DETERMINISM",
    "DIFFERENTIATING",
    "ELEMENTS",
    "EMULATED",
    "LAID_OUT",
    "LOAD",
    "LOAD_PICKLED",
    "MAIN",
    "MAIN_CONTAINED",
    "MODULES",
    "MOVED",
    "MUTATION",
    "PLAIN",
    "PREAMBLE",
    "STATISTICS",
    "UNPACKED",
]

MODULES = (
    "base64",
    "contextlib",
    "importlib",
    "math",
    "os",
    "pickle",
    "resource",
    "subprocess",
    "sys",
    "tempfile",
    "traceback",
    "zlib",
)
"""Modules of the standard library that parts use; a script imports those that its own parts do."""

PREAMBLE = """
import torch

nan, inf = math.nan, math.inf
torch.set_num_threads(1)
# The kernel's module is looked for in the current folder, on PYTHONPATH and among installed packages.
sys.path.insert(0, os.getcwd())
"""

PLAIN = """
DEVICE = @DEVICE@
PLACE = contextlib.nullcontext()
"""

EMULATED = """
DEVICE, PLACE = "cpu", None
if torch.cuda.is_available():
    DEVICE, PLACE = "cuda", contextlib.nullcontext()
else:
    try:
        from attnproof import emulate

        PLACE = emulate(@DEVICE@)
    except ImportError:
        print("a Triton kernel needs a GPU, or attnproof (pip install attnproof) to emulate one")
        raise SystemExit(2)
"""

LOAD = '''
def load(target):
    """The callable that "module:attribute" names."""
    module, _, attribute = target.partition(":")
    found = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found
'''

LOAD_PICKLED = '''
def load(target):
    """The callable that cloudpickle packed."""
    return pickle.loads(zlib.decompress(base64.b85decode(target)))
'''

UNPACKED = '''
def unpacked(dtype, shape, text):
    """A dense tensor from its compressed bytes."""
    raw = bytearray(zlib.decompress(base64.b85decode(text)))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.zeros(shape, dtype=dtype)
'''

LAID_OUT = '''
def laid_out(values, strides, offset, size):
    """The same values in a storage of ``size`` elements, NaN around them, with these strides."""
    around = torch.full((size,), nan if values.dtype.is_floating_point else 0, dtype=values.dtype)
    core = values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    around.as_strided(core.shape, strides, offset).copy_(core)
    return around.as_strided(values.shape, strides, offset)
'''

MOVED = '''
def moved(value):
    """A tensor, or a tuple of them, on the device, strides kept."""
    if isinstance(value, tuple):
        return tuple(moved(item) for item in value)
    if not isinstance(value, torch.Tensor) or DEVICE == "cpu":
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return storage.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())


def tensors_in(values):
    """The tensors among values, those in tuples included."""
    held = [item for v in values for item in (v if isinstance(v, tuple) else (v,))]
    return [item for item in held if isinstance(item, torch.Tensor)]


def storage_bits(tensor):
    """All bytes of the memory behind a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
'''

CALLING = '''
def call(kernel, build):
    """Make one call: the outputs as they came, and the tensors that went in."""
    arguments, keywords, _ = build()
    arguments = [moved(value) for value in arguments]
    keywords = {name: moved(value) for name, value in keywords.items()}
    tensors = tensors_in((*arguments, *keywords.values()))
    before = [storage_bits(tensor).clone() for tensor in tensors]
    return kernel(*arguments, **keywords), tensors, before
'''

DIFFERENTIATING = '''
def call(kernel, build):
    """Make one call: the outputs as they came, and the tensors that went in.

    Gradients of the sum of outputs times cotangents follow the outputs where they are asked for.
    """
    arguments, keywords, cotangents = build()
    arguments = [moved(value) for value in arguments]
    keywords = {name: moved(value) for name, value in keywords.items()}
    tensors = tensors_in((*arguments, *keywords.values()))
    before = [storage_bits(tensor).clone() for tensor in tensors]
    leaves = [tensors[number].requires_grad_() for number in DIFFERENTIATED]
    returned = kernel(*arguments, **keywords)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    pairs = [(o, moved(c)) for o, c in zip(outputs, cotangents) if c is not None and o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs])
    return (*outputs, *gradients), tensors, before
'''

CANONICAL = '''
def canonical(returned):
    """The outputs in layout (B, H, M, …) on the CPU, and what is wrong with their form."""
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    if len(outputs) != len(OUTPUTS) or not all(isinstance(x, torch.Tensor) for x in outputs):
        asked = ", ".join(name for name, _, _ in OUTPUTS)
        return [], f"returned {type(returned).__name__} of {len(outputs)}; asked: {asked}"
    if isinstance(returned, list) or isinstance(returned, tuple) != (len(OUTPUTS) > 1):
        return [], f"returned a {type(returned).__name__}; one output is returned as it is, two as a tuple"
    found = []
    for (name, shape, dtype), output in zip(OUTPUTS, outputs):
        if name in SWAPPED and output.dim() >= 3:
            output = output.transpose(1, 2)
        if tuple(output.shape) != shape or output.dtype != dtype:
            return [], f"{name} is {tuple(output.shape)} {output.dtype}; asked: {shape} {dtype}"
        found.append(output.detach().cpu())
    return found, ""
'''

ELEMENTS = """
# Number of the output, place, exact value, and how far a right kernel can be from it (the certified
# value's own radius and the worst rounding of the declared precision). Of a bound of 0 the very value is
# asked, NaN included.
ELEMENTS = [
@ELEMENTS@
]


def wrong_elements(kernel, returned, outputs, tensors, before):
    for number, place, exact, bound in ELEMENTS:
        got = float(outputs[number][place])
        right = abs(got - exact) <= bound or got == exact or (math.isnan(got) and math.isnan(exact))
        words = f"{OUTPUTS[number][0]}[{', '.join(map(str, place))}] = {got!r}"
        print(f"{words}; exact {exact!r}, allowed error {bound:.3g}")
        if not right:
            yield f"{words} is not within {bound:.3g} of {exact!r}"
"""

STATISTICS = """
EXACT = @EXACT@
# What a right kernel's rounding errors add up to by their random signs; inf where nothing is compared.
PROBABLE = @PROBABLE@


def wrong_statistics(kernel, returned, outputs, tensors, before):
    got = outputs[@NUMBER@][@PLACE@].double()
    use = PROBABLE.isfinite()
    sign = torch.where(EXACT < 0, -1.0, 1.0)
    ratio = ((got - EXACT) * sign / PROBABLE)[use]
    found = {"rms": float(ratio.square().mean().sqrt()), "mean": abs(float(ratio.mean()))}[@STATISTIC@]
    print(f"{@STATISTIC@} of error/probable error: {found:.4g}, right kernels stay below", @LIMIT@)
    if not found <= @LIMIT@:
        yield f"the {@STATISTIC@} of error over probable error is {found:.4g}"
"""

MUTATION = """
def changed_inputs(kernel, returned, outputs, tensors, before):
    for number, (tensor, old) in enumerate(zip(tensors, before)):
        if not torch.equal(storage_bits(tensor), old):
            yield f"the call changed the memory of its tensor argument {number}"
"""

ALIASING = """
def shared_memory(kernel, returned, outputs, tensors, before):
    owners = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for output in returned if isinstance(returned, tuple) else (returned,):
        owner = output.untyped_storage().data_ptr()
        if output.numel() and owner in owners:
            yield "an output lies in the memory of an input or of another output"
        owners.add(owner)
"""

DETERMINISM = """
def other_bits(kernel, returned, outputs, tensors, before):
    for _ in range(10):
        again, _ = canonical(call(kernel, inputs)[0])
        for (name, _, _), first, second in zip(OUTPUTS, outputs, again):
            first, second = (torch.empty(x.shape, dtype=x.dtype).copy_(x) for x in (first, second))
            if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
                yield f"{name} has other bits in another call with the same values"
                return
"""

_RUN = '''
def run():
    """Complaints about the call."""
    try:
        kernel = load(TARGET)
    except ModuleNotFoundError as error:
        print(f"{error}: run this where the kernel's module can be imported, or add its folder to PYTHONPATH")
        raise SystemExit(2)
    with PLACE:
        try:
            for earlier in HISTORY:
                call(kernel, earlier)
            returned, tensors, before = call(kernel, inputs)
        except NotImplementedError as error:
            print(f"the kernel declines this call: {error}")
            raise SystemExit(2)
        except BaseException:
            traceback.print_exc()
            return ["the kernel raised"]
        outputs, complaint = canonical(returned)
        if complaint:
            return [complaint]
        return [words for check in CHECKS for words in check(kernel, returned, outputs, tensors, before)]


def report(complaints):
    for words in complaints:
        print("WRONG:", words)
    print("still wrong" if complaints else "right")
    raise SystemExit(1 if complaints else 0)
'''

MAIN = (
    _RUN
    + """

if __name__ == "__main__":
    report(run())
"""
)

MAIN_CONTAINED = (
    _RUN
    + '''

# A call may take so many seconds, bytes of text and bytes of memory beyond the interpreter's own.
SECONDS, FLOOD, MEMORY = @SECONDS@, @FLOOD@, @MEMORY@


def contained():
    """The call in a child process, which may die, hang or write without end."""
    with tempfile.TemporaryFile() as text:
        child = subprocess.Popen([sys.executable, __file__, "--call"], stdout=text, stderr=subprocess.STDOUT)
        try:
            status = child.wait(SECONDS + 60.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return [f"no answer within {SECONDS} seconds"]
        size = text.seek(0, 2)
        text.seek(max(0, size - 4096))
        print(text.read().decode(errors="replace"))
    if status == 2:
        raise SystemExit(2)
    if status:
        return [f"the process ended with status {status}"]
    if size > FLOOD:
        return [f"{size} bytes were printed"]
    if resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 > MEMORY + (1 << 30):
        return ["the call took too much memory"]
    return []


if __name__ == "__main__":
    report(run() if sys.argv[1:] == ["--call"] else contained())
'''
)
