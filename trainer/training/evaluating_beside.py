"""Has tasks beside the workers measure checkpoints, one after the other, while training goes on."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from cluster.contract import BesideFailed, BesideTask
from pipelines.console import typed
from trainer.checkpoint.upload import SaveReport
from trainer.evaluation.during import MeasuredCheckpoints
from trainer.evaluation.reports import CheckpointReport
from trainer.storage.errors import CheckpointError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often a task is looked at."""
PATIENT_S = 120.0
"""How long a task may wait for room before that is told, and the end of training for its start."""
CLOSE_S = 10.0
"""How long its thread gets to end."""
LAST_S = 1800.0
"""How long the end of a run waits for a measurement that is under way."""
_DELETED = (
    "it was deleted before its figures were there, as measuring takes longer than "
    "checkpoint.keep_last saves; raise checkpoint.keep_last, keep some for good by "
    "checkpoint.keep_every_images, or measure more seldom (eval.during.every_images)"
)


class BesideEvaluations:
    """What is done for it on the first rank, by a thread; others have nothing to do.

    Args:
        is_due: Tells which checkpoints are measured.
        known: What is known of the run's checkpoints.
        begin: Begins to measure the checkpoint of so many images.
        stop_requested: Tells that the run was asked to stop.
        look_s: How often a task is looked at.
        patient_s: How long a task may wait for room before that is told, and at the end given up.
        last_s: How long the end of the run waits for what is under way.
    """

    def __init__(
        self,
        is_due: Callable[[int], bool],
        *,
        known: MeasuredCheckpoints,
        begin: Callable[[int], BesideTask],
        stop_requested: Callable[[], bool],
        look_s: float = LOOK_S,
        patient_s: float = PATIENT_S,
        last_s: float = LAST_S,
    ) -> None:
        self._is_due = is_due
        self._known = known
        self._begin = begin
        self._stop_requested = stop_requested
        self._look_s = look_s
        self._patient_s = patient_s
        self._last_s = last_s
        self._waiting: deque[int] = deque()
        self._changed = threading.Condition()
        self._measured: int | None = None
        self._is_finished = False
        self._end_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)

    def after_save(self, images: int, *, is_begun: bool) -> None:
        """Do nothing: it is measured once it is there."""

    def catch_up(self, images: int | None) -> None:
        """Begin, in a thread, with the checkpoints that earlier launches have left."""
        self._thread.start()

    def saved(self, report: SaveReport) -> None:
        """Put a checkpoint into the queue."""
        if report.error is None and self._is_due(report.images):
            with self._changed:
                if report.images not in self._waiting:
                    self._waiting.append(report.images)
                self._changed.notify()

    def in_use(self) -> tuple[int, ...]:
        """Tell which checkpoint a task reads now, which is not to be deleted meanwhile."""
        with self._changed:
            return () if self._measured is None else (self._measured,)

    def close(self, *, is_finished: bool) -> None:
        """End: a run that is stopped or fails leaves what is under way to its next launch.

        Args:
            is_finished: Whether nobody comes after this process, so that what is under way is
                waited for, and what could not begin is told.
        """
        if not self._thread.is_alive():
            return
        if is_finished:
            logger.info("waiting for measurements that are under way")
        with self._changed:
            self._is_finished = is_finished
            self._end_s = time.monotonic() + (self._last_s if is_finished else 0.0)
            self._changed.notify()
        # A store that does not answer may hold it, and a stop has no time for that.
        self._thread.join(self._last_s * is_finished + CLOSE_S)

    def _run(self) -> None:
        try:
            left = self._known.catch_up(self._is_due)
        except Exception as error:  # whatever it is, later ones are measured
            logger.warning("earlier checkpoints are not looked at: %s", _words(error))
            left = []
        with self._changed:
            self._waiting.extendleft(each for each in reversed(left) if each not in self._waiting)
        while (images := self._next()) is not None:
            try:
                self._measure(images)
            except Exception as error:  # whatever it is, the next one is measured
                reason = _words(error) if self._known.is_there(images) else _DELETED
                self._known.warn(images, reason)
            finally:
                with self._changed:
                    self._measured = None

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end_s is not None)
            if self._end_s is None:
                self._measured = self._waiting.popleft()
                return self._measured
            left = list(self._waiting)
        for images in left:
            self._leave(images)
        return None

    def _measure(self, images: int) -> None:
        if not self._known.is_there(images):
            self._known.warn(images, _DELETED)
            return
        task = self._begin(images)
        room_s, is_told = time.monotonic() + self._patient_s, False
        while not task.join(self._look_s):
            has_no_room = time.monotonic() > room_s and not task.has_begun()
            if self._is_over(has_no_room=has_no_room):
                task.cancel()
                self._leave(images)
                return
            if has_no_room and not is_told:
                is_told = True
                logger.warning(
                    "measuring the checkpoint of %d images waits for room: nothing of the cluster "
                    "is free that has cluster.beside_cpus and cluster.beside_gpus",
                    images,
                )
        self._tell(task.result())

    def _is_over(self, *, has_no_room: bool) -> bool:
        """Tell whether a task is not waited for any longer."""
        if self._end_s is None:
            return False
        return has_no_room or time.monotonic() > self._end_s or self._stop_requested()

    def _leave(self, images: int) -> None:
        """Say how a checkpoint is measured that was not; another launch of the run does so."""
        if self._is_finished:
            run = shlex.quote(self._known.store.uri(self._known.run))
            self._known.warn(
                images,
                "there was no room or no time for it before the end of training; "
                f"{typed('trainer.evaluate')} checkpoint={run} checkpoints=all measures it",
            )

    def _tell(self, told: Mapping[str, Any]) -> None:
        report = CheckpointReport.from_json(told["report"].encode())
        grid = None
        if told["unwritten"]:
            logger.warning("%s", told["unwritten"])
        else:
            with suppress(CheckpointError):  # the figures are what counts
                grid = self._known.store.get(self._known.key(report, "grid.png"))
        self._known.tell(report, grid)


def _words(error: Exception) -> str:
    """Say what went wrong; what is not expected to is named by its type."""
    expected = isinstance(error, BesideFailed | CheckpointError)
    return str(error) if expected else f"{type(error).__name__}: {error}"
