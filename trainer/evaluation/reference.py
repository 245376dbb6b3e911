"""What samples are measured by: a data set's real images, and extractors of features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cluster.contract import WorkerContext
from trainer.config import paths
from trainer.config.job import FeatureName, JobConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import picture_shape
from trainer.data.splits import open_split
from trainer.evaluation.features import FeatureExtractor, InceptionFeatures, RandomConvFeatures
from trainer.evaluation.frechet import DistanceToReal
from trainer.evaluation.learned_features import (
    KeptFeatures,
    LearnedConvFeatures,
    learned_features,
)
from trainer.evaluation.real_images import RealImages, check_held, check_held_out
from trainer.evaluation.reports import Distance
from trainer.evaluation.samples import ImageSampler, SampleBlock
from trainer.host_group import HostGroup
from trainer.storage.kept import KeptFiles
from trainer.storage.open import set_environment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalReference:
    """Real images and extractors, which serve all sets of samples; both are read at first use.

    Attributes:
        job: The job whose data set it is.
        context: Says where images are decoded, and features extracted.
        trained_on: SHA-256 of the index of what the run was trained on.
        features: Names of the extractors.
        inception_weights: Local file for "inception"; None downloads it when online.
        batch: Images whose features are extracted at a time.
    """

    job: JobConfig
    context: WorkerContext
    trained_on: str
    features: Sequence[FeatureName]
    inception_weights: str | None
    batch: int

    @cached_property
    def held_out(self) -> RealImages:
        """Batches of held-out images and labels."""
        return RealImages(self.job, "test", self.context)

    @cached_property
    def train(self) -> RealImages:
        """Batches of the training images and labels, from which "learned_conv" learns."""
        return RealImages(self.job, "train", self.context)

    @cached_property
    def extractors(self) -> dict[str, FeatureExtractor]:
        """The extractors by name.

        Raises:
            MissingWeights: Inception's weights cannot be had.
        """
        return {name: self._build_extractor(name) for name in self.features}

    def _build_extractor(self, name: FeatureName) -> FeatureExtractor:
        shape = picture_shape(self.job.data, self.job.codec)
        if name == "inception":
            return InceptionFeatures(self.inception_weights)
        if name == "random_conv":
            return RandomConvFeatures(shape.channels)
        made_of = {
            "train_index": self.trained_on,
            "held_out_index": self.held_out.digest,
            "picture": f"{shape.channels}x{shape.size}",
            "decoder": self.job.loader.decoder,
        }
        files = KeptFiles(paths.cache(self.job) / "features")
        return learned_features(
            train=self.train,
            held_out=self.held_out,
            kept=KeptFeatures(files=files, made_of=made_of),
        )

    @property
    def digests(self) -> dict[str, str]:
        """Each extractor and, where it has weights of its own, their SHA-256."""
        return {name: extractor.digest for name, extractor in self.extractors.items()}

    @cached_property
    def distances(self) -> dict[str, DistanceToReal]:
        """Distance to the held-out images by each extractor."""
        logger.info("reading the held-out images")
        return {
            name: DistanceToReal(
                extractor,
                (images for images, _ in self.held_out),
                device=torch.device(self.context.device),
                batch=self.batch,
            )
            for name, extractor in self.extractors.items()
        }

    @property
    def real_images(self) -> int:
        """How many held-out images samples are compared with."""
        return next(iter(self.distances.values())).real_images

    @property
    def unusable_real_images(self) -> int:
        """How many held-out images could not be read or decoded."""
        return len(self.held_out) - self.real_images

    def measure(
        self,
        image_sampler: ImageSampler,
        model: nn.Module,
        labels: Tensor,
        *,
        ranks: HostGroup | None = None,
        keep: Callable[[SampleBlock], None] | None = None,
    ) -> tuple[Distance, ...]:
        """Sample and measure block by block, of which none is kept here; a collective call.

        Args:
            image_sampler: Decides the samples.
            model: Velocity model.
            labels: Requested classes, shape [n].
            ranks: Those that sample; None is this process by itself.
            keep: Takes each block, on the first rank.

        Returns:
            On the first rank one distance for each extractor, on the others none.

        Raises:
            FrechetError: There are too few images for a distance, or samples that are not finite.
        """
        with closing(image_sampler.blocks(model, labels, ranks=ranks)) as blocks:
            for block in blocks:
                for distance in self.distances.values():
                    distance.add(block.images)
                if keep is not None:
                    keep(block)
        if ranks is not None and ranks.rank > 0:
            return ()
        return tuple(self._take(name) for name in self.features)

    def _take(self, name: str) -> Distance:
        distance, extractor = self.distances[name], self.extractors[name]
        accuracy = None
        if isinstance(extractor, LearnedConvFeatures):
            accuracy = extractor.held_out_accuracy
        return Distance(
            features=name,
            frechet=distance.take(),
            frechet_real_halves=distance.between_halves,
            held_out_accuracy=accuracy,
        )


def reference_of_run(
    job: JobConfig,
    *,
    trained_on: str,
    features: Sequence[FeatureName],
    inception_weights: str | None,
    device: torch.device,
    batch: int,
) -> EvalReference:
    """Open the real images of a run's data set, outside of the run.

    Features are extracted on `device`; the other arguments are those of `EvalReference`.

    Raises:
        ConfigError: The images are not those of the run.
        DataError: They are missing or damaged.
    """
    set_environment(job.store)
    if open_split(job, "train").digest != trained_on:
        raise ConfigError(
            f"data.prefix={' '.join(paths.data_prefixes(job))} holds other images than those "
            f"that run {job.run} was trained on; give the prefix of its own data set"
        )
    context = WorkerContext(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        attempt=0,
        device=str(device),
        stop_requested=lambda: False,
        report=lambda _: None,
    )
    check_held_out(job)
    check_held(job, features, classifier=False)
    return EvalReference(
        job=job,
        context=context,
        trained_on=trained_on,
        features=features,
        inception_weights=inception_weights,
        batch=batch,
    )
