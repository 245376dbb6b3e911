"""Looks at what answers late, such as stores and servers, all at once.

Each looks in a thread of its own, and they are taken in an order that the caller settles. So the
whole lasts as long as the slowest, and what is told does not depend on which is faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

from trainer.log_lines import HeldLines

T = TypeVar("T")

logger = logging.getLogger(__name__)

_UNTOLD_S = 0.3
"""So short a wait is not told."""


class Look(Generic[T]):
    """A look at something, begun at once in a thread, for which neither a refusal nor Ctrl-C waits.

    What it logs is told when the look is taken, and from then on as it comes.

    Args:
        at: What answers, for people.
        look: Looks at it.
    """

    def __init__(self, at: str, look: Callable[[], T]) -> None:
        self._at = at
        self._lines = HeldLines()
        self._found: Future[T] = Future()
        Thread(target=self._run, args=[look], name=f"look at {at}", daemon=True).start()

    def _run(self, look: Callable[[], T]) -> None:
        with self._lines.holding():
            try:
                self._found.set_result(look())
            except BaseException as error:
                self._found.set_exception(error)

    def take(self) -> T:
        """Wait for the look, and return what it found or raise what it raised."""
        wait([self._found], timeout=_UNTOLD_S)
        if not self._found.done():
            logger.info("waiting for %s", self._at)
        self._lines.release()
        return self._found.result()
