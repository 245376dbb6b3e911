"""What becomes known of a save: on the run's pages and to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.checkpoint.upload import SaveReport
from trainer.metrics.tracker import Tracker


class SaveNews:
    """Passes on how each save ended.

    Args:
        tracker: Takes where the checkpoint is, what it cost, or why there is none.
        tell: Takes the same for the user.
    """

    def __init__(self, tracker: Tracker, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tracker = tracker
        self._tell = tell

    def __call__(self, report: SaveReport) -> None:
        """Pass on one report."""
        name = f"{report.images:012d}"
        news = {"images": report.images, "uri": report.uri}
        self._tracker.metrics(
            {
                "checkpoint/blocked_s": report.blocked_s,
                "checkpoint/upload_s": report.upload_s,
                "checkpoint/size_gib": report.size_bytes / 2**30,
                "checkpoint/failed": float(report.error is not None),
            },
            images=report.images,
        )
        if report.error is not None:
            self._tracker.tag(f"checkpoint_failed.{name}", report.error)
            self._tell({"kind": "checkpoint_failed", "text": report.error, **news})
            return
        self._tracker.tag("checkpoint", report.uri)
        self._tracker.tag(f"checkpoint.{name}", report.uri)
        self._tell({"kind": "checkpoint", **news})
