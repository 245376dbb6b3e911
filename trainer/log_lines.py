"""What the program logs, as lines for people: what it is at, after how long, and warnings.

Whatever takes seconds says so beforehand with `logger.info`, so that no silence lasts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cluster.contract import Level
from pipelines.addresses import hide_credentials
from pipelines.console import SayingHandler, WarningLines, visible
from pipelines.formats import format_duration

OWN_PACKAGES = ("trainer", "pipelines", "models", "cluster", "__main__")
"""Whose loggers tell what the program is at; the last is the module that `python -m` runs."""
FIRST_UPDATE = "the first update is done; training"
"""What each worker says when the start is over."""
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
            self.warnings.add(_shown(record.getMessage()))
        super().emit(record)


def was_shown(warning: str) -> bool:
    """Tell whether `show_logs` has shown a warning of this text in its `with` block."""
    handlers = logging.getLogger(_ROOT).handlers
    told = _shown(warning)
    return any(told in each.warnings for each in handlers if isinstance(each, _ConsoleHandler))


def _shown(text: str) -> str:
    return hide_credentials(visible(text))


@contextmanager
def show_logs() -> Iterator[None]:
    """Print our own packages' news and everyone's warnings to standard error, in a `with` block."""
    with _set_levels(logging.INFO), _attach(_ConsoleHandler(), [_ROOT]):
        yield


class _ForwardingHandler(logging.Handler):
    def __init__(self, log: Callable[[Level, str], None], heard: Callable[[], None]) -> None:
        super().__init__(level=logging.INFO)
        self._log = log
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        level: Level = "INFO"
        if record.levelno >= logging.WARNING:
            level = "ERROR" if record.levelno >= logging.ERROR else "WARNING"
        self._heard()
        self._log(level, _shown(record.getMessage()))


@contextmanager
def forward_logs(
    log: Callable[[Level, str], None], *, heard: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Send what our packages log to the driver for the length of a `with` block, and only there.

    Args:
        log: The worker's line to the driver, which writes it down here too where it can.
        heard: Called with each line.
    """
    handler = _ForwardingHandler(log, heard)
    with _set_levels(handler.level), _attach(handler, OWN_PACKAGES), _keep_from_root():
        yield


@contextmanager
def _keep_from_root() -> Iterator[None]:
    """Have no handler of the whole process write a second time what our packages log."""
    before = {name: logging.getLogger(name).propagate for name in OWN_PACKAGES}
    for name in before:
        logging.getLogger(name).propagate = False
    try:
        yield
    finally:
        for name, kept in before.items():
            logging.getLogger(name).propagate = kept


@contextmanager
def _set_levels(level: int) -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in OWN_PACKAGES}
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


class HeldLines(logging.Filter):
    """Holds back what one thread logs until it is its turn to be told."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # what is released passes this filter
        self._held: list[logging.LogRecord] | None = []
        self._thread: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a line through, unless it is one of the thread's before the release."""
        if record.thread != self._thread:
            return True
        with self._lock:
            if self._held is None:
                return True
            if record not in self._held[-1:]:  # every handler asks
                self._held.append(record)
            return False

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold back what the calling thread logs in a `with` block, from all handlers of now."""
        self._thread = threading.get_ident()
        names = (_ROOT, *OWN_PACKAGES)
        handlers = {each for name in names for each in logging.getLogger(name).handlers}
        for each in handlers:
            each.addFilter(self)
        try:
            yield
        finally:
            for each in handlers:
                each.removeFilter(self)

    def release(self) -> None:
        """Tell what was held back, and from now on what comes."""
        with self._lock:
            held, self._held = self._held or [], None
            for record in held:
                logging.getLogger(record.name).handle(record)
