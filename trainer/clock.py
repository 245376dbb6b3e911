"""The run's clock: progress is counted in images, so a changed batch size moves no schedule."""

from __future__ import annotations

import time
from collections.abc import Callable


def due(before_images: int, after_images: int, interval_images: int) -> bool:
    """Tell whether a multiple of the interval lies in (before, after].

    Args:
        before_images: Images seen before the update.
        after_images: Images seen after it.
        interval_images: The interval; 0 means never.

    Returns:
        True when something that happens every `interval_images` images happens now.
    """
    if interval_images <= 0:
        return False
    return before_images // interval_images < after_images // interval_images


class Throttle:
    """Tells whether it is time again to say how far something is.

    Args:
        every_s: Seconds between two times.
        clock: Monotonic clock in seconds.
    """

    def __init__(self, every_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._last = clock()

    def __call__(self) -> bool:
        """Return whether so many seconds have passed since the last time, or the beginning."""
        if self._clock() - self._last < self._every_s:
            return False
        self._last = self._clock()
        return True
