"""Shards of latents: how a dataset is cut into them, and how each is filled.

A part is encoded in batches that depend on nothing but the part, and on a CPU by one thread, so
which process of a machine encodes it, and after how many interruptions, changes no bit of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import SampleKey
from pipelines.dataset import RawSample
from pipelines.decode.contract import DecodeConfig, decode_threads
from pipelines.decode.make import DecoderName, make_decoder
from pipelines.errors import BadLatentError, IngestSettingError, UndecodableImageError
from pipelines.index import LABEL_COLUMN
from pipelines.ingest.latents.band_sums import BandSums
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.shard_files import Filled, WriteSample
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat
from pipelines.shards import ShardedDataset, ShardsConfig


@dataclass(frozen=True, kw_only=True)
class LatentPart:
    """What becomes one shard.

    Attributes:
        number: Place among the shards.
        first: Id of its first image in the source.
        stop: Id after that of its last one.
    """

    number: int
    first: int
    stop: int


def cut(images: int, *, sample_bytes: int, shard_bytes: int) -> tuple[LatentPart, ...]:
    """Cut a source into parts of at most ``shard_bytes`` of latents, one latent at least."""
    step = max(1, shard_bytes // sample_bytes)
    return tuple(
        LatentPart(number=number, first=first, stop=min(first + step, images))
        for number, first in enumerate(range(0, images, step))
    )


@dataclass(frozen=True, kw_only=True)
class OpenLatentFiller:
    """Makes fillers.

    Attributes:
        source: Prefix of the images.
        shards: How their shards are fetched and kept.
        encoder: The autoencoder.
        image_size: Height and width that images are decoded to, in pixels.
        format: How latents are stored.
        batch: Images encoded at a time.
        decoder: What decodes the images.
        devices: "cpu" or "cuda:N" of each process.
    """

    source: str
    shards: ShardsConfig
    encoder: Encoder
    image_size: int
    format: LatentFormat
    batch: int
    decoder: DecoderName
    devices: tuple[str, ...]

    def __call__(self, number: int) -> "LatentFiller":
        """Make that of one process."""
        return LatentFiller(self, device=self.devices[number])


class LatentFiller:
    """Fills shards with the latents of images.

    Args:
        settings: What to encode how.
        device: "cpu" or "cuda:N".

    Raises:
        DataError: The source cannot be read, or its images not be decoded on the device.
        IngestSettingError: The autoencoder does not fit the device's memory.
    """

    def __init__(self, settings: OpenLatentFiller, *, device: str) -> None:
        threads = decode_threads(len(settings.devices))
        if device == "cpu":
            # Sums over several threads end in other bits than those of one.
            threads = 1
            torch.set_num_threads(threads)
        self._settings = settings
        self._device = device
        # Images are read one after the other.
        self._images = ShardedDataset(
            settings.source, config=replace(settings.shards, open_files=1)
        )
        self._decode = make_decoder(
            settings.decoder,
            DecodeConfig(
                image_size=settings.image_size,
                channels=3,
                scales=1,
                decode_threads=threads,
            ),
            device=device,
        )
        try:
            self._encode = settings.encoder.load(device)
        except torch.OutOfMemoryError as error:
            raise IngestSettingError(
                f"The autoencoder at {settings.encoder.place} takes more memory than {device} has "
                "left. Use fewer --workers for each device, or other --devices."
            ) from error
        self.columns: Mapping[str, str] = {
            MOMENTS_COLUMN: settings.format.encoding,
            LABEL_COLUMN: "int",
        }

    def fill(self, part: LatentPart, write: WriteSample) -> Filled:
        """Write the latents of one part, but for images that cannot be decoded."""
        self._images.prepare(np.arange(part.first, part.stop))
        sums = BandSums(self._settings.format.size)
        labels: Counter[int] = Counter()
        skipped: dict[int, str] = {}
        for first in range(part.first, part.stop, self._settings.batch):
            ids = range(first, min(first + self._settings.batch, part.stop))
            samples, images = self._decoded([self._images.read(place) for place in ids], skipped)
            if not samples:
                continue
            moments = self._moments(images, samples)
            for sample, stored in zip(samples, moments, strict=True):
                write({MOMENTS_COLUMN: stored, LABEL_COLUMN: sample.label})
                labels[sample.label] += 1
            for view in range(moments.shape[1]):
                sums.add(self._latents(moments[:, view], samples, view=view))
        names = {
            place: f"sample {place} in shard {self._images.shard_of(place)}" for place in skipped
        }
        return Filled(
            skipped=tuple((names[place], reason) for place, reason in sorted(skipped.items())),
            noted={
                "skipped": sorted(skipped),
                "labels": sorted(labels.items()),
                "sums": sums.as_json(),
            },
        )

    def _decoded(
        self, samples: Sequence[RawSample], skipped: dict[int, str]
    ) -> tuple[Sequence[RawSample], Tensor]:
        """Decode what can be decoded, and note the rest."""
        while samples:
            try:
                (images,) = self._decode([sample.data for sample in samples])
                return samples, images
            except UndecodableImageError as error:
                # Only the first of the reasons is known, and the others are alike.
                bad = {samples[place].sample_id for place in error.indices}
                skipped.update(dict.fromkeys(bad, error.reason))
                samples = [sample for sample in samples if sample.sample_id not in bad]
        return samples, torch.empty(0)

    def _moments(self, images: Tensor, samples: Sequence[RawSample]) -> NDArray[Any]:
        """Encode images as [b, views, mean and deviation, channels, height, width]."""
        views = [images, images.flip(-1)][: self._settings.format.views]
        try:
            # One view after the other, so that the first is the same with and without the second.
            moments = torch.stack([torch.stack(self._encode(view), 1) for view in views], 1)
        except torch.OutOfMemoryError as error:
            raise IngestSettingError(
                f"Encoding {len(images)} images at a time takes more memory than {self._device} "
                f"has left. Lower --batch {self._settings.batch}; finished shards are kept."
            ) from error
        with np.errstate(over="ignore"):  # looked for below
            stored = moments.cpu().numpy().astype(self._settings.format.dtype)
        finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
        if not finite.all():
            raise BadLatentError(
                f"The latent of sample {samples[int(finite.argmin())].sample_id} of "
                f"{self._settings.source} is not finite in {self._settings.format.dtype}. Use "
                "--dtype float32 or --precision fp32; if that does not help, the autoencoder or "
                "the image is at fault."
            )
        return stored

    def _latents(self, moments: NDArray[Any], samples: Sequence[RawSample], *, view: int) -> Tensor:
        """Draw latents from what was stored, [b, channels, height, width], shifted and scaled."""
        mean, std = moments[:, 0].astype(np.float32), moments[:, 1].astype(np.float32)
        keys = [SampleKey(seed=0, epoch=view, sample_id=sample.sample_id) for sample in samples]
        normals = np.stack([key.normals(mean[0].size) for key in keys]).reshape(mean.shape)
        encoder = self._settings.encoder
        return torch.from_numpy((mean + std * normals - encoder.shift) * encoder.scale)
