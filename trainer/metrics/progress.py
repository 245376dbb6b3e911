"""The hook that flushes metrics, tracks them, and tells people how far the run is."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from trainer.clock import due, format_duration
from trainer.hooks import UpdateReport
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.throughput import Throughput
from trainer.metrics.tracker import Tracker


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
