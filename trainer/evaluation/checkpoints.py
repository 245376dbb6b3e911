"""The evaluation of any checkpoint of any run, or all of a run, after the fact.

The checkpoint's manifest says what model it holds and what data it was trained on. A report that is
there already is read instead of measured again, so an evaluation can be stopped and repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import EvalConfig, JobConfig
from trainer.config.reading import ConfigError, from_dict, to_dict
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig, Precision
from trainer.evaluation.grid import class_grid, grid_png
from trainer.evaluation.loading import LoadedModel, load_model, usable_device
from trainer.evaluation.measures import Measured
from trainer.evaluation.model_record import ModelRecord, own_eval
from trainer.evaluation.precision import drawing_precision, precision_of_training
from trainer.evaluation.reference import EvalReference, reference_of_run
from trainer.evaluation.reports import (
    CheckpointReport,
    Measurement,
    evaluation_key,
    reference_kind,
)
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.taken import MAX_PICTURES_BYTES, TakenSamples
from trainer.storage.errors import CheckpointError, StoreError
from trainer.storage.kept import read_or_set_aside, set_aside
from trainer.storage.open import open_store

logger = logging.getLogger(__name__)


class UnwrittenReport(CheckpointError):
    """A checkpoint was measured, and its report could not be written.

    Attributes:
        reports: What was measured, this checkpoint last.
    """

    def __init__(self, report: CheckpointReport, reason: StoreError) -> None:
        super().__init__(
            f"the report of {report.checkpoint} could not be written: {reason} Its figures are in "
            "the table, and nowhere else; output=FOLDER writes reports elsewhere"
        )
        self.reports = [report]


def evaluate_checkpoints(
    config: CheckpointEvaluationConfig, *, report: Callable[[str], None]
) -> list[CheckpointReport]:
    """Measure the checkpoints that the configuration names, those of a run oldest first.

    Args:
        config: What to measure.
        report: Takes a line for the user.

    Raises:
        ConfigError: If there is no checkpoint there, or the images are not those of the run.
        CheckpointError: If a checkpoint is damaged, or the store fails.
        UnwrittenReport: If one was measured and its report cannot be written.
        DataError: If the real images are missing or damaged.
    """
    evaluations: list[_Evaluation] = []
    for uri in (config.checkpoint, *config.runs):
        before = evaluations[-1] if evaluations else None
        evaluations.append(_Evaluation(replace(config, checkpoint=uri), report, before=before))
    reports: list[CheckpointReport] = []
    for evaluation in evaluations:
        for one in evaluation.each():
            try:
                reports.append(one())
            except UnwrittenReport as error:
                error.reports = [*reports, *error.reports]
                raise
    return reports


class _Evaluation:
    """Measures the checkpoints of one run.

    Args:
        config: What to measure; its `runs` are others'.
        report: Takes a line for the user.
        before: The evaluation of the run before, whose real images may serve again.
    """

    def __init__(
        self,
        config: CheckpointEvaluationConfig,
        report: Callable[[str], None],
        *,
        before: _Evaluation | None,
    ) -> None:
        runs, store, manifests = choose_checkpoints(
            config.checkpoint, which=config.checkpoints, config=config.store
        )
        self._store, self._manifests = store, manifests
        self._results = store if config.output is None else open_store(config.output, config.store)
        manifest = manifests[-1]
        own = own_eval(store, manifest)
        if own is None:
            report(
                f"warning: {config.checkpoint} is of a version that did not record how its run "
                "measures; what is not set here takes its default"
            )
        self._config = config
        self._asked = asked = config.over(own or EvalConfig())
        self._report = report
        self._loaded: LoadedModel | None = None
        record = ModelRecord.of(manifest)
        if record.index_sha256 is None:
            raise ConfigError(
                f"checkpoint={config.checkpoint} does not record which images it was trained on, "
                "so nothing can be compared with them; evaluate another checkpoint"
            )
        record.check_guidance(asked.sampler)
        device = usable_device(config.device)
        self._precisions = [
            precision_of_training(record.engine, device)
            if each == "run"
            else drawing_precision(each, device)
            for each in config.precisions
        ]
        reference: EvalReference = reference_of_run(
            _job(config, manifest, record, runs=runs),
            trained_on=record.index_sha256,
            features=config.features or (asked.features.name,),
            weights=config.extractor_weights,
            device=device,
            samples=asked.samples,
            compared=asked.compared,
            reference=asked.reference,
        )
        if before is not None and before._reference.has_images_of(reference):
            reference = before._reference
        self._reference: EvalReference = reference

    def each(self) -> Iterator[Callable[[], CheckpointReport]]:
        """Return what measures each set of samples: of each checkpoint, of each seed."""
        for manifest in self._manifests:
            for precision in self._precisions:
                self._loaded = None
                for number in range(self._config.seeds):
                    yield partial(self._evaluate, manifest, self._asked.seed + number, precision)

    def _evaluate(self, manifest: Manifest, seed: int, precision: Precision) -> CheckpointReport:
        """Measure one set of samples, or read what an earlier call has measured."""
        results = self._results
        measurement = measurement_of(
            replace(self._asked, seed=seed),
            self._reference,
            attempt=manifest.attempt,
            weights=self._config.weights,
            precision=precision,
        )

        def key(name: str) -> str:
            return evaluation_key(manifest.run, manifest.images, f"{measurement.name}/{name}")

        report = read_or_set_aside(results, key("report.json"), CheckpointReport)
        if report is not None and not report.is_of(manifest.run, manifest.images, measurement):
            set_aside(results, key("report.json"), reason="it tells of another measurement")
            report = None
        wanted = self._config.write_samples and key("samples.npz") not in results.list(key(""))
        if report is None or wanted:
            measured, report = self._measure(manifest, measurement, precision)
            try:
                results.put(key("grid.png"), measured.grid())
                if self._config.write_samples:
                    results.put_pieces(key("samples.npz"), measured.taken.npz())
                results.put(key("report.json"), report.to_json())
            except StoreError as error:
                raise UnwrittenReport(report, error) from error
        which = f", seed {seed}" * (self._config.seeds > 1)
        self._report(
            f"{manifest.run}, {manifest.images:,} images{which}: {results.uri(key('report.json'))}"
        )
        return report

    def _measure(
        self, manifest: Manifest, measurement: Measurement, precision: Precision
    ) -> tuple[MeasuredModel, CheckpointReport]:
        """Draw and measure in parts, of which no more is kept than is written."""
        uri = CheckpointReader(self._store, run=manifest.run).uri(manifest.images)
        if self._loaded is None:
            self._loaded = load_model(replace(self._config, checkpoint=uri), precision=precision)
        loaded, asked = self._loaded, self._asked
        if self._reference.skipped:
            self._report(f"warning: no figure is measured: {self._reference.skipped}")
        logger.info("drawing and measuring %d images on %s", asked.samples, loaded.device)
        measured = measure_model(
            loaded.image_sampler(asked.sampler, seed=measurement.seed, batch=asked.batch),
            loaded.model,
            self._reference,
            samples=asked.samples,
            max_picture_bytes=MAX_PICTURES_BYTES if self._config.write_samples else 0,
        )
        return measured, measured.report(
            self._reference,
            checkpoint=uri,
            run=manifest.run,
            images=manifest.images,
            measurement=measurement,
        )


def measurement_of(
    asked: EvalConfig,
    reference: EvalReference,
    *,
    attempt: str,
    weights: str,
    precision: Precision,
) -> Measurement:
    """Return what decides the figures of a checkpoint; a collective call.

    Args:
        asked: What is drawn and measured.
        reference: Real images and extractors.
        attempt: The checkpoint's own random name.
        weights: Which of its weights.
        precision: What the network computes in.
    """
    return Measurement(
        attempt=attempt,
        weights=weights,
        samples=asked.samples,
        seed=asked.seed,
        sampler=asdict(asked.sampler),
        extractors=reference.digests,
        held_out_index=reference.digest,
        reference=reference_kind(asked.reference),
        compared=asked.compared,
        precision=precision,
    )


class MeasuredModel(NamedTuple):
    """Samples of a model that were measured; what they show is on the first rank alone."""

    figures: Measured
    """Their figures."""
    taken: TakenSamples
    """Those that were kept."""
    columns: int
    """Of the grid."""

    def grid(self) -> bytes:
        """Return some of them as a picture."""
        return grid_png(self.taken.grid(), columns=self.columns)

    def report(
        self,
        reference: EvalReference,
        *,
        checkpoint: str,
        run: str,
        images: int,
        measurement: Measurement,
    ) -> CheckpointReport:
        """Put the figures beside what they are of; see `CheckpointReport`."""
        return CheckpointReport(
            checkpoint=checkpoint,
            run=run,
            images=images,
            real_images=reference.real_images,
            unusable_real_images=reference.unusable_real_images,
            network_evaluations=sum(self.figures.nfe),
            distances=self.figures.distances,
            measurement=measurement,
        )


def measure_model(
    image_sampler: ImageSampler,
    model: nn.Module,
    reference: EvalReference,
    *,
    samples: int,
    max_picture_bytes: int = 0,
    stop_requested: Callable[[], bool] | None = None,
) -> MeasuredModel:
    """Draw samples, classes in equal parts, and measure them; a collective call.

    Args:
        image_sampler: Decides the samples.
        model: Velocity model.
        reference: Real images, extractors, and the ranks that draw.
        samples: How many.
        max_picture_bytes: How much of them is kept as pictures, beside those of the grid.
        stop_requested: Tells on any rank, after a block, that it is not to go on.

    Raises:
        MeasuringStopped, SolverError, FrechetError, DataError: As `EvalReference.measure` does.
    """
    classes = image_sampler.shape.classes
    labels = torch.arange(samples) % classes
    chosen, columns = class_grid(samples, classes=classes)
    taken = TakenSamples(
        picture_bytes=image_sampler.picture_bytes, shown=chosen, max_bytes=max_picture_bytes
    )
    figures = reference.measure(
        image_sampler, model, labels, keep=taken, stop_requested=stop_requested
    )
    return MeasuredModel(figures, taken, columns)


def _job(
    config: CheckpointEvaluationConfig, manifest: Manifest, record: ModelRecord, *, runs: str
) -> JobConfig:
    """Rebuild what the evaluation needs of the job that saved the checkpoint."""
    given = {key: value for key, value in to_dict(config.data).items() if value}
    if given.keys() & {"prefix", "streams"}:
        given = {"prefix": None, "streams": (), **given}
    return from_dict(
        JobConfig,
        {
            "run": manifest.run,
            "home": str(paths.home_folder(config.home)),
            "data": {**to_dict(record.data), **given},
            "loader": {"decoder": record.loader.decoder},
            "codec": asdict(record.codec),
            "model": to_dict(record.transformer),
            "flow": to_dict(record.flow),
            "store": {**asdict(config.store), "uri": runs.removesuffix("/runs")},
        },
    )
