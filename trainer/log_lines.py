"""What the program logs, as lines for people: what it is at, after how long, and warnings.

Whatever takes seconds says so beforehand with `logger.info`, so that no silence lasts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.console import SayingHandler, WarningLines, visible
from pipelines.formats import format_duration

# The last is the module that `python -m` runs.
_PACKAGES = ("trainer", "pipelines", "models", "cluster", "__main__")
_ROOT = ""


class _Lines(WarningLines):
    """`[12s] what begins`, counted from the start of the process, or a warning with its origin."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            told = visible(record.getMessage())
            return f"[{format_duration(record.relativeCreated / 1000)}] {told}"
        return super().format(record)


class _ConsoleHandler(SayingHandler):
    """Shows what is logged, and keeps in mind which warnings that were."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Lines())
        self.warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.warnings.add(record.getMessage())
        super().emit(record)


def was_shown(warning: str) -> bool:
    """Tell whether `show_logs` has shown a warning of this text in its `with` block."""
    handlers = logging.getLogger(_ROOT).handlers
    return any(warning in each.warnings for each in handlers if isinstance(each, _ConsoleHandler))


@contextmanager
def show_logs() -> Iterator[None]:
    """Print our own packages' news and everyone's warnings to standard error, in a `with` block."""
    with _set_levels(logging.INFO), _attach(_ConsoleHandler(), [_ROOT]):
        yield


class _ForwardingHandler(logging.Handler):
    def __init__(self, report: Callable[[dict[str, Any]], None], rank: int) -> None:
        super().__init__(level=logging.INFO if rank == 0 else logging.WARNING)
        self._report = report
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._report({"kind": "phase", "text": record.getMessage()})
        else:
            self._report({"kind": "warning", "rank": self._rank, "text": record.getMessage()})


@contextmanager
def forward_logs(report: Callable[[dict[str, Any]], None], *, rank: int) -> Iterator[None]:
    """Send what our packages log to the driver for the length of a `with` block.

    A cluster keeps the logs of workers apart. All warnings are sent, and what the first rank is at.

    Args:
        report: The line to the driver.
        rank: This worker, named in each warning.
    """
    handler = _ForwardingHandler(report, rank)
    with _set_levels(handler.level), _attach(handler, _PACKAGES):
        yield


@contextmanager
def _set_levels(level: int) -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in _PACKAGES}
    for name in before:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, kept in before.items():
            logging.getLogger(name).setLevel(kept)


@contextmanager
def _attach(handler: logging.Handler, names: Sequence[str]) -> Iterator[None]:
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
