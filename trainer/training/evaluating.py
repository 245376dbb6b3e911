"""Checkpoints measured while the run is trained: by all ranks in between, or by a task beside them.

What is measured is a checkpoint, so its figures are found again with it: by the run when it goes
on, by what keeps the best, and by `python -m trainer.evaluate`. What cannot be measured is told,
and training goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.contract import WorkerContext
from pipelines.console import typed
from trainer.checkpoint.agreement import Agreement
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.upload import SaveReport
from trainer.config.job import EvalConfig, JobConfig
from trainer.engine.protocol import Engine
from trainer.errors import is_user_error
from trainer.evaluation.beside import evaluation_payload, measure_beside
from trainer.evaluation.checkpoints import measure_model, measurement_of
from trainer.evaluation.during import MeasuredCheckpoints, asked_during
from trainer.evaluation.final import FinalEvaluation
from trainer.evaluation.reference import EvalReference, MeasuringStopped
from trainer.evaluation.reports import CheckpointReport
from trainer.evaluation.samples import ImageSampler
from trainer.storage.errors import CheckpointError, StoreError
from trainer.training.evaluating_beside import BesideEvaluations
from trainer.training.hooks import due

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Which checkpoints of a run are measured on the way; the last one is by its end.

    Attributes:
        every_images: How often; 0 is never.
        global_batch: Images of an update.
        total_images: Length of the run.
    """

    every_images: int
    global_batch: int
    total_images: int

    def is_due(self, images: int) -> bool:
        """Tell whether the state after so many images is measured."""
        return images < self.total_images and due(
            max(0, images - self.global_batch), images, self.every_images
        )


class Evaluations(Protocol):
    """Measures checkpoints on the way."""

    def after_save(self, images: int, *, is_begun: bool) -> None:
        """Measure the state as it is, if it is due; a collective call.

        Args:
            images: Images that the run has seen.
            is_begun: Whether it is being saved, as all ranks know alike.
        """
        ...

    def catch_up(self, images: int | None) -> None:
        """Measure what an earlier launch has not; a collective call before the first update.

        Args:
            images: The run's own checkpoint that it goes on from, if there is one.
        """
        ...

    def saved(self, report: SaveReport) -> None:
        """Hear on the first rank, in a thread, how a save has ended."""
        ...

    def in_use(self) -> tuple[int, ...]:
        """Tell which checkpoints are read now, so that none is deleted meanwhile."""
        ...

    def close(self, *, is_finished: bool) -> None:
        """End, after what is under way if the run is at its end."""
        ...


class NoEvaluations:
    """Measures nothing."""

    def after_save(self, images: int, *, is_begun: bool) -> None:
        """Do nothing."""

    def catch_up(self, images: int | None) -> None:
        """Do nothing."""

    def saved(self, report: SaveReport) -> None:
        """Do nothing."""

    def in_use(self) -> tuple[int, ...]:
        """None is."""
        return ()

    def close(self, *, is_finished: bool) -> None:
        """Do nothing."""


class InlineEvaluations:
    """Has all ranks measure each checkpoint that is due, right after its save has begun.

    Args:
        plan: Which ones.
        config: How the run measures itself.
        engine: Holds the EMA.
        image_sampler: Decides the samples.
        reference: Real images, extractor, and the ranks.
        known: What is known of the run's checkpoints.
        stop_requested: Tells that this rank was asked to stop.
        pause: Leaves the time of a `with` block out of the run's speed.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        *,
        config: EvalConfig,
        engine: Engine,
        image_sampler: ImageSampler,
        reference: EvalReference,
        known: MeasuredCheckpoints,
        stop_requested: Callable[[], bool],
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._plan = plan
        self._asked = asked_during(config)
        self._engine = engine
        self._image_sampler = image_sampler
        self._reference = reference
        self._known = known
        self._stop_requested = stop_requested
        self._pause = pause
        self._agreement = Agreement(reference.ranks)
        self._lock = threading.Lock()
        self._committed: int | None = None
        self._measured: tuple[CheckpointReport, bytes] | None = None

    @property
    def _is_first(self) -> bool:
        return self._reference.ranks.rank == 0

    def after_save(self, images: int, *, is_begun: bool) -> None:
        """Measure if it is time; a collective call."""
        if not self._plan.is_due(images):
            return
        if not is_begun:
            if self._is_first:
                self._known.warn(images, "it is not saved")
            return
        with self._pause():
            self._try(images, again=False)

    def catch_up(self, images: int | None) -> None:
        """Measure the checkpoint that the run goes on from, if it was ended before it could."""
        if images is None or not self._plan.is_due(images):
            return

        def look() -> bytes:
            try:
                return b"due" if self._known.catch_up(lambda each: each == images) else b""
            except StoreError as error:
                self._known.warn(images, str(error))
                return b""

        if self._agreement.run_on_rank0(look):
            self._committed = images
            with self._pause():
                self._try(images, again=True)

    def saved(self, report: SaveReport) -> None:
        """Publish what was measured of a checkpoint, now that it is there."""
        if report.error is not None:
            return
        with self._lock:
            self._committed = report.images
            measured = self._take()
        self._publish(measured)

    def in_use(self) -> tuple[int, ...]:
        """None is: the weights in memory are measured."""
        return ()

    def close(self, *, is_finished: bool) -> None:
        """Say of which checkpoint that was measured there is none."""
        with self._lock:
            lost, self._measured = self._measured, None
        if lost is not None:
            self._known.warn(lost[0].images, "it could not be saved")

    def _try(self, images: int, *, again: bool) -> None:
        """Measure, and tell what a user has to mend; another error ends the run."""
        if not self._agreement.run_on_rank0(lambda: self._begin(images, again=again)):
            return
        try:
            measured = self._measure(images)
        except ValueError as error:  # on all ranks
            if not is_user_error(error):
                raise
            if self._is_first:
                # What a stop has kept from being measured is left to the next launch.
                if not isinstance(error, MeasuringStopped):
                    self._known.warn(images, str(error))
                self._end(images)
            return
        if measured is None:
            return
        self._end(images)
        self.close(is_finished=False)  # of the one before
        with self._lock:
            self._measured = measured
            ready = self._take()
        self._publish(ready)

    def _begin(self, images: int, *, again: bool) -> bytes:
        try:
            if self._known.begin(images, again=again):
                return b"begun"
            reason = (
                "each try has ended the workers; see what ended them, and "
                f"{typed('trainer.evaluate')} measures it"
            )
        except StoreError as error:
            reason = str(error)
        self._known.warn(images, reason)
        return b""

    def _end(self, images: int) -> None:
        try:
            self._known.end(images)
        except StoreError as error:
            logger.warning("%s", error)

    def _measure(self, images: int) -> tuple[CheckpointReport, bytes] | None:
        logger.info("measuring the EMA weights after %d images", images)
        self._reference.prepare()
        with self._engine.ema_weights() as model:
            measured = measure_model(
                self._image_sampler,
                model,
                self._reference,
                samples=self._asked.samples,
                stop_requested=self._stop_requested,
            )
        measurement = measurement_of(
            self._asked,
            self._reference,
            attempt="",
            weights="ema",
            precision=self._image_sampler.precision,
        )
        if not self._is_first:
            return None
        known = self._known
        report = measured.report(
            self._reference,
            checkpoint=CheckpointIndex(known.store, run=known.run).uri(images),
            run=known.run,
            images=images,
            measurement=measurement,
        )
        return report, measured.grid()

    def _take(self) -> tuple[CheckpointReport, bytes] | None:
        """Return what was measured if its checkpoint is there, once; the lock is held."""
        ready = self._measured
        if ready is None or ready[0].images != self._committed:
            return None
        self._measured = None
        return ready

    def _publish(self, measured: tuple[CheckpointReport, bytes] | None) -> None:
        if measured is None:
            return
        report, grid = measured
        known = self._known
        try:
            attempt = CheckpointIndex(known.store, run=known.run).examine(report.images).attempt
            report = replace(report, measurement=replace(report.measurement, attempt=attempt))
            known.keep(report, grid)
        except CheckpointError as error:  # the store fails, or somebody has damaged it
            known.warn(report.images, f"its report cannot be written: {error}")
        known.tell(report, grid)


def evaluations_of(
    job: JobConfig,
    context: WorkerContext,
    *,
    final: FinalEvaluation,
    engine: Engine,
    known: MeasuredCheckpoints,
    pause: Callable[[], AbstractContextManager[None]],
) -> Evaluations:
    """Make what the configuration asks for.

    Args:
        job: The configuration.
        context: This rank's place, and its way to tasks beside it.
        final: The evaluation of the run's end, which reads the same real images.
        engine: Holds the EMA.
        known: What is known of the run's checkpoints.
        pause: Leaves the time of a `with` block out of the run's speed.
    """
    during, beside = job.eval.during, context.beside
    plan = EvaluationPlan(
        every_images=during.every_images,
        global_batch=job.train.global_batch,
        total_images=job.train.total_images,
    )
    if during.every_images == 0 or (during.where == "beside" and context.rank > 0):
        return NoEvaluations()
    if final.reference.skipped:  # which is told before a run
        return NoEvaluations()
    if during.where == "beside":
        assert beside is not None, "`validate` refuses where=beside without Ray"
        place = CheckpointIndex(known.store, run=known.run)
        return BesideEvaluations(
            plan.is_due,
            known=known,
            begin=lambda images: beside(
                measure_beside, evaluation_payload(job, checkpoint=place.uri(images))
            ),
            stop_requested=context.stop_requested,
        )
    samples = asked_during(job.eval).samples
    reference = final.reference
    if samples != reference.samples:
        reference = replace(reference, samples=samples)
    return InlineEvaluations(
        plan,
        config=job.eval,
        engine=engine,
        image_sampler=final.image_sampler,
        reference=reference,
        known=known,
        stop_requested=context.stop_requested,
        pause=pause,
    )
