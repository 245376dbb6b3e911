"""The hook that flushes metrics, tracks them, and tells people how far and how fast the run is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from trainer.clock import due
from trainer.formats import format_duration
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.tracker import Tracker
from trainer.training.hooks import UpdateReport


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


class Progress:
    """Every `interval_images`, reduces the metrics over ranks and reports them.

    Args:
        metrics: Filled by the step.
        tracker: Takes the values on rank 0.
        tell: Takes the progress line on rank 0.
        interval_images: How often; 0 is never.
        total_images: Length of the run.
        throughput: Measures how fast the run is.
        rank: This rank.
    """

    def __init__(
        self,
        *,
        metrics: MetricBuffer,
        tracker: Tracker,
        tell: Callable[[dict[str, object]], None],
        interval_images: int,
        total_images: int,
        throughput: Throughput,
        rank: int,
    ) -> None:
        self._metrics = metrics
        self._tracker = tracker
        self._tell = tell
        self._interval_images = interval_images
        self._total_images = total_images
        self._rank = rank
        self._throughput = throughput
        self._begun = False

    def after_update(self, report: UpdateReport) -> None:
        """Report when the interval is due or the run is complete."""
        last = report.images >= self._total_images
        if not last and not due(report.images_before, report.images, self._interval_images):
            if not self._begun:
                self._throughput.restart(images=report.images, waited_s=report.waited_s)
            self._begun = True
            return
        self._begun = True
        pace = self._throughput.pace(
            images=report.images, total_images=self._total_images, waited_s=report.waited_s
        )
        self._metrics.record("data_wait_share", pace.data_wait_share)
        self._metrics.record("memory_host_gib", _host_gib(), reduction="max")
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
            self._metrics.record("memory_device_gib", peak, reduction="max")
        values = self._metrics.flush()
        if self._rank != 0:
            return
        values["images_per_s"] = pace.images_per_s
        self._tracker.metrics(values, images=report.images)
        losses = ", ".join(
            f"{name.removeprefix('loss/')} {value:{'.4f' if value < 1e4 else '.3e'}}"
            for name, value in sorted(values.items(), reverse=True)
            if name.startswith("loss/")
        )
        share = report.images / self._total_images
        line = (
            f"{report.images:,}/{self._total_images:,} images ({share:.0%})  "
            f"{pace.images_per_s:,.0f} images/s  loss: {losses}  "
            f"ETA {format_duration(max(0.0, pace.remaining_s))}"
        )
        self._tell({"kind": "progress", "images": report.images, "text": line})


def _host_gib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**30
