"""The evaluation of any checkpoint of any run, or all of a run, after the fact.

The checkpoint's manifest says what model it holds and what data it was trained on. A report that is
there already is read instead of measured again, so an evaluation can be stopped and repeated.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models.flow.sampler import Samples, images_per_call
from models.flow.sampler_config import SamplerConfig
from pipelines.mixture import StreamConfig
from trainer.checkpoint.errors import MissingObject
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.store import Store, StoreConfig, open_store
from trainer.evaluate.checkpoint_report import CheckpointReport, Distance, Measurement
from trainer.evaluate.features import (
    FeatureName,
)
from trainer.evaluate.grid import class_grid, grid_png
from trainer.evaluate.report import evaluation_key
from trainer.evaluate.samples import draw
from trainer.schema import ConfigError, JobConfig, from_dict, to_dict
from trainer.trained.choice import choose_checkpoints
from trainer.trained.codec import recorded_codec
from trainer.trained.device import usable_device
from trainer.trained.model import TrainedModel, Weights, load_trained_model
from trainer.trained.yardstick import Yardstick


@dataclass(frozen=True, kw_only=True)
class RealImagesConfig:
    """Where the real images are.

    Attributes:
        prefix: Folder or `s3://…` with the shards' `train/` and `test/`; None is the data set's
            place in the run's own store.
        streams: The streams of a run that read several, with their weights.
        images_prefix: For a run that read latents, where the images are; None is where the latents
            were made of.
    """

    prefix: str | None = None
    streams: tuple[StreamConfig, ...] = ()
    images_prefix: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointEvaluationConfig:
    """What to measure.

    Attributes:
        checkpoint: URI of a checkpoint, or of a run (`…/runs/NAME`).
        checkpoints: Which ones of a run: the "newest", or "all".
        weights: "ema", or "master" for the weights without averaging.
        samples: Images to draw, classes in equal parts.
        batch: Images in one network call when all scales are active.
        seed: Seed of the noise; image i depends on it, on i and on its class alone.
        sampler: Solver, steps and guidance.
        features: One or more extractors; the same samples are measured with each.
        inception_weights: Local file for "inception"; None downloads it when online.
        data: The real images.
        output: Folder for the results; None is the run's own `evaluation/`.
        codec_source: Where the autoencoder is of a checkpoint in latent space; None looks where the
            run had it.
        device: "auto" takes a GPU when there is one.
        home: Folder for caches; None is $LAPFLOW_HOME, or ~/lapflow.
        store: How to reach the store.
    """

    checkpoint: str
    checkpoints: Literal["newest", "all"] = "newest"
    weights: Weights = "ema"
    samples: int = 1000
    batch: int = 125
    seed: int = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    features: tuple[FeatureName, ...] = ("random_conv",)
    inception_weights: str | None = None
    data: RealImagesConfig = field(default_factory=RealImagesConfig)
    output: str | None = None
    codec_source: str | None = None
    device: str = "auto"
    home: str | None = None
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch < 1 or not self.features:
            raise ConfigError(
                f"samples={self.samples} must be at least 2, batch={self.batch} at least 1, and "
                f"features={list(self.features)} must name an extractor"
            )


def evaluate_checkpoints(
    config: CheckpointEvaluationConfig, *, tell: Callable[[str], None]
) -> list[CheckpointReport]:
    """Measure the checkpoints that the configuration names, oldest first.

    Args:
        config: What to measure.
        tell: Takes a line for the user.

    Raises:
        ConfigError: If there is no checkpoint there, or the images are not those of the run.
        CheckpointError: If a checkpoint is damaged, or the store fails.
        DataError: If the real images are missing or damaged.
    """
    runs, store, manifests = choose_checkpoints(
        config.checkpoint, which=config.checkpoints, config=config.store
    )
    results = store if config.output is None else open_store(config.output, config.store)
    evaluation = _Evaluation(config, manifests[-1], runs=runs, tell=tell)
    return [evaluation.report(store, manifest, results=results) for manifest in manifests]


class _Evaluation:
    """Measures the checkpoints of one run."""

    def __init__(
        self,
        config: CheckpointEvaluationConfig,
        manifest: Manifest,
        *,
        runs: str,
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._tell = tell
        self._yardstick = Yardstick(
            _job(config, manifest, runs=runs),
            trained_on=manifest.science["data_set"]["index_sha256"],
            features=config.features,
            inception_weights=config.inception_weights,
            device=usable_device(config.device),
            batch=config.batch,
        )

    def report(self, store: Store, manifest: Manifest, *, results: Store) -> CheckpointReport:
        """Measure one checkpoint, or read what an earlier call has measured."""
        measurement = self._measurement(manifest)

        def key(name: str) -> str:
            return evaluation_key(manifest.run, manifest.images, f"{measurement.name}/{name}")

        try:
            report = CheckpointReport.from_json(results.get(key("report.json")))
        except MissingObject:
            grid, report = self._measured(store, manifest, measurement)
            results.put(key("grid.png"), grid)
            results.put(key("report.json"), report.to_json())
        self._tell(f"{manifest.run}, {manifest.images:,} images: {results.uri(key('report.json'))}")
        return report

    def _measured(
        self, store: Store, manifest: Manifest, measurement: Measurement
    ) -> tuple[bytes, CheckpointReport]:
        """Draw and measure in parts, of which only what the grid shows is kept."""
        uri = CheckpointReader(store, run=manifest.run).uri(manifest.images)
        trained = self._trained(uri)
        distances = self._yardstick.distances
        labels = torch.arange(self._config.samples) % trained.shape.classes
        chosen, columns = class_grid(len(labels), classes=trained.shape.classes)
        shown: dict[int, Tensor] = {}
        evaluations, first = 0.0, 0
        at_once = images_per_call(trained.flow.stages.scales, finest_batch=self._config.batch)[0]
        for part in torch.split(labels, at_once):
            drawn = self._drawn(trained, part, first_image=first)
            for distance in distances.values():
                distance.add(drawn.images)
            shown |= {i: drawn.images[i - first] for i in chosen if 0 <= i - first < len(part)}
            evaluations += len(part) * sum(drawn.evaluations)
            first += len(part)
        report = CheckpointReport(
            checkpoint=uri,
            run=manifest.run,
            images=manifest.images,
            real_images=next(iter(distances.values())).real_images,
            network_evaluations=evaluations / len(labels),
            distances=tuple(
                Distance(
                    features=name,
                    frechet=distance.take(),
                    frechet_real_halves=distance.between_halves,
                    held_out_accuracy=self._yardstick.held_out_accuracy(name),
                )
                for name, distance in distances.items()
            ),
            measurement=measurement,
        )
        return grid_png(torch.stack([shown[i] for i in chosen]), columns=columns), report

    def _trained(self, uri: str) -> TrainedModel:
        config = self._config
        return load_trained_model(
            uri,
            weights=config.weights,
            device=config.device,
            store=config.store,
            codec_source=config.codec_source,
            home=config.home,
        )

    def _drawn(self, trained: TrainedModel, labels: Tensor, *, first_image: int) -> Samples:
        return draw(
            trained.model,
            flow=trained.flow,
            config=self._config.sampler,
            shape=trained.shape,
            codec=trained.codec,
            labels=labels,
            seed=self._config.seed,
            batch=self._config.batch,
            device=trained.device,
            first_image=first_image,
        )

    def _measurement(self, manifest: Manifest) -> Measurement:
        return Measurement(
            attempt=manifest.attempt,
            weights=self._config.weights,
            samples=self._config.samples,
            seed=self._config.seed,
            sampler=asdict(self._config.sampler),
            extractors=self._yardstick.digests,
            held_out_index=self._yardstick.held_out_index,
        )


def _job(config: CheckpointEvaluationConfig, manifest: Manifest, *, runs: str) -> JobConfig:
    """Rebuild what the evaluation needs of the job that saved the checkpoint."""
    science = manifest.science
    return from_dict(
        JobConfig,
        {
            "run": manifest.run,
            "home": config.home or os.environ.get("LAPFLOW_HOME", JobConfig.home),
            "data": {**science["data"], **to_dict(config.data)},
            "codec": asdict(recorded_codec(science)),
            "model": science["model"],
            "flow": science["flow"],
            "store": {**asdict(config.store), "uri": runs.removesuffix("/runs")},
        },
    )
