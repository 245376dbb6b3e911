"""The evaluation at the end of a run: all ranks draw and measure samples, the first publishes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cluster.contract import WorkerContext
from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler import SolverError
from trainer.config.job import EvalConfig, JobConfig
from trainer.config.shapes import flow_shape
from trainer.engine.protocol import Engine
from trainer.errors import is_user_error
from trainer.evaluation.extractors import run_on_all
from trainer.evaluation.figures import LabelAgreement
from trainer.evaluation.grid import grid_png
from trainer.evaluation.learned_features import join_batches, label_agreement
from trainer.evaluation.precision import precision_of_training
from trainer.evaluation.reference import EvalReference
from trainer.evaluation.reports import EvaluationReport, Origin, evaluation_key
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.strips import Moment, film, film_picture, png_of
from trainer.evaluation.taken import TakenSamples
from trainer.host_group import HostGroup
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import CheckpointError
from trainer.storage.store import Store

logger = logging.getLogger(__name__)

_FILMS = 2
_MOMENTS = 8


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

    def publish(
        self, report: EvaluationReport, *, samples: Iterator[bytes], grid: bytes, film: bytes | None
    ) -> None:
        """Write results, and hand them to the driver where the store does not take them.

        Args:
            report: The figures; which checkpoint they are of is filled in.
            samples: The samples as an archive, in pieces.
            grid: Some of them as a picture.
            film: How one of each of the first classes came into being; None if it was not drawn.
        """
        try:
            whole = replace(report, origin=replace(report.origin, attempt=self.attempt()))
            # The report comes last: where it is, the evaluation is complete.
            pictures = {"grid.png": grid} | ({} if film is None else {"film.png": film})
            key = partial(evaluation_key, self.run, self.images)
            self.store.put_pieces(key("samples.npz"), samples)
            for name, data in {**pictures, "report.json": whole.to_json()}.items():
                self.store.put(key(name), data)
        except CheckpointError as error:
            figures = report.to_json().decode()
            self.report({"kind": "unwritten", "text": str(error), "report": figures})
        self.tracker.measured(
            report.metrics(),
            images=self.images,
            lowest=f"eval/frechet_{report.features}",
            protocol=report.measurement.protocol(report.features),
        )
        self.tracker.image("evaluation", grid, images=self.images)


@dataclass(frozen=True, kw_only=True)
class FinalEvaluation:
    """Draws and measures the samples of a trained run.

    Attributes:
        config: What to draw and measure.
        image_sampler: Decides the samples.
        reference: Real images, extractor, and the ranks, all of which draw and measure.
    """

    config: EvalConfig
    image_sampler: ImageSampler
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
        except ValueError as error:
            if not is_user_error(error):
                raise
            results.report({"kind": "unmeasured", "text": str(error)})

    def _run(self, engine: Engine, results: Publisher) -> None:
        labels = torch.arange(self.config.samples) % self.image_sampler.shape.classes
        logger.info("evaluating the EMA weights")
        self.reference.prepare()
        taken = TakenSamples(
            picture_bytes=self.image_sampler.picture_bytes, whole=self.config.classifier
        )
        logger.info("drawing and measuring %d images with them", len(labels))
        with engine.ema_weights() as model:
            reached = self.reference.measure(self.image_sampler, model, labels, keep=taken)
            grid = self.sample_grid(model)
            films = self._films(model)
        before = None
        if reached.distances:
            # Where training started, in the place of the trained weights: there may be no other.
            logger.info("drawing as many with the initial weights, to compare")
            with engine.initial_weights() as model:
                (before,) = self.reference.measure(self.image_sampler, model, labels).distances

        def publish() -> None:
            after = reached.distances[0] if reached.distances else None
            judged = self.config.classifier and after is not None
            report = EvaluationReport.of(
                self.config,
                images=results.images,
                origin=Origin(
                    run=results.run,
                    attempt="",
                    held_out_index=self.reference.digest,
                    extractor=self.reference.digests[self.config.features.name],
                    precision=self.image_sampler.precision,
                ),
                reached=after,
                frechet_untrained=None if before is None else before.frechet,
                nfe=reached.nfe,
                labels=self._label_agreement(taken) if judged else None,
                real_images=self.reference.real_images,
                unusable_real_images=self.reference.unusable_real_images,
            )
            picture = grid_png(grid, columns=self.config.grid_columns)
            strip = film_picture(self.image_sampler, films, range(len(films))) if films else None
            results.publish(
                report,
                samples=taken.npz(),
                grid=picture,
                film=None if strip is None else png_of(strip),
            )

        logger.info("writing the report")
        first = self.reference.ranks.rank == 0
        run_on_all(self.reference.ranks, lambda: publish() if first else None)

    def sample_grid(self, model: nn.Module) -> Tensor:
        """Sample `grid_columns` images for each class shown; a collective call.

        Returns:
            On the first rank the images, one class after the other.

        Raises:
            SolverError: The solver comes to no end; on all ranks.
        """
        classes = min(self.config.grid_classes, self.image_sampler.shape.classes)
        labels = torch.arange(classes).repeat_interleave(self.config.grid_columns)
        # Few images in one block would be the work of one rank.
        ranks = self.reference.ranks
        batch = min(self.config.batch, -(-len(labels) // ranks.world_size))
        return replace(self.image_sampler, batch=batch).all(model, labels, ranks=ranks).images

    def _films(self, model: nn.Module) -> list[list[Moment]]:
        """Draw one sample of each of the first classes, and keep how it comes into being.

        Every rank draws the same ones: what ranks compute together they have to begin together.
        """
        classes = min(_FILMS, self.image_sampler.shape.classes)
        try:
            return [
                film(self.image_sampler, model, label, index=label, moments=_MOMENTS)
                for label in range(classes)
            ]
        except SolverError as error:
            logger.warning("no film of how samples come into being is drawn: %s", error)
            return []

    def _label_agreement(self, taken: TakenSamples) -> LabelAgreement:
        return label_agreement(
            train=join_batches(self.reference.train),
            held_out=join_batches(self.reference.held_out),
            samples=join_batches(taken.whole),
        )


def final_evaluation(
    job: JobConfig,
    context: WorkerContext,
    flow: Flow,
    codec: Codec,
    *,
    device: torch.device,
    trained_on: str,
) -> FinalEvaluation:
    """Make the evaluation of a run's end; a collective call.

    Args:
        job: The configuration.
        context: This rank.
        flow: The flow between noise and images.
        codec: Between images and what the flow works on.
        device: Where this rank computes.
        trained_on: SHA-256 of the index of the training images.
    """
    config = job.eval
    return FinalEvaluation(
        config=config,
        image_sampler=ImageSampler(
            flow=flow,
            sampler=config.sampler,
            shape=flow_shape(job.data, job.codec),
            codec=codec,
            seed=config.seed,
            batch=config.batch,
            device=device,
            precision=precision_of_training(job.engine, device),
        ),
        reference=EvalReference(
            job=job,
            context=context,
            ranks=HostGroup(),
            trained_on=trained_on,
            features=(config.features.name,),
            weights=config.features,
            samples=config.samples,
            compared=config.compared,
            reference=config.reference,
        ),
    )
