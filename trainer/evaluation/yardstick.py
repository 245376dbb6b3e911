"""What the samples of a checkpoint are measured by: extractors and its data set's real images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import torch

from cluster.contract import WorkerContext
from trainer.config import paths
from trainer.config.evaluation import FeatureConfig, FeatureName
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import picture_shape
from trainer.data.splits import open_images, open_split
from trainer.evaluation.features import FeatureExtractor, feature_extractor
from trainer.evaluation.frechet import DistanceToReal
from trainer.evaluation.learned_features import KeptFeatures, LearnedConvFeatures
from trainer.evaluation.real_images import RealImages, check_held
from trainer.storage.kept import KeptFiles
from trainer.storage.open import set_environment

logger = logging.getLogger(__name__)


class Yardstick:
    """The real images and extractors of one data set, which serve all checkpoints of a run.

    Args:
        job: The job whose data set it is.
        trained_on: SHA-256 of the index of the images that the run was trained on.
        features: Names of the extractors.
        inception_weights: Local file for "inception"; None downloads it when online.
        device: Where features are extracted.
        batch: Images whose features are extracted at a time.

    Attributes:
        held_out_index: SHA-256 of the index of the real images.

    Raises:
        ConfigError: The images are not those of the run.
        DataError: They are missing or damaged.
        MissingWeights: Inception's weights cannot be had.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        trained_on: str,
        features: Sequence[FeatureName],
        inception_weights: str | None,
        device: torch.device,
        batch: int,
    ) -> None:
        self._job = job
        self._device = device
        self._batch = batch
        set_environment(job.store)
        if open_split(job, "train").digest != trained_on:
            raise ConfigError(
                f"data.prefix={' '.join(paths.data_prefixes(job))} holds other images than those "
                f"that run {job.run} was trained on; give the prefix of its own data set"
            )
        self.held_out_index = open_images(job, "test").digest
        check_held(job, features, classifier=False)
        self._extractors: dict[str, FeatureExtractor] = {
            name: feature_extractor(
                FeatureConfig(name=name, inception_weights=inception_weights),
                channels=picture_shape(job.data, job.codec).channels,
                train=lambda: self._split("train"),
                held_out=lambda: self._split("test"),
                kept=self._kept(trained_on),
            )
            for name in features
        }

    @cached_property
    def distances(self) -> dict[str, DistanceToReal]:
        """Distance to the held-out images by each extractor; reads them at first use."""
        logger.info("reading the held-out images")
        return {
            name: DistanceToReal(
                extractor,
                (images for images, _ in self._split("test")),
                device=self._device,
                batch=self._batch,
            )
            for name, extractor in self._extractors.items()
        }

    @property
    def digests(self) -> dict[str, str]:
        """Each extractor and, where it has weights of its own, their SHA-256."""
        return {name: extractor.digest for name, extractor in self._extractors.items()}

    def held_out_accuracy(self, name: str) -> float | None:
        """Share of held-out images that a learned extractor reads right."""
        extractor = self._extractors[name]
        return extractor.held_out_accuracy if isinstance(extractor, LearnedConvFeatures) else None

    @property
    def stored_real_images(self) -> int:
        """How many held-out images are stored, those that cannot be used among them."""
        return len(self._split("test"))

    def _split(self, split: str) -> RealImages:
        return RealImages(self._job, split, _context(self._device))

    def _kept(self, trained_on: str) -> KeptFeatures:
        shape = picture_shape(self._job.data, self._job.codec)
        return KeptFeatures(
            files=KeptFiles(paths.cache(self._job) / "features"),
            made_of={
                "train_index": trained_on,
                "held_out_index": self.held_out_index,
                "picture": f"{shape.channels}x{shape.size}",
                "decoder": self._job.loader.decoder,
            },
        )


def _context(device: torch.device) -> WorkerContext:
    """Stand in for the place in a run that an evaluation does not have."""
    return WorkerContext(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        attempt=0,
        device=str(device),
        stop_requested=lambda: False,
        report=lambda _: None,
    )
