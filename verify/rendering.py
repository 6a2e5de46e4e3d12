"""Reports written to files for every command, and what commands say of their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from attnproof.reports.record import Event

__all__ = ["LOG_WIDTH", "UsageError", "render_events", "require_writable"]

LOG_WIDTH: Final = 150
"""Columns of a log, where there is no terminal."""


class UsageError(ValueError):
    """An argument that cannot be used; printed as one line, exit code 2."""


def render_events(events: list[Event], html: Path | None, junit: Path | None, sarif: Path | None) -> None:
    """Render a record's events to those files that are asked for."""
    from attnproof.reports import html as html_report
    from attnproof.reports import junit as junit_report
    from attnproof.reports import sarif as sarif_report

    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html_report.render(events, html)
    if junit is not None:
        junit.write_text(junit_report.render(events))
    if sarif is not None:
        sarif.write_text(sarif_report.render(events))


def require_writable(path: Path) -> None:
    """Make the folder of a file to be written.

    Raises:
        UsageError: the path is a folder, or its folder cannot be made.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: its folder cannot be made ({error.strerror})") from None
