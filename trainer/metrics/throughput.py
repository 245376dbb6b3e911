"""Images per second, the share of time spent waiting for data, and the time still to go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed over one window.

    Attributes:
        images_per_s: Images of the global batch per second of wall clock.
        data_wait_share: Part of the window in which this rank waited for the loader, 0 to 1.
        remaining_s: Seconds until the run's last image at this speed.
    """

    images_per_s: float
    data_wait_share: float
    remaining_s: float


class Throughput:
    """Measures the window between two calls of `pace`.

    Args:
        images: Images already seen when measuring starts.
        now: Monotonic clock in seconds.
    """

    def __init__(self, images: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._images = images
        self._time = now()
        self._waited_s = 0.0

    def pace(self, *, images: int, total_images: int, waited_s: float) -> Pace:
        """Close the window and open the next.

        Args:
            images: Images seen so far.
            total_images: Images of the whole run.
            waited_s: Seconds waited for data since the run began.

        Returns:
            The pace of the window just closed.
        """
        now = self._now()
        elapsed = max(now - self._time, 1e-9)
        speed = (images - self._images) / elapsed
        share = min(1.0, max(0.0, (waited_s - self._waited_s) / elapsed))
        self._images, self._time, self._waited_s = images, now, waited_s
        remaining = (total_images - images) / speed if speed > 0 else float("inf")
        return Pace(images_per_s=speed, data_wait_share=share, remaining_s=remaining)
