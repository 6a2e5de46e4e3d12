"""Every mutant as an attribute: ``tests.quality.mutants.built:NAME`` is a target that any worker can import.

The edited source is written into a real file, since Triton reads the source of a kernel from its file, under
a name made of its content, in the user's cache folder; modules that lead from the base to the edited module
are copied with it, their imports redirected to the copies.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.quality.mutants.mutant import Mutant, MutantError, all_mutants

__all__ = ["build", "sources"]

_SUITE = "attnproof"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mutants = {mutant.name: mutant for mutant in all_mutants()}
    if name not in mutants:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: no mutant is called so")
    found = build(mutants[name])
    globals()[name] = found
    return found


def build(mutant: Mutant) -> Any:
    """The mutant's entry point, imported from the files that :func:`sources` describes.

    Raises:
        MutantError: where edits do not fit, or the base does not use the edited module.
    """
    copies = sources(mutant)
    for module, text in copies.items():
        _imported(module, text)
    return getattr(sys.modules[list(copies)[-1]], mutant.attribute)


def sources(mutant: Mutant) -> dict[str, str]:
    """Module names and texts of the mutant, each before those that import it, the base's copy last.

    Raises:
        MutantError: where edits do not fit, or the base does not use the edited module.
    """
    copies: dict[str, str] = {}
    if mutant.source:
        copies[_unique(mutant, mutant.base_module, mutant.source)] = mutant.source
    elif _redirected(mutant, mutant.base_module, copies, {}) == mutant.base_module:
        raise MutantError(
            f"mutant {mutant.name}: {mutant.base_module} does not import {mutant.edited_module}, directly or "
            "by way of others"
        )
    return copies


def _redirected(mutant: Mutant, module: str, copies: dict[str, str], done: dict[str, str]) -> str:
    """The name under which ``module`` is to be imported: its own, or its copy's where the edit reaches it."""
    if module in done:
        return done[module]
    done[module] = module  # for modules that import each other
    text = _text_of(module)
    changed = text is not None and module == mutant.edited_module
    if text is not None:
        for imported in _imports(text):
            copy = _redirected(mutant, imported, copies, done)
            if copy != imported:
                text = text.replace(f"from {imported} import", f"from {copy} import")
                changed = True
    if text is not None and changed:
        text = mutant.edited(text) if module == mutant.edited_module else text
        done[module] = _unique(mutant, module, text)
        copies[done[module]] = text
    return done[module]


def _text_of(module: str) -> str | None:
    """The source of a module of the suite, without importing it; None for other modules."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


@functools.cache
def _imports(text: str) -> list[str]:
    """Modules of the suite from which names are imported anywhere in ``text``."""
    names = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    return sorted(name for name in names if name is not None and name.startswith(f"{_SUITE}."))


def _unique(mutant: Mutant, module: str, text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"mutant_{mutant.name}_{module.rpartition('.')[2]}_{digest}"


def _imported(module: str, text: str) -> None:
    """Import ``text`` as ``module``, from a file."""
    if module in sys.modules:
        return
    path = _stored(module, text)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[module]
        raise


def _stored(module: str, text: str) -> Path:
    """The file of ``module`` with ``text`` in it; workers may write it at the same time, so by renaming."""
    folder = _cache_folder()
    path = folder / f"{module}.py"
    content = text.encode()
    if not path.is_file() or path.read_bytes() != content:
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".py")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    return path


def _cache_folder() -> Path:
    """The user's own folder: nobody else can put a module there."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(cache) / "attnproof" / "mutants"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
