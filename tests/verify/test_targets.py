"""Targets: what they resolve to, what they say when they do not, and how callables are described."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from attnproof.targets import Importable, Pickled, TargetError, describe, resolve


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``probe`` on the import path, gone from sys.modules afterwards."""
    root = tmp_path / "probe"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "flash.py").write_text(
        "def attention(q): return q\n"
        "class Kernels:\n    @staticmethod\n    def forward(q): return q\n"
        "number = 3\n"
        "def __getattr__(name):\n"
        "    if name == 'lazy': return attention\n"
        "    raise AttributeError(f'no {name} here', name=name)\n"
    )
    (root / "needy.py").write_text("import nowhere_to_be_found\n")
    (root / "broken.py").write_text("\n\nvalue = 1 / 0\n")
    (root / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "probe"]:
        del sys.modules[name]


@pytest.mark.parametrize("attribute", ["attention", "Kernels.forward", "lazy"])
def test_a_target_leads_to_its_callable(package: Path, attribute: str) -> None:
    assert resolve(f"probe.flash:{attribute}")("q") == "q"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("probe.flash", ["package.module:attribute"]),
        ("probe.flash:", ["package.module:attribute"]),
        (":attention", ["package.module:attribute"]),
        ("probe.flash:a..b", ["package.module:attribute"]),
        ("probes.flash:attention", ["no module 'probes'", "PYTHONPATH"]),
        ("probe.flush:attention", ["no module 'probe.flush'"]),
        ("probe.needy:attention", ["probe.needy", "'nowhere_to_be_found'", "needy.py:1"]),
        ("probe.broken:attention", ["ZeroDivisionError: division by zero", "broken.py:3"]),
        ("probe.leaving:attention", ["SystemExit: 3", "leaving.py:2"]),
        ("probe.flash:atention", ["probe.flash has no attribute 'atention'", "nearest names: attention"]),
        ("probe.flash:Kernels.foward", ["probe.flash.Kernels has no attribute 'foward'", "forward"]),
        ("probe.flash:number", ["int", "cannot be called"]),
    ],
)
def test_a_target_that_fails_says_where_and_why(package: Path, target: str, words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        resolve(target)
    for word in words:
        assert word in str(caught.value)


def test_importable_callables_are_named() -> None:
    assert describe(math.sqrt) == Importable("math:sqrt")
    assert describe(functools.partial) == Importable("functools:partial")
    assert describe("any.module:attribute") == Importable("any.module:attribute")


def test_a_name_that_means_another_object_is_not_used(package: Path) -> None:
    flash = __import__("probe.flash", fromlist=["attention"])
    original = flash.attention
    assert describe(original) == Importable("probe.flash:attention")
    flash.attention = lambda q: "another"
    source = describe(original)
    assert isinstance(source, Pickled)
    assert cloudpickle.loads(source.payload)("q") == "q"


def _closure(factor: int) -> Callable[[int], int]:
    return lambda value: value * factor


@pytest.mark.parametrize(
    "function",
    [lambda value: value * 3, _closure(3), functools.partial(lambda a, value: value * a, 3)],
    ids=["lambda", "closure", "partial"],
)
def test_other_callables_are_pickled(function: Callable[[int], int]) -> None:
    source = describe(function)
    assert isinstance(source, Pickled)
    assert cloudpickle.loads(source.payload)(2) == 6


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial], ids=["function", "partial"])
def test_a_module_that_only_this_process_has_travels_by_value(
    tmp_path: Path, wrap: Callable[[Callable[[int], int]], Callable[[int], int]]
) -> None:
    """What pytest's importlib mode does to test modules: in sys.modules, and found by no finder."""
    file = tmp_path / "only_here.py"
    file.write_text("def helper(v): return v + 1\ndef kernel(v): return helper(v)\n")
    spec = importlib.util.spec_from_file_location("only_here", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["only_here"] = module
    try:
        spec.loader.exec_module(module)
        source = describe(wrap(module.kernel))
    finally:
        del sys.modules["only_here"]
    assert isinstance(source, Pickled)
    assert cloudpickle.loads(source.payload)(1) == 2


def test_main_is_never_named(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    exec("def kernel(v): return v", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert isinstance(describe(main.kernel), Pickled)


def test_what_cannot_be_sent_says_so() -> None:
    with pytest.raises(TargetError, match="got int"):
        describe(3)  # type: ignore[arg-type]
    unpicklable = functools.partial(print, (value for value in ()))
    with pytest.raises(TargetError, match="neither imported by name nor pickled"):
        describe(unpicklable)
