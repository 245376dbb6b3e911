"""The evaluation at the end of a run: all ranks draw samples, the first measures and publishes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer.config.job import EvalConfig
from trainer.engine.protocol import Engine
from trainer.errors import is_user_error
from trainer.evaluation.grid import TakenSamples, grid_png
from trainer.evaluation.learned_features import LabelAgreement, join_batches, label_agreement
from trainer.evaluation.reference import EvalReference
from trainer.evaluation.reports import Distance, EvaluationReport, Origin, evaluation_key
from trainer.evaluation.samples import ImageSampler, SampleBlock
from trainer.host_group import HostGroup
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import CheckpointError
from trainer.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Takes what was measured of one checkpoint.

    Attributes:
        store: Where results go.
        run: Name of the run.
        images: Images the weights were trained on.
        attempt: Finds the random name of their checkpoint.
        tracker: Takes the figures and the grid.
        report: Takes a message for the driver.
    """

    store: Store
    run: str
    images: int
    attempt: Callable[[], str]
    tracker: Tracker
    report: Callable[[dict[str, object]], None]

    def publish(self, report: EvaluationReport, *, samples: bytes, grid: bytes) -> None:
        """Write results, and hand them to the driver where the store does not take them.

        Args:
            report: The figures; which checkpoint they are of is filled in.
            samples: The samples as an archive.
            grid: Some of them as a picture.
        """
        try:
            whole = replace(report, origin=replace(report.origin, attempt=self.attempt()))
            # The report comes last: where it is, the evaluation is complete.
            results = {"samples.npz": samples, "grid.png": grid, "report.json": whole.to_json()}
            for name, data in results.items():
                self.store.put(evaluation_key(self.run, self.images, name), data)
        except CheckpointError as error:
            figures = report.to_json().decode()
            self.report({"kind": "unwritten", "text": str(error), "report": figures})
        self.tracker.metrics(report.metrics(), images=self.images)
        self.tracker.image("evaluation", grid, images=self.images)


logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Unmeasurable(Exception):
    """The samples cannot be measured, for a reason that a user can mend; raised on all ranks."""


@dataclass(frozen=True, kw_only=True)
class FinalEvaluation:
    """Draws and measures the samples of a trained run.

    Attributes:
        config: What to draw and measure.
        image_sampler: Decides the samples.
        ranks: Those that draw, which wait however long the first one measures.
        reference: Real images and extractor.
    """

    config: EvalConfig
    image_sampler: ImageSampler
    ranks: HostGroup
    reference: EvalReference

    def run(self, engine: Engine, results: Publisher) -> None:
        """Evaluate the EMA weights against the initial ones; a collective call.

        What a user has to mend is told, and no error: the run is trained to its end all the same.

        Args:
            engine: Holds the EMA.
            results: Takes what was measured, on the first rank.
        """
        try:
            self._run(engine, results)
        except _Unmeasurable as error:
            results.report({"kind": "unmeasured", "text": str(error)})

    def _run(self, engine: Engine, results: Publisher) -> None:
        labels = torch.arange(self.config.samples) % self.image_sampler.shape.classes
        logger.info("evaluating the EMA weights")
        self._run_on_rank0(lambda: self.reference.distances)
        taken = TakenSamples(whole=self.config.classifier)
        logger.info("drawing and measuring %d images with them", len(labels))
        with engine.ema_weights() as model:
            reached = self._measure(model, labels, keep=taken.add)
            grid = self.sample_grid(model)
        # Where training started, in the place of the trained weights: there may be no other.
        logger.info("drawing as many with the initial weights, to compare")
        with engine.initial_weights() as model:
            untrained = self._measure(model, labels)

        def publish() -> None:
            (before,), (after,) = untrained, reached
            report = EvaluationReport.of(
                self.config,
                images=results.images,
                origin=Origin(
                    run=results.run,
                    attempt="",
                    held_out_index=self.reference.held_out.digest,
                    extractor=self.reference.digests[after.features],
                ),
                reached=after,
                frechet_untrained=before.frechet,
                nfe=taken.nfe,
                labels=self._label_agreement(taken) if self.config.classifier else None,
                real_images=self.reference.real_images,
                unusable_real_images=self.reference.unusable_real_images,
            )
            picture = grid_png(grid, columns=self.config.grid_columns)
            results.publish(report, samples=taken.npz(), grid=picture)

        logger.info("writing the report")
        self._run_on_rank0(publish)

    def sample_grid(self, model: nn.Module) -> Tensor:
        """Sample `grid_columns` images for each class shown; a collective call.

        Returns:
            On the first rank the images, one class after the other.
        """
        classes = min(self.config.grid_classes, self.image_sampler.shape.classes)
        labels = torch.arange(classes).repeat_interleave(self.config.grid_columns)
        # Few images in one block would be the work of one rank.
        batch = min(self.config.batch, -(-len(labels) // self.ranks.world_size))
        sampler = replace(self.image_sampler, batch=batch)
        return sampler.all(model, labels, ranks=self.ranks).images

    def _measure(
        self, model: nn.Module, labels: Tensor, *, keep: Callable[[SampleBlock], None] | None = None
    ) -> tuple[Distance, ...]:
        return self._run_on_all(
            lambda: self.reference.measure(
                self.image_sampler, model, labels, ranks=self.ranks, keep=keep
            )
        )

    def _label_agreement(self, taken: TakenSamples) -> LabelAgreement:
        return label_agreement(
            train=join_batches(self.reference.train),
            held_out=join_batches(self.reference.held_out),
            samples=join_batches(taken.whole),
        )

    def _run_on_rank0(self, step: Callable[[], T]) -> T | None:
        """Let the first rank do something while the others wait."""
        return self._run_on_all(lambda: step() if self.ranks.rank == 0 else None)

    def _run_on_all(self, step: Callable[[], T]) -> T:
        """Do something on every rank; a user's mistake on one ends the evaluation on all."""
        mistake = ""
        try:
            done = step()
        except ValueError as error:
            if not is_user_error(error):
                raise
            mistake = str(error) or type(error).__name__
        ranks = self.ranks
        mistaken = ranks.reduce_min(ranks.rank if mistake else ranks.world_size)
        if mistaken < ranks.world_size:
            told = ranks.broadcast(mistake.encode(errors="replace"), source=mistaken)
            raise _Unmeasurable(told.decode())
        return done
