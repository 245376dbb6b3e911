"""How fast a run is, with what interrupts training left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed over one window.

    Attributes:
        images_per_s: Images of the global batch per second of training.
        data_wait_share: Part of the window in which this rank waited for the loader, 0 to 1.
        remaining_s: Seconds until the run's last image at this speed, with as many interruptions
            on the way as there were so far.
    """

    images_per_s: float
    data_wait_share: float
    remaining_s: float


class Throughput:
    """Measures the window between two calls of `pace`, interruptions left out.

    Args:
        images: Images already seen when measuring starts.
        now: Monotonic clock in seconds.
    """

    def __init__(self, images: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._first_images = images
        self._images = images
        self._time = now()
        self._waited_s = 0.0
        self._interrupted_s = 0.0
        self._interrupted_before_s = 0.0

    def restart(self, *, images: int, waited_s: float) -> None:
        """Begin the window here: what came before was a start, which is slower than training.

        Args:
            images: Images seen so far.
            waited_s: Seconds waited for data since the run began.
        """
        self._images, self._time, self._waited_s = images, self._now(), waited_s
        self._interrupted_before_s = self._interrupted_s

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of a `with` block out of the speed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was asked of the device before is training
        began = self._now()
        yield
        self._interrupted_s += self._now() - began

    def pace(self, *, images: int, total_images: int, waited_s: float) -> Pace:
        """Close the window and open the next.

        Args:
            images: Images seen so far.
            total_images: Images of the whole run.
            waited_s: Seconds waited for data since the run began.

        Returns:
            The pace of the window just closed.
        """
        interrupted_s = self._interrupted_s - self._interrupted_before_s
        elapsed = max(self._now() - self._time - interrupted_s, 1e-9)
        speed = (images - self._images) / elapsed
        share = min(1.0, max(0.0, (waited_s - self._waited_s) / elapsed))
        self.restart(images=images, waited_s=waited_s)
        remaining_s = float("inf")
        if speed > 0:
            interruption = self._interrupted_s / (images - self._first_images)
            remaining_s = (total_images - images) * (1 / speed + interruption)
        return Pace(images_per_s=speed, data_wait_share=share, remaining_s=remaining_s)
