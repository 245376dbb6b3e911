"""The hook that saves a checkpoint every so many images."""

from __future__ import annotations

from collections.abc import Callable

from trainer.clock import due
from trainer.hooks import UpdateReport


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
