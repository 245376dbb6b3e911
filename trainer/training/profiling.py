"""Traces of a few updates by torch's profiler, of every rank."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.host_group import HostGroup
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreError
from trainer.storage.store import Store
from trainer.training.hooks import UpdateReport

logger = logging.getLogger(__name__)

_SILENT = "6"
"""Level of the profiler's own log at which nothing is left to say; it is 5 unless it is set."""
_TRACKED_BYTES = 64 << 20
"""What the traces of all ranks may have together to be sent to the tracker too."""


class Profile:
    """Profiles some updates; called after all other hooks, so that it sees whole updates.

    Args:
        updates: Which updates of the launch, counted from 0; may be none.
        store: Takes the trace of each rank.
        folder: Key of the folder for traces that end after so many images.
        ranks: How this rank agrees with the others.
        tracker: Takes the traces of all ranks, on the first.
        report: Takes a note for people, on the first rank.
        pause: Leaves the time of a `with` block out of the run's speed.
    """

    def __init__(
        self,
        updates: range,
        *,
        store: Store,
        folder: Callable[[int], str],
        ranks: HostGroup,
        tracker: Tracker,
        report: Callable[[dict[str, Any]], None],
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._updates = updates
        self._store = store
        self._folder = folder
        self._ranks = ranks
        self._tracker = tracker
        self._report = report
        self._pause = pause
        self._done = 0
        self._is_due = False
        self._running: profile | None = None

    def begin(self) -> None:
        """Profile the first update, if that is asked for."""
        self._start_if_due()

    def after_update(self, report: UpdateReport) -> None:
        """Start or end when it is time; the end is a collective call."""
        self._done += 1
        if self._done == self._updates.stop:
            self.end(report.images)
        self._start_if_due()

    def end(self, images: int) -> None:
        """Write what was profiled until now, if anything was; a collective call.

        What goes wrong on a rank is told, and training goes on.
        """
        if not self._is_due:
            return
        self._is_due = False
        with self._pause():
            data = self._stop()
            if self._done == self._updates.start:  # the run was over
                return
            if data:
                with self._told_alone():
                    key = f"{self._folder(images)}/rank-{self._ranks.rank:05d}.json.gz"
                    self._store.put(key, data)
            self._tell(images, data)

    def drop(self) -> None:
        """Keep nothing of what is being profiled, for a run that was stopped has no time for it."""
        if self._is_due:
            self._is_due = False
            with self._told_alone():
                if self._running is not None:
                    self._running.stop()
            self._running = None
            self._report({"kind": "note", "text": "no profile is kept, as the run was stopped"})

    def _start_if_due(self) -> None:
        if self._updates and self._done == self._updates.start:
            self._is_due = True
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            # Its own lines on standard error say when it begins and ends, of every rank.
            os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
            with self._told_alone():
                running = profile(activities=activities)
                running.start()
                self._running = running

    def _stop(self) -> bytes:
        """The trace of what was profiled; nothing where there is none, or it is of no use."""
        running, self._running = self._running, None
        with self._told_alone():
            if running is not None:
                running.stop()
                if self._done > self._updates.start:
                    return _trace_of(running)
        return b""

    @contextmanager
    def _told_alone(self) -> Iterator[None]:
        """Only tell what goes wrong in a `with` block: disks, stores, and torch's profiler."""
        try:
            yield
        except (OSError, RuntimeError, StoreError) as error:
            logger.warning("the profile of rank %d is not kept: %s", self._ranks.rank, error)

    def _tell(self, images: int, data: bytes) -> None:
        small = len(data) <= _TRACKED_BYTES // self._ranks.world_size
        traces = self._ranks.gather(data if small else b"")
        for rank, trace in enumerate(traces):
            if trace:
                self._tracker.file(f"profile/{images:012d}/rank-{rank:05d}.json.gz", trace)
        where = self._store.uri(self._folder(images))
        text = (
            f"updates of each rank that were profiled: {self._done - self._updates.start}; their "
            f"traces are in {where}, to open in https://ui.perfetto.dev"
        )
        if traces and not all(traces):
            text += "; those of some ranks are too large for MLflow, or could not be written"
        self._report({"kind": "note", "text": text})


def _trace_of(finished: profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        finished.export_chrome_trace(str(path))
        return path.read_bytes()


def profile_folder(run: str, *, images: int, attempt: int) -> str:
    """Return the store key of the traces that end after so many images of a run.

    Args:
        run: Name of the run.
        images: Images that the run had seen.
        attempt: Which start of the workers it was.
    """
    return f"{run}/profile/{images:012d}-attempt-{attempt:05d}"
