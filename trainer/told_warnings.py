"""Warnings of worker processes, carried to the terminal: a cluster keeps their logs apart."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[dict[str, Any]], None], rank: int) -> None:
        super().__init__(level=logging.WARNING)
        self._tell = tell
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        self._tell({"kind": "warning", "text": f"worker {self._rank}: {record.getMessage()}"})


@contextmanager
def warnings_told(tell: Callable[[dict[str, Any]], None], *, rank: int) -> Iterator[None]:
    """Send every logged warning of our packages to the driver for the length of a `with` block.

    Args:
        tell: The line to the driver.
        rank: This worker, named in each message.
    """
    handler = _Teller(tell, rank)
    loggers = [logging.getLogger(name) for name in ("trainer", "pipelines", "models")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
