"""What the program logs, as lines for people: what it is at, after how long, and warnings.

Whatever takes seconds says so beforehand with `logger.info`, so that no silence lasts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.console import SayingHandler
from trainer.clock import format_duration

# The last is the module that `python -m` runs.
_PACKAGES = ("trainer", "pipelines", "models", "cluster", "__main__")


class _Lines(logging.Formatter):
    """`[12s] what begins`, counted from the start of the process, or a warning with its origin."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return f"[{format_duration(record.relativeCreated / 1000)}] {record.getMessage()}"
        return f"{record.levelname} {record.name}: {record.getMessage()}"


def show_logs() -> None:
    """Print what this process logs to standard error: our own packages' news, others' warnings."""
    root = logging.getLogger()
    if not any(isinstance(each, SayingHandler) for each in root.handlers):
        handler = SayingHandler()
        handler.setFormatter(_Lines())
        root.addHandler(handler)
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[dict[str, Any]], None], rank: int) -> None:
        super().__init__(level=logging.INFO if rank == 0 else logging.WARNING)
        self._tell = tell
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._tell({"kind": "phase", "text": record.getMessage()})
        else:
            self._tell({"kind": "warning", "text": f"worker {self._rank}: {record.getMessage()}"})


@contextmanager
def logs_told(tell: Callable[[dict[str, Any]], None], *, rank: int) -> Iterator[None]:
    """Send what our packages log to the driver for the length of a `with` block.

    A cluster keeps the logs of workers apart. All warnings are sent, and what the first rank is at.

    Args:
        tell: The line to the driver.
        rank: This worker, named in each warning.
    """
    handler = _Teller(tell, rank)
    before = {name: logging.getLogger(name).level for name in _PACKAGES}
    for name in before:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(handler.level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)
