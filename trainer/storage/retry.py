"""Trying a store again for as long as there is time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    wait_exponential,
)

from trainer.storage.errors import StoreError, VanishedObject

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0


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
        attempts = Retrying(
            retry=retry_if_exception_type(StoreError) & retry_if_not_exception_type(VanishedObject),
            after=_count_from_first_failure,
            stop=lambda state: self._left_s(state) <= 0,
            wait=self._pause_s,
            before_sleep=_tell,
            sleep=self._sleep,
            reraise=True,
        )
        return attempts(step)

    def _left_s(self, state: RetryCallState) -> float:
        return min(state.start_time + self._seconds, self._end) - time.monotonic()

    def _pause_s(self, state: RetryCallState) -> float:
        calm = wait_exponential(FIRST_PAUSE_S, max=MAX_PAUSE_S)
        pause_s = FIRST_PAUSE_S if self._hurried.is_set() else calm(state)
        return max(0.0, min(pause_s, self._left_s(state)))

    def _sleep(self, seconds: float) -> None:
        """Pause; one begun in calm ends soon after somebody hurries."""
        if self._hurried.wait(seconds):
            time.sleep(min(seconds, FIRST_PAUSE_S, max(0.0, self._end - time.monotonic())))


def _count_from_first_failure(state: RetryCallState) -> None:
    if state.attempt_number == 1:
        state.start_time = time.monotonic()


def _tell(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning("%s Trying again in %.0f s.", state.outcome.exception(), state.upcoming_sleep)
