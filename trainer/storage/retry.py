"""Trying again what failed: a number of times, or for as long as there is time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trainer.storage.errors import StoreError, VanishedObject

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0


def call_again(
    step: Callable[[], Result],
    *,
    tries: int,
    when: Callable[[Exception], bool],
    first_pause_s: float = 0.0,
) -> Result:
    """Run a step up to so many times.

    Args:
        step: The step.
        tries: How often at most.
        when: Tells of an error whether it is worth another try.
        first_pause_s: Pause before the second try, in seconds; each later one is twice as long.

    Raises:
        Exception: That of the last try.
    """
    for attempt in range(tries - 1):
        try:
            return step()
        except Exception as error:
            if not when(error):
                raise
        time.sleep(first_pause_s * 2**attempt)
    return step()


class RetryPolicy:
    """How long one process tries its store again.

    Args:
        seconds: Time for one step, from its first failure on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = float("inf")
        self._hurried = threading.Event()

    def set_deadline(self, within_s: float) -> None:
        """Leave everything that is under way, and all that comes, so many seconds from now."""
        self._end = min(self._end, time.monotonic() + within_s)
        self._hurried.set()

    def left_s(self) -> float | None:
        """Return the seconds that `set_deadline` left, or None if nobody hurries."""
        return max(0.0, self._end - time.monotonic()) if self._hurried.is_set() else None

    def call(self, step: Callable[[], Result]) -> Result:
        """Run a step, and again while the store fails and time is left.

        Raises:
            StoreError: The last failure, or one that no time cures.
        """
        began: float | None = None
        pause = FIRST_PAUSE_S
        while True:
            try:
                return step()
            except VanishedObject:
                raise
            except StoreError as error:
                now = time.monotonic()
                began = now if began is None else began
                left = min(began + self._seconds, self._end) - now
                if left <= 0:
                    raise
                wait = min(pause, left)
                logger.warning("%s Trying again in %.0f s.", error, wait)
            if self._hurried.wait(wait) and self._end > time.monotonic():
                # A pause begun in calm ends at once; in a hurry pauses stay short.
                time.sleep(min(FIRST_PAUSE_S, max(0.0, self._end - time.monotonic())))
                pause = FIRST_PAUSE_S
                continue
            pause = min(2 * pause, MAX_PAUSE_S)
