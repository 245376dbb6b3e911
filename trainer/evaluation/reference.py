"""What samples are measured by: a data set's real images, and extractors of features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cluster.contract import WorkerContext
from trainer.config import paths
from trainer.config.job import FeatureConfig, FeatureName, JobConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import picture_shape
from trainer.data.splits import open_split
from trainer.errors import is_user_error
from trainer.evaluation.extractors import build_extractor, find_on_first, run_on_all
from trainer.evaluation.feature_sets import (
    COMPARED_IMAGES,
    NEIGHBOURS,
    FeatureSet,
    nearest_distances,
    spread_evenly,
)
from trainer.evaluation.features import FeatureExtractor, IndexedExtraction
from trainer.evaluation.figures import Distance, Nearness, RealFigures
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.learned_features import (
    KeptFeatures,
    LearnedConvFeatures,
    learned_features,
)
from trainer.evaluation.measures import Measured, Target, measures
from trainer.evaluation.npz import open_reference
from trainer.evaluation.pairs import ComparedImages
from trainer.evaluation.real_images import HOLD_OUT_MORE, RealImages, check_held, few_held_out
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.stored import read_stored, stored_digest, stored_target
from trainer.evaluation.taken import TakenSamples
from trainer.host_group import HostGroup
from trainer.storage.kept import KeptFiles
from trainer.storage.open import set_environment

logger = logging.getLogger(__name__)


class MeasuringStopped(ValueError):
    """Somebody asked to stop before all samples were drawn."""


class _Read(NamedTuple):
    """Features of real images by one extractor."""

    images: FeatureSet
    """Summed up over all ranks."""
    compared: ComparedImages
    """Those of the summed ones whose features are kept."""
    near: Tensor
    """Features of held-out images that are looked at closely; of training images, this rank's."""


class _Yardstick(NamedTuple):
    """What real images reach."""

    held_out: Tensor
    """Distance from each held-out image that is compared to the nearest training image."""
    figures: RealFigures


@dataclass(frozen=True, kw_only=True)
class EvalReference:
    """Real images and extractors, which serve all sets of samples; both are read at first use.

    All ranks read and measure, each its part; so every use is a collective call.

    Attributes:
        job: The job whose data set it is.
        context: Says where images are decoded, and features extracted.
        ranks: Those that read and measure.
        trained_on: SHA-256 of the index of what the run was trained on.
        features: Names of the extractors.
        weights: Where extractors find their weights; its name does not matter here.
        samples: How many samples are measured, and so real images beside them.
        compared: Most images of a set whose features are kept, to compare pairs.
        reference: What distances are measured to: "test", "train", or a file of statistics.
    """

    job: JobConfig
    context: WorkerContext
    ranks: HostGroup
    trained_on: str
    features: Sequence[FeatureName]
    weights: FeatureConfig
    samples: int
    compared: int
    reference: str = "test"

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
        """The extractors by name; the first rank finds their weights for all.

        Raises:
            MissingWeights: Inception's weights cannot be had.
        """
        channels = picture_shape(self.job.data, self.job.codec).channels
        return {
            name: build_extractor(
                name,
                ranks=self.ranks,
                channels=channels,
                config=self.weights,
                store=self.job.store,
                learn=self._learn,
            )
            for name in self.features
        }

    def _learn(self) -> LearnedConvFeatures:
        shape = picture_shape(self.job.data, self.job.codec)
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

    def has_images_of(self, other: EvalReference) -> bool:
        """Tell whether another one, which need not have read anything, reads and measures alike.

        The runs may be others, as long as their images are the same in size and decoded alike.
        """
        mine, others = (
            (
                replace(each.job, run=self.job.run, model=self.job.model, flow=self.job.flow),
                (each.context.device, each.trained_on, tuple(each.features)),
                (each.weights, each.samples, each.compared, each.reference),
            )
            for each in (self, other)
        )
        return mine == others

    @property
    def digests(self) -> dict[str, str]:
        """Each extractor and, where it has weights of its own, their SHA-256."""
        return {name: extractor.digest for name, extractor in self.extractors.items()}

    def prepare(self) -> None:
        """Read the real images and find out what they reach."""
        _ = self.extractors
        if not self.skipped:
            _ = self._target, self._real

    @cached_property
    def skipped(self) -> str:
        """Why no distance is measured: there are too few held-out images; "" where one is."""
        if self.reference == "test" and (few := few_held_out(len(self.held_out))):
            return f"{few}, and samples are compared with these: {HOLD_OUT_MORE}"
        return ""

    @cached_property
    def _held_out(self) -> dict[str, _Read]:
        logger.info("reading the held-out images")
        everything = torch.arange(len(self.held_out))
        few = spread_evenly(len(everything), self.samples)
        summed = everything if self.reference == "test" else few
        near = spread_evenly(len(everything), COMPARED_IMAGES)
        sets, compared = self._read(self.held_out, ids=everything, summed=summed, near=near)
        for each in sets.values():
            self.held_out.check_usable(each.sums.count)
        return {
            name: _Read(each, compared[name], each.gather(self.ranks, near))
            for name, each in sets.items()
        }

    @cached_property
    def _train(self) -> dict[str, _Read]:
        """Nothing where there are no training images, as of latents that were made elsewhere."""
        logger.info("reading training images")
        try:
            total = run_on_all(self.ranks, lambda: len(self.train))
            most = total if self.reference == "train" else self.samples
            measured, near = spread_evenly(total, most), spread_evenly(total, NEIGHBOURS)
            ids = torch.tensor(sorted({*measured.tolist(), *near.tolist()}))
            near = torch.searchsorted(ids, near)
            sets, compared = self._read(
                self.train, ids=ids, summed=torch.searchsorted(ids, measured), near=near
            )
            for each in sets.values():
                each.sums.statistics()
            return {
                name: _Read(each, compared[name], each.kept(near)) for name, each in sets.items()
            }
        except ValueError as error:
            if not is_user_error(error) or self.reference == "train":
                raise
            if self.ranks.rank == 0:
                logger.warning(
                    "what real images reach is left out, as training images cannot be measured: %s",
                    error,
                )
            return {}

    @cached_property
    def _target(self) -> dict[str, Target]:
        if self.reference in ("test", "train"):
            read = self._train if self.reference == "train" else self._held_out
            return {name: Target.of(each.images, each.compared) for name, each in read.items()}
        device = torch.device(self.context.device)
        return {
            name: stored_target(self._stored, name, ranks=self.ranks, device=device)
            for name in self.features
        }

    @cached_property
    def _stored(self) -> bytes:
        """Statistics of the reference's file, and its digest, which the first rank reads."""
        logger.info("reading the reference %s", self.reference)
        extractors = self.extractors

        def read() -> bytes:
            with open_reference(self.reference, self.job.store) as stored:
                return read_stored(
                    stored,
                    extractors,
                    channels=picture_shape(self.job.data, self.job.codec).channels,
                    compared=self.compared,
                    device=torch.device(self.context.device),
                )

        return find_on_first(self.ranks, read)

    @property
    def digest(self) -> str:
        """SHA-256 of what distances are measured to: of an index of images, or of a file."""
        if self.reference == "test":
            return self.held_out.digest
        if self.reference == "train":
            return self.train.digest
        return stored_digest(self._stored)

    @cached_property
    def _real(self) -> dict[str, _Yardstick]:
        """What real images reach that are not the reference.

        Nothing without training images, or without enough held-out ones.
        """
        if few := few_held_out(len(self.held_out)):
            if self.ranks.rank == 0:
                logger.warning("what real images reach is left out: %s", few)
            return {}
        found = {}
        for name, train in self._train.items():
            held_out, target = self._held_out[name], self._target[name]
            nearest = nearest_distances(held_out.near, train.near, ranks=self.ranks)
            other = held_out if self.reference == "train" else train
            figures = RealFigures(
                images=other.images.sums.count,
                frechet=frechet_distance(other.images.sums.statistics(), target.statistics),
                diversity=other.images.sums.within_class_variance(),
                nearest=Nearness.of(nearest, held_out=nearest),
                more=measures(other.images, other.compared, target),
            )
            found[name] = _Yardstick(nearest, figures)
        return found

    def _read(
        self, images: RealImages, *, ids: Tensor, summed: Tensor, near: Tensor
    ) -> tuple[dict[str, FeatureSet], dict[str, ComparedImages]]:
        """Extract the features of real images, each rank those of its part.

        Args:
            images: The split.
            ids: Places in it of what is read; the others are places in `ids`.
            summed: What is measured.
            near: What is looked at closely.
        """
        sets, extractions, chosen = self._sets(summed, near=near)

        def read() -> None:
            for batch in images.share(self.ranks, ids=ids):
                for extraction in extractions:
                    extraction.add(batch.images, batch.labels, batch.indices)
            for extraction in extractions:
                extraction.flush()

        run_on_all(self.ranks, read)
        for each in sets.values():
            each.reduce(self.ranks)
        return sets, {name: self._compared(each, chosen) for name, each in sets.items()}

    def _sets(
        self, summed: Tensor, *, near: Tensor
    ) -> tuple[dict[str, FeatureSet], list[IndexedExtraction], Tensor]:
        """Make what takes the features of a set of images by each extractor.

        The last is which of them are compared.
        """
        classes = max(1, self.job.data.classes)
        chosen = summed[spread_evenly(len(summed), self.compared)]
        sets = {
            name: FeatureSet(
                classes=classes,
                kept=torch.cat((chosen, near)),
                summed=summed,
                layout=extractor.layout,
            )
            for name, extractor in self.extractors.items()
        }
        device = torch.device(self.context.device)
        extractions = [
            IndexedExtraction(extractor, device=device, take=sets[name].take)
            for name, extractor in self.extractors.items()
        ]
        return sets, extractions, chosen

    def _compared(self, images: FeatureSet, chosen: Tensor) -> ComparedImages:
        device = torch.device(self.context.device)
        return ComparedImages(images.kept(chosen), ranks=self.ranks, device=device)

    @property
    def real_images(self) -> int:
        """How many real images samples are compared with; 0 where only statistics are stored."""
        return 0 if self.skipped else next(iter(self._target.values())).images

    @property
    def unusable_real_images(self) -> int:
        """How many images of the reference could not be read or decoded."""
        images = {"test": self.held_out, "train": self.train}.get(self.reference)
        return 0 if images is None or self.skipped else len(images) - self.real_images

    def measure(
        self,
        image_sampler: ImageSampler,
        model: nn.Module,
        labels: Tensor,
        *,
        keep: TakenSamples | None = None,
        stop_requested: Callable[[], bool] | None = None,
    ) -> Measured:
        """Sample and measure block by block, each rank its own; a collective call.

        Args:
            image_sampler: Decides the samples.
            model: Velocity model.
            labels: Requested classes, shape [n].
            keep: Takes the blocks that it wants, on the first rank.
            stop_requested: Tells on any rank, after a block, that it is not to go on.

        Returns:
            The same figures on all ranks.

        Raises:
            MeasuringStopped: It was not to go on; on all ranks.
            FrechetError: There are too few images for a distance, or samples that are not finite.
            DataError: The held-out images are out of reach, or cannot be used.
        """
        self.prepare()
        near = spread_evenly(len(labels), COMPARED_IMAGES)
        sets, extractions, chosen = self._sets(torch.arange(len(labels)), near=near)
        if self.skipped:
            sets, extractions = {}, []
        evaluations = torch.zeros(image_sampler.flow.stages.scales, dtype=torch.int64)
        for turn in image_sampler.turns(model, labels, ranks=self.ranks):
            if turn.own is not None:
                # Counted as they were made, so whole numbers, whose sum no order changes.
                nfe = torch.tensor(turn.own.nfe, dtype=torch.float64)
                evaluations += (nfe * len(turn.own.labels)).round().long()
                for extraction in extractions:
                    extraction.add(turn.own.images, turn.own.labels, turn.own.indices)
            if keep is not None:
                for block in turn.gather(self.ranks, wanted=keep.wants):
                    keep.add(block)
            if stop_requested is not None and self.ranks.reduce_min(int(not stop_requested())) == 0:
                raise MeasuringStopped("nothing is measured, as a stop was asked for")
        for extraction in extractions:
            extraction.flush()
        for each in sets.values():
            each.reduce(self.ranks)
        total = self.ranks.reduce_sum(evaluations)
        return Measured(
            distances=tuple(
                self._distance(name, images, near=near, chosen=chosen)
                for name, images in sets.items()
            ),
            nfe=tuple((total.double() / len(labels)).tolist()),
        )

    def _distance(
        self, name: str, samples: FeatureSet, *, near: Tensor, chosen: Tensor
    ) -> Distance:
        real, nearest, target = self._real.get(name), None, self._target[name]
        frechet = frechet_distance(samples.sums.statistics(), target.statistics)
        if real is not None:
            gathered = samples.gather(self.ranks, near)
            distances = nearest_distances(gathered, self._train[name].near, ranks=self.ranks)
            nearest = Nearness.of(distances, held_out=real.held_out)
        extractor, accuracy = self.extractors[name], None
        if isinstance(extractor, LearnedConvFeatures):
            accuracy = extractor.held_out_accuracy
        return Distance(
            features=name,
            frechet=frechet,
            diversity=samples.sums.within_class_variance(),
            nearest=nearest,
            more=measures(samples, self._compared(samples, chosen), target),
            real=None if real is None else real.figures,
            held_out_accuracy=accuracy,
        )


def reference_of_run(
    job: JobConfig,
    *,
    trained_on: str,
    features: Sequence[FeatureName],
    weights: FeatureConfig,
    device: torch.device,
    samples: int,
    compared: int,
    reference: str = "test",
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
    check_held(job, features, classifier=False)
    return EvalReference(
        job=job,
        context=context,
        ranks=HostGroup(alone=True),
        trained_on=trained_on,
        features=features,
        weights=weights,
        samples=samples,
        compared=compared,
        reference=reference,
    )
