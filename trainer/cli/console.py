"""What a launch hears of its run: shown on the console, told as events, and kept for the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipelines.command import tell_event
from pipelines.console import say, visible
from pipelines.formats import format_duration
from pipelines.progress import Pace, Progress
from trainer.cli.start_times import StartTimes
from trainer.cli.worker_lines import WorkerLines
from trainer.evaluation.reports import EvaluationReport
from trainer.log_lines import was_shown
from trainer.training.goodput import Timesheet


class Console:
    """Prints notes and the workers' messages.

    Args:
        start: Hears what the cluster and the workers are at until training begins.

    Attributes:
        last_checkpoint: URI of the newest checkpoint heard of, or "".
        images: Images that the run is known to have seen.
        finished: Whether the workers said that the run reached its end.
        begun: Whether training has made progress in this launch.
        failed_saves: Why checkpoints could not be saved, by images.
        unmeasured: Why the samples could not be measured at the end, or "".
        unwritten: Why the report could not be written, or "".
        figures: What that report tells; None if it was written.
        tracked: MLflow's ID of the run, or "" as long as it is unknown.
        identity: Tells the training from others under the run's name, or "" likewise.
        token: Number of this launch of the run.
        times: What this launch spends its time on.
        lines: Shows the workers' lines.
    """

    def __init__(self, start: StartTimes | None = None) -> None:
        self._start = start
        self.last_checkpoint = ""
        self.images = 0
        self.finished = False
        self.begun = False
        self.failed_saves: dict[int, str] = {}
        self.unmeasured = ""
        self.unwritten = ""
        self.figures: EvaluationReport | None = None
        self.tracked = ""
        self.identity = ""
        self.token = 0
        self.times = Timesheet()
        self.lines = WorkerLines(self.note, heard=start.hear_worker if start else None)
        self._bar: Progress | None = None
        self._speed: tuple[float | None, float | None] = None, None

    def cluster_line(self, text: str) -> None:
        """Print a line of the cluster."""
        self.times.hear_line(text)
        if self._start is not None:
            self._start.hear_driver(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Print a line, and tell it as an event."""
        tell_event("note", {"text": text})
        self._show(text)

    def _show(self, text: str) -> None:
        say(visible(text))

    @contextmanager
    def show_bar(self, what: str, total_images: int) -> Iterator[None]:
        """Show on a terminal how far training is, for the length of a `with` block.

        Args:
            what: What stands before the bar.
            total_images: Length of the run.
        """
        silent = partial(Progress, report=self._show, line=lambda _: "", every_s=math.inf)
        with silent(what, total_images, figures=self._figures, last=False) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def _figures(self, pace: Pace) -> str:
        images_per_s, remaining_s = self._speed
        if images_per_s is None or remaining_s is None:
            return f"{pace.fraction:4.0%}"
        left = format_duration(remaining_s)
        return f"{pace.fraction:4.0%}  {images_per_s:,.0f} images/s  ETA {left}"

    def message(self, message: Mapping[str, Any]) -> None:
        """Show what a worker told."""
        self._hear(message)
        if self._bar is not None:
            self._bar.add(self.images - self._bar.done)
        if (kind := message.get("kind")) not in ("time", None):
            tell_event(str(kind), {k: v for k, v in message.items() if k != "kind"})

    def _hear(self, message: Mapping[str, Any]) -> None:
        self.times.hear(message)
        self.lines.look()
        if message.get("kind") == "time":
            self.images = max(self.images, int(message["images"]))
        if message.get("kind") in ("progress", "resumed"):
            self.images = int(message.get("images", self.images))
        match message.get("kind"):
            case "progress":
                self.begun = True
                self._speed = message.get("images_per_s"), message.get("remaining_s")
                self._show(str(message["text"]))
            case "note":
                self._show(str(message["text"]))
            case "warning" if not was_shown(str(message["text"])):
                self._show(f"warning: {message['text']}")
            case "checkpoint":
                self.last_checkpoint = str(message["uri"])
                self.images = max(self.images, int(message["images"]))
                # It was given up before, perhaps by workers that were started again since.
                self.failed_saves.pop(int(message["images"]), None)
                self._show(f"{_heading(message)}checkpoint: {message['uri']}")
            case "checkpoint_failed":
                self.failed_saves[int(message["images"])] = str(message["text"])
                lost = f"{message['uri']} could not be saved: {message['text']}"
                self._show(f"{_heading(message)}warning: {lost}")
            case "resumed":
                self.last_checkpoint = str(message["uri"])
                place = f"{message['images']:,} images from {message['uri']}"
                self._show(f"{_heading(message)}resumed after {place}")
            case "unmeasured":
                self.unmeasured = str(message["text"])
            case "unwritten":
                self.unwritten = str(message["text"])
                self.figures = EvaluationReport.from_json(str(message["report"]).encode())
            case "tracked":
                self.identity = str(message["identity"])
                self.tracked = str(message.get("run_id", ""))
            case "end":
                self.finished = message["end"] == "finished"


def _heading(message: Mapping[str, Any]) -> str:
    """When, in which attempt and by which rank, in the form of the cluster's own lines."""
    now = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
    return f"{now} attempt {message['attempt']}: rank {message['rank']}: "
