"""Datasets of latents that are made by encoding the images of another dataset.

A part is encoded in batches that depend on nothing but the part, and on a CPU by one thread, so
which process of a machine encodes it, and after how many interruptions, changes no bit of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset import RawSample
from pipelines.decode.contract import DecodeConfig, decode_threads
from pipelines.decode.make import make_decoder
from pipelines.errors import BadLatentError, IngestSettingError, UndecodableImageError
from pipelines.index import LABEL_COLUMN
from pipelines.ingest.about import read_about
from pipelines.ingest.latent_config import EncodeConfig, Encoder
from pipelines.ingest.latent_origin import RECIPE, LatentPart, Origin
from pipelines.ingest.plan import Plan, cut, plan_digest
from pipelines.ingest.write import Filled, Part, WriteSample
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat
from pipelines.shards import ShardedDataset
from pipelines.source import is_url


def plan_encoding(source: str, prefix: str, *, encoder: Encoder, config: EncodeConfig) -> Plan:
    """Plan to encode the images of a dataset, and refuse a place that cannot take the latents.

    Batch and devices change the last bits of some latents, and may be changed to go on.

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
    source = source if is_url(source) else str(Path(source).expanduser().resolve())
    form = config.format(encoder)
    dataset = ShardedDataset(source, config=config.shards)
    if dataset.latents:
        raise IngestSettingError(f"{source} holds latents already. Give the prefix of the images.")
    about = read_about(source, config=config.shards)
    parts = cut(
        range(len(dataset)), shard_bytes=config.shard_bytes, size=lambda _: form.sample_bytes
    )
    decisive = {
        "recipe": RECIPE,
        "source": dataset.digest,
        "autoencoder": encoder.sha256,
        "precision": encoder.precision,
        "image_size": config.image_size,
        "format": form.encoding,
        "decoder": config.decoder,
        "parts": [(part.first, part.first + len(part.samples)) for part in parts],
    }
    origin = Origin(
        source=source,
        source_sha256=dataset.digest,
        count=len(dataset),
        encoder=encoder,
        precision=encoder.precision,
        format=form,
    )
    places = ", ".join(config.device(process) for process in range(config.workers))
    return Plan(
        prefix=prefix,
        parts=parts,
        open_filler=partial(LatentFiller, source=source, encoder=encoder, form=form, config=config),
        config=config,
        digest=plan_digest(decisive),
        classes=about.classes if about else (),
        opening=(f"{len(dataset):,} images to encode on {places}",),
        retry_skipped=False,
        documents=origin.documents,
    )


class LatentFiller:
    """Fills shards with the latents of images.

    Args:
        process: Number of the process that it works for.
        source: Prefix of the images.
        encoder: The autoencoder.
        form: How latents are stored.
        config: How to encode.

    Raises:
        DataError: The source cannot be read, or its images not be decoded on the device.
        IngestSettingError: The autoencoder does not fit the device's memory.
    """

    def __init__(
        self,
        process: int,
        *,
        source: str,
        encoder: Encoder,
        form: LatentFormat,
        config: EncodeConfig,
    ) -> None:
        self._device = device = config.device(process)
        threads = decode_threads(config.workers)
        if device == "cpu":
            # Sums over several threads end in other bits than those of one.
            threads = 1
            torch.set_num_threads(threads)
        self._source, self._encoder, self._form, self._batch = source, encoder, form, config.batch
        # Images are read one after the other.
        self._images = ShardedDataset(source, config=replace(config.shards, open_files=1))
        self._decode = make_decoder(
            config.decoder,
            DecodeConfig(image_size=config.image_size, scales=1, decode_threads=threads),
            device=device,
        )
        try:
            self._encode = encoder.load(device)
        except torch.OutOfMemoryError as error:
            raise IngestSettingError(
                f"The autoencoder at {encoder.place} takes more memory than {device} has left. Use "
                "fewer --workers for each device, or other --devices."
            ) from error
        self.columns: Mapping[str, str] = {MOMENTS_COLUMN: form.encoding, LABEL_COLUMN: "int"}

    def fill(self, part: Part[int], write: WriteSample) -> Filled:
        """Write the latents of one part, but for images that cannot be decoded."""
        self._images.prepare(np.array(part.samples))
        latents = LatentPart(write, form=self._form, encoder=self._encoder)
        for first in range(0, len(part.samples), self._batch):
            read = [self._images.read(place) for place in part.samples[first : first + self._batch]]
            samples, images = self._decode_sound(read, latents)
            if not samples:
                continue
            moments = self._moments(images, samples)
            for sample, stored in zip(samples, moments, strict=True):
                latents.add(stored, sample.label)
            for view in range(self._form.views):
                latents.sum(
                    [
                        (sample.sample_id, view, stored[view])
                        for sample, stored in zip(samples, moments, strict=True)
                    ]
                )
        return latents.finish()

    def _decode_sound(
        self, samples: Sequence[RawSample], latents: LatentPart
    ) -> tuple[Sequence[RawSample], Tensor]:
        """Decode what can be decoded, and leave out the rest."""
        while samples:
            try:
                (images,) = self._decode([sample.data for sample in samples])
                return samples, images
            except UndecodableImageError as error:
                # Only the first of the reasons is known, and the others are alike.
                bad = {samples[place].sample_id for place in error.indices}
                for place in bad:
                    name = f"sample {place} in shard {self._images.shard_of(place)}"
                    latents.skip(place, name, error.reason)
                samples = [sample for sample in samples if sample.sample_id not in bad]
        return samples, torch.empty(0)

    def _moments(self, images: Tensor, samples: Sequence[RawSample]) -> NDArray[Any]:
        """Encode images as [b, views, mean and deviation, channels, height, width]."""
        views = [images, images.flip(-1)][: self._form.views]
        try:
            # One view after the other, so that the first is the same with and without the second.
            moments = torch.stack([torch.stack(self._encode(view), 1) for view in views], 1)
        except torch.OutOfMemoryError as error:
            raise IngestSettingError(
                f"Encoding {len(images)} images at a time takes more memory than {self._device} "
                f"has left. Lower --batch {self._batch}; finished shards are kept."
            ) from error
        with np.errstate(over="ignore"):  # looked for below
            stored = moments.cpu().numpy().astype(self._form.dtype)
        finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
        if not finite.all():
            raise BadLatentError(
                f"The latent of sample {samples[int(finite.argmin())].sample_id} of "
                f"{self._source} is not finite in {self._form.dtype}. Use "
                "--dtype float32 or --precision fp32; if that does not help, the autoencoder or "
                "the image is at fault."
            )
        return stored
