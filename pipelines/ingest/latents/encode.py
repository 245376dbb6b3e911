"""Encode the images of a dataset into a dataset of latents, or go on with one begun earlier."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.decode.make import DecoderName
from pipelines.errors import IngestSettingError
from pipelines.ingest.about import read_about
from pipelines.ingest.build import build, is_complete, refuse_too_many
from pipelines.ingest.latents.documents import Origin
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.latents.shards import LatentPart, OpenLatentFiller, cut
from pipelines.ingest.progress import Progress
from pipelines.ingest.shard_files import FinishedShard, write_shards
from pipelines.latent_format import LatentFormat
from pipelines.shards import ShardedDataset, ShardsConfig
from pipelines.source import is_url

_RECIPE = 1  # counts up when the same settings come to give other latents
_MAX_SHARD_BYTES = 1 << 31
_RGB = 3


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images are encoded.

    Attributes:
        image_size: Height and width that images are cropped and resized to first, in pixels.
        dtype: Type of the stored numbers.
        flips: Encode the mirrored images too.
        decoder: What decodes the images.
        batch: Images encoded at a time.
        devices: "cpu" or "cuda:N", for each process.
        shard_bytes: Size of a shard of latents, about.
        max_skipped_share: Share of the images that may be left out for being undecodable.
        work_dir: Folder for unfinished shards of a remote dataset.
        shards: How the images' shards are fetched and kept.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    image_size: int
    dtype: Literal["float16", "float32"] = "float16"
    flips: bool = True
    decoder: DecoderName = "dali"
    batch: int = 32
    devices: tuple[str, ...] = ("cpu",)
    shard_bytes: int = 1 << 26
    max_skipped_share: float = 0.01
    work_dir: Path = Path("~/.cache/lapflow/ingest")
    shards: ShardsConfig

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise IngestSettingError(f"batch={self.batch} must be at least 1.")
        if not self.devices:
            raise IngestSettingError("devices is empty; name one for each process.")
        if not 1 <= self.shard_bytes <= _MAX_SHARD_BYTES:
            raise IngestSettingError(
                f"shard_bytes={self.shard_bytes} must lie between 1 and {_MAX_SHARD_BYTES}."
            )
        if not 0 <= self.max_skipped_share <= 1:
            raise IngestSettingError(
                f"max_skipped_share={self.max_skipped_share} must lie in [0, 1]."
            )

    def format(self, encoder: Encoder) -> LatentFormat:
        """Say how the latents of an autoencoder are stored.

        Raises:
            IngestSettingError: It does not take such images.
        """
        if encoder.image_channels != _RGB:
            raise IngestSettingError(
                f"The autoencoder at {encoder.place} takes images of {encoder.image_channels} "
                "channels; latents are made of RGB images. Choose an autoencoder of 3 channels."
            )
        factor = encoder.factor
        if self.image_size < factor or self.image_size % factor:
            near = max(1, round(self.image_size / factor)) * factor
            raise IngestSettingError(
                f"Images of image_size={self.image_size} cannot be encoded by the autoencoder at "
                f"{encoder.place}, which makes one element of {factor} x {factor} pixels. Choose a "
                f"multiple of {factor}, such as {near}."
            )
        return LatentFormat(
            dtype=self.dtype,
            views=2 if self.flips else 1,
            channels=encoder.channels,
            size=self.image_size // factor,
        )


class LatentPlan:
    """What is to be encoded to where, known before anything is.

    Args:
        source: Prefix of one split of images.
        prefix: Prefix of the latents.
        encoder: The autoencoder.
        config: How to encode.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        IngestSettingError: The autoencoder does not take such images, or the source holds none.
        DataError: The source cannot be read, or the prefix not be looked into.
    """

    def __init__(self, source: str, prefix: str, *, encoder: Encoder, config: EncodeConfig) -> None:
        self._source = source if is_url(source) else str(Path(source).expanduser().resolve())
        self._prefix = prefix
        self._encoder = encoder
        self._config = config
        self._format = config.format(encoder)
        dataset = ShardedDataset(self._source, config=config.shards)
        if dataset.latents:
            raise IngestSettingError(
                f"{self._source} holds latents already. Give the prefix of the images."
            )
        self._count = len(dataset)
        self._source_sha256 = dataset.digest
        about = read_about(self._source, config=config.shards)
        self._classes = about.classes if about else ()
        self._parts = cut(
            self._count,
            sample_bytes=self._format.sample_bytes,
            shard_bytes=config.shard_bytes,
        )
        self._digest = self._plan_digest()
        is_complete(prefix, plan=self._digest)

    def carry_out(self, note: Callable[[str], None]) -> None:
        """Encode what is not encoded yet.

        Args:
            note: Takes lines for the user.

        Raises:
            BadDataError: Too many images cannot be decoded; what is finished is kept.
            EmptyDatasetError: None can.
            BadLatentError: A latent cannot be stored in the type chosen.
            BrokenIngestError: A process died.
            DataError: The source cannot be read, or the prefix not be written.
        """
        config = self._config
        origin = Origin(
            plan=self._digest,
            source=self._source,
            source_sha256=self._source_sha256,
            count=self._count,
            classes=self._classes,
            encoder=self._encoder,
            precision=self._encoder.precision,
            format=self._format,
        )
        build(
            self._prefix,
            plan=self._digest,
            shards=lambda work: self._shards(work, note),
            documents=origin.documents,
            work_dir=config.work_dir,
            note=note,
        )

    def _plan_digest(self) -> str:
        """Digest of all that decides the latents.

        Batch and devices change the last bits of some, and may be changed to go on.
        """
        config, encoder = self._config, self._encoder
        decisive = {
            "recipe": _RECIPE,
            "source": self._source_sha256,
            "autoencoder": encoder.sha256,
            "precision": encoder.precision,
            "image_size": config.image_size,
            "format": self._format.encoding,
            "decoder": config.decoder,
            "parts": [(part.first, part.stop) for part in self._parts],
        }
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def _shards(self, work: Path, note: Callable[[str], None]) -> Iterator[FinishedShard]:
        config = self._config
        note(f"{self._count:,} images to encode on {', '.join(config.devices)}")
        finished = write_shards(
            self._parts,
            work,
            plan=self._digest,
            open_filler=OpenLatentFiller(
                source=self._source,
                shards=config.shards,
                encoder=self._encoder,
                image_size=config.image_size,
                format=self._format,
                batch=config.batch,
                decoder=config.decoder,
                devices=config.devices,
            ),
            workers=len(config.devices),
        )
        skipped: list[tuple[str, str]] = []
        progress = Progress([_images(part) for part in self._parts], note=note)
        for shard in progress.follow(finished):
            skipped += shard.filled.skipped
            # Encoding takes hours, so it does not wait until the end.
            refuse_too_many(skipped, images=self._count, max_skipped_share=config.max_skipped_share)
            yield shard


def _images(part: LatentPart) -> int:
    return part.stop - part.first
