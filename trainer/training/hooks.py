"""Hooks: passive observers of the loop, which get an immutable report and return nothing.

The hook that ends a run which diverges is `trainer.training.divergence.LossWatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from pipelines.formats import format_duration
from trainer.clock import due
from trainer.engine.protocol import Engine
from trainer.evaluation.grid import grid_png
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.tracker import Tracker
from trainer.training.throughput import Pace, Throughput


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update as hooks see it.

    Attributes:
        images_before: Images seen before the update.
        images: Images seen after it.
        updates: Updates applied so far.
        waited_s: Seconds this rank has waited for data since the loop began.
    """

    images_before: int
    images: int
    updates: int
    waited_s: float


class Hook(Protocol):
    """Something that happens along with training on every rank."""

    def after_update(self, report: UpdateReport) -> None:
        """Observe an update."""
        ...


class Progress:
    """Every `interval_images`, reduces the metrics over ranks and reports them.

    Args:
        metrics: Filled by the step.
        tracker: Takes the values on rank 0.
        report: Takes the progress line on rank 0.
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
        report: Callable[[dict[str, object]], None],
        interval_images: int,
        total_images: int,
        throughput: Throughput,
        rank: int,
    ) -> None:
        self._metrics = metrics
        self._tracker = tracker
        self._report = report
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
        line = self._line(report.images, values, pace)
        self._report({"kind": "progress", "images": report.images, "text": line})

    def _line(self, images: int, values: Mapping[str, float], pace: Pace) -> str:
        losses = ", ".join(
            f"{name.removeprefix('loss/')} {value:{'.4f' if value < 1e4 else '.3e'}}"
            for name, value in sorted(values.items(), reverse=True)
            if name.startswith("loss/")
        )
        return (
            f"{images:,}/{self._total_images:,} images ({images / self._total_images:.0%})  "
            f"{pace.images_per_s:,.0f} images/s  loss: {losses}  "
            f"ETA {format_duration(max(0.0, pace.remaining_s))}"
        )


def _host_gib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**30


class PeriodicSave:
    """Saves when the interval is due; a collective call.

    Args:
        save: Writes a checkpoint of the state as it is now.
        interval_images: How often; 0 is never.
    """

    def __init__(self, save: Callable[[], object], *, interval_images: int) -> None:
        self._save = save
        self._interval_images = interval_images

    def after_update(self, report: UpdateReport) -> None:
        """Save if it is time."""
        if due(report.images_before, report.images, self._interval_images):
            self._save()


class SampleGrids:
    """Draws a grid from the EMA weights.

    Args:
        engine: Holds the EMA.
        sample: Samples the grid's images from a model, on all ranks; fixed noise and labels.
        tracker: Takes the picture on rank 0.
        interval_images: How often; 0 is never.
        columns: Images per row.
        rank: This rank.
        pause: Leaves the time of a `with` block out of the run's speed.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        sample: Callable[[nn.Module], Tensor],
        tracker: Tracker,
        interval_images: int,
        columns: int,
        rank: int,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._engine = engine
        self._sample = sample
        self._tracker = tracker
        self._interval_images = interval_images
        self._columns = columns
        self._rank = rank
        self._pause = pause

    def after_update(self, report: UpdateReport) -> None:
        """Draw when the interval is due; a collective call."""
        if not due(report.images_before, report.images, self._interval_images):
            return
        with self._pause():
            with self._engine.ema_weights() as model:
                images = self._sample(model)
            if self._rank == 0:
                picture = grid_png(images, columns=self._columns)
                self._tracker.image("samples", picture, images=report.images)
