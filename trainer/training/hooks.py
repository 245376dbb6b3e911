"""Hooks: passive observers of the loop, which get an immutable report and return nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from trainer.clock import due
from trainer.engine.protocol import Engine
from trainer.evaluation.grid import grid_png
from trainer.metrics.tracker import Tracker


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
