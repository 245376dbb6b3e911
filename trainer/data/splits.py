"""The run's images: splits opened from the store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from pipelines.errors import MissingDatasetError
from pipelines.ingest.about import read_about
from pipelines.latent_format import LatentFormat
from pipelines.latent_record import RECORD_NAME, LatentRecord, read_latent_record
from pipelines.order import ConcatenatedDataset, MixedOrder, Order
from pipelines.shards import ShardedDataset, ShardsConfig
from pipelines.source import Source
from trainer.config import paths
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.storage.open import set_environment


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of the job's data set, opened.

    Attributes:
        streams: The data sets it consists of, usually one.
        weights: Weight of each; None takes each sample once per epoch.
    """

    streams: tuple[ShardedDataset, ...]
    weights: tuple[float, ...] | None

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @property
    def dataset(self) -> ShardedDataset | ConcatenatedDataset:
        """All samples."""
        return self.streams[0] if len(self.streams) == 1 else ConcatenatedDataset(self.streams)

    @property
    def latents(self) -> LatentFormat | None:
        """Format of the latents it holds; None if it holds images."""
        return self.streams[0].latents

    @property
    def digest(self) -> str:
        """SHA-256: which version of which data, and its weights."""
        if len(self.streams) == 1:
            return self.streams[0].digest
        parts = json.dumps([[stream.digest for stream in self.streams], self.weights])
        return hashlib.sha256(parts.encode()).hexdigest()

    def order(self, *, seed: int, block_samples: int | None) -> Order | None:
        """Say which sample comes when; None for each once per epoch."""
        if self.weights is None or len(self.streams) == 1:
            return None
        return MixedOrder(
            [stream.shard_sizes for stream in self.streams],
            weights=self.weights,
            seed=seed,
            block_samples=block_samples,
        )


def open_split(job: JobConfig, split: str) -> Split:
    """Open "train" or "test" of the job's data set.

    Raises:
        DataError: If the data set is missing, empty, damaged or out of reach.
        ConfigError: If it holds something else than the settings say.
    """
    prefixes = [f"{prefix}/{split}" for prefix in paths.data_prefixes(job)]
    streams = tuple(ShardedDataset(prefix, config=_shards(job)) for prefix in prefixes)
    for prefix, stream in zip(prefixes, streams, strict=True):
        _check_kind(job, stream.latents, prefix=prefix)
        if stream.latents != streams[0].latents:
            raise ConfigError(
                f"the latents at {prefix} are stored in another way ({stream.latents}) than those "
                f"at {prefixes[0]} ({streams[0].latents}); encode both with the same --dtype and "
                "--no-flips"
            )
    weights = [stream.weight for stream in job.data.streams if stream.weight is not None]
    return Split(streams=streams, weights=tuple(weights) or None)


def with_classes(job: JobConfig) -> JobConfig:
    """Fill in the number of classes from the data set's own list, where the settings leave it open.

    Raises:
        DataError: If the data set is missing or out of reach.
        ConfigError: If it has no list of classes.
    """
    if job.data.classes != 0:
        return job
    set_environment(job.store)
    prefix = f"{paths.data_prefixes(job)[0]}/train"
    about = read_about(prefix, config=job.shards)
    if about is None:
        Source(prefix, config=job.shards).read_index()  # there may be no data set at all
    if about is None or not about.classes:
        raise ConfigError(
            f"data.classes=0 takes the number of classes from their names in ingest.json, which "
            f"{prefix} does not have; set data.classes to the number of classes"
        )
    return replace(job, data=replace(job.data, classes=len(about.classes)))


def check_latents(job: JobConfig, *, codec_digest: str | None) -> None:
    """Make sure that stored latents serve the run, and that their images can be compared with.

    Raises:
        DataError: If the record of the latents is missing or damaged, or the images are.
        ConfigError: If another autoencoder made them, mirrored ones are wanted and not there, or
            the images are gone.
    """
    if job.data.space != "latent":
        return
    for split in ("train", "test"):
        streams = open_split(job, split).streams
        for prefix, stream in zip(paths.data_prefixes(job), streams, strict=True):
            place = f"{prefix}/{split}"
            record = _record(job, place)
            if (record.format, record.samples) != (stream.latents, len(stream)):
                raise ConfigError(
                    f"{place}/{RECORD_NAME} tells of {record.samples} latents stored as "
                    f"{record.format}, and the index beside it of {len(stream)} as "
                    f"{stream.latents}; restore the file that was written with the latents"
                )
            if record.autoencoder_sha256 != codec_digest:
                raise ConfigError(
                    f"the latents at {place} were made by another autoencoder (SHA-256 "
                    f"{record.autoencoder_sha256[:12]}…, from {record.autoencoder}) than that of "
                    f"codec.source={job.codec.source} ({str(codec_digest)[:12]}…); set "
                    "codec.source to theirs, or encode the images again"
                )
            if split == "train" and job.data.augment.flip and record.views == 1:
                raise ConfigError(
                    f"data.augment.flip=true needs latents of mirrored images, which {place} does "
                    "not hold; encode the images again without --no-flips, or set "
                    "data.augment.flip=false"
                )
    # What is missing would be missed only after the last image.
    open_images(job, "test")
    if job.eval.classifier or job.eval.features.name == "learned_conv":
        open_images(job, "train")


def open_images(job: JobConfig, split: str) -> Split:
    """Open the images of a split: what is trained on, or what its latents were made of.

    Raises:
        DataError: If they, or the record of the latents, are missing, damaged or out of reach.
        ConfigError: If the latents were made of other images than are there, or of unknown ones.
    """
    if job.data.space == "pixel":
        return open_split(job, split)
    streams = []
    for latents in paths.data_prefixes(job):
        record = _record(job, f"{latents}/{split}")
        prefix, moved = record.source, job.data.images_prefix
        if moved is not None:
            prefix = f"{moved.rstrip('/')}/{split}"
        elif record.source_sha256 is None:
            raise ConfigError(
                f"nobody knows the images of the latents at {latents}/{split}, which were taken "
                f"from arrays at {record.source}, and samples are compared with images; set "
                "data.images_prefix to the prefix above the splits of images of the same classes"
            )
        try:
            images = ShardedDataset(prefix, config=_shards(job))
        except MissingDatasetError as error:
            raise ConfigError(
                f"the images that the latents at {latents}/{split} were made of, which samples are "
                f"compared with, are not at {prefix}; set data.images_prefix to the prefix above "
                "their splits"
            ) from error
        if record.source_sha256 not in (None, images.digest):
            raise ConfigError(
                f"the latents at {latents}/{split} were made of other images than those at "
                f"{prefix}; set data.images_prefix to the prefix above the splits of the right "
                "ones, or encode the images again"
            )
        streams.append(images)
    return Split(streams=tuple(streams), weights=None)


def _shards(job: JobConfig) -> ShardsConfig:
    return replace(job.shards, cache_dir=job.shards.cache_dir or str(paths.cache(job)))


def _record(job: JobConfig, prefix: str) -> LatentRecord:
    return read_latent_record(prefix, config=job.shards)


def _check_kind(job: JobConfig, latents: LatentFormat | None, *, prefix: str) -> None:
    """Refuse images where latents are expected, the reverse, and latents of another shape."""
    found = "pixel" if latents is None else "latent"
    if found != job.data.space:
        what = {"pixel": "images", "latent": "latents"}
        raise ConfigError(
            f"{prefix} holds {what[found]}, and data.space={job.data.space} asks for "
            f"{what[job.data.space]}; set data.space={found}, or data.prefix to another place"
        )
    wanted = (job.data.channels, job.data.image_size)
    if latents is not None and (latents.channels, latents.size) != wanted:
        raise ConfigError(
            f"{prefix} holds latents of {latents.channels} channels and {latents.size} x "
            f"{latents.size} elements; set data.channels={latents.channels} and data.image_size="
            f"{latents.size} (now {wanted[0]} and {wanted[1]})"
        )
