"""What decoding images, and reading a shard to the end, finds out before training does."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import DecoderName, make_decoder
from pipelines.encoded import BadImageError, open_image, read_image
from pipelines.errors import (
    BadSampleError,
    CorruptShardError,
    DataError,
    MissingShardError,
    StoreUnreachableError,
    UndecodableImageError,
)
from pipelines.latent_format import LatentFormat
from pipelines.shards import ShardedDataset, ShardsConfig
from pipelines.source import Source

DIGEST_BYTES = 16  # at 2^-128 for a pair of images, equal digests mean equal bytes
_LOOKED_AT = 64  # samples that are decoded together
_BATCH_PIXELS = 1 << 25  # 96 MiB of RGB that are decoded at a time


class DamageCheck:
    """Decodes images as training does, on the processor, and each of them whole.

    Args:
        decoder: The decoder that trains.
    """

    def __init__(self, decoder: DecoderName = "dali") -> None:
        config = DecodeConfig(image_size=1, scales=1, decode_threads=1, whole=True)
        self._decoder = make_decoder(decoder, config, device="cpu")

    def problems(self, samples: Sequence[bytes]) -> dict[int, str]:
        """Say what is wrong with each image that cannot be decoded, by its place."""
        problems: dict[int, str] = {}
        batch: dict[int, Any] = {}
        total = 0
        for place, sample in enumerate(samples):
            try:
                width, height = read_image(sample).upright_size
                prepared = self._decoder.prepare(sample, None)
            except BadSampleError as error:
                problems[place] = str(error)
                continue
            if batch and total + width * height > _BATCH_PIXELS:
                problems |= self._decode(batch)
                batch, total = {}, 0
            batch[place] = prepared
            total += width * height
        if batch:
            problems |= self._decode(batch)
        return problems

    def _decode(self, batch: Mapping[int, Any]) -> dict[int, str]:
        try:
            self._decoder.decode(list(batch.values()))
        except UndecodableImageError as error:
            places = list(batch)
            return {places[index]: error.reason for index in error.indices}
        return {}


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample whose content cannot be used.

    Attributes:
        sample_id: Its place in the dataset.
        shard: The file it lies in.
        problem: What is wrong.
    """

    sample_id: int
    shard: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What one shard holds.

    Attributes:
        shard: Name of the file.
        sample_ids: Samples that could be read, int64 [n].
        labels: Their labels, int64 [n].
        digests: Digests of their content, uint8 [n, DIGEST_BYTES].
        sizes: How many there are of each (width, height), in pixels, when upright.
        kinds: How many there are of each file format and colour mode.
        bad_samples: Those that were read and cannot be used.
        lost: Samples that could not be read.
        problem: Why, of the first of them.
    """

    shard: str
    sample_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    digests: NDArray[np.uint8]
    sizes: Counter[tuple[int, int]]
    kinds: Counter[str]
    bad_samples: tuple[BadSample, ...]
    lost: int
    problem: str


class _Contents:
    """What the samples of one shard are, found out some of them at a time.

    Args:
        latents: Format of the latents that they are; None if they are images.
        decoder: Decodes the images.
    """

    def __init__(self, latents: LatentFormat | None, decoder: DecoderName) -> None:
        self._latents = latents
        self._decoder = decoder
        self._waiting: dict[int, bytes] = {}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.kinds: Counter[str] = Counter()
        self.problems: dict[int, str] = {}

    def add(self, sample_id: int, data: bytes) -> None:
        """Take a sample, to be looked at now or with the next ones."""
        self._waiting[sample_id] = data
        if len(self._waiting) == _LOOKED_AT:
            self.look()

    def look(self) -> None:
        """Look at the samples that have been taken since."""
        waiting, self._waiting = self._waiting, {}
        problems = {}
        if not self._latents:
            found = _damage_check(self._decoder).problems(list(waiting.values()))
            problems = {list(waiting)[place]: problem for place, problem in found.items()}
        for sample_id, data in waiting.items():
            try:
                if sample_id in problems:
                    raise BadImageError(problems[sample_id])
                kind, size = _kind_of_latent(data, self._latents) if self._latents else _kind(data)
            except (BadImageError, DataError) as error:
                self.problems[sample_id] = str(error)
            else:
                self.kinds[kind] += 1
                self.sizes[size] += 1


def inspect(
    prefix: str,
    sample_ids: range,
    *,
    scratch: Path,
    config: ShardsConfig,
    decoder: DecoderName = "dali",
) -> Inspection:
    """Read every sample of one shard.

    Args:
        prefix: Local folder or URL of the dataset.
        sample_ids: The samples of the shard, at least one.
        scratch: Folder of this verification for shards that have to be fetched; each process keeps
            one shard at a time there.
        config: Attempts and time limits.
        decoder: Decodes the images, as in training.

    Raises:
        StoreUnreachableError: The store does not even give the index.
    """
    dataset = _open(prefix, scratch, config)
    shard = dataset.shard_of(sample_ids[0])
    read: list[tuple[int, int, bytes]] = []
    contents = _Contents(dataset.latents, decoder)
    lost, problem = 0, ""
    for sample_id in sample_ids:
        try:
            sample = dataset.read(sample_id)
        except (MissingShardError, CorruptShardError) as error:
            lost, problem = lost + 1, problem or str(error)
            continue
        except (StoreUnreachableError, OSError) as error:
            # If the store is still there for others, the fault is this shard's.
            Source(prefix, config=config).read_index()
            lost, problem = sample_ids.stop - sample_id + lost, problem or str(error)
            break
        digest = hashlib.blake2b(sample.data, digest_size=DIGEST_BYTES).digest()
        read.append((sample_id, sample.label, digest))
        contents.add(sample_id, sample.data)
    contents.look()
    ids, labels, digests = zip(*read, strict=True) if read else ((), (), ())
    return Inspection(
        shard=shard,
        sample_ids=np.array(ids, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        digests=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        sizes=contents.sizes,
        kinds=contents.kinds,
        bad_samples=tuple(
            BadSample(sample_id=sample_id, shard=shard, problem=problem)
            for sample_id, problem in contents.problems.items()
        ),
        lost=lost,
        problem=problem,
    )


@lru_cache(maxsize=1)
def _open(prefix: str, scratch: Path, config: ShardsConfig) -> ShardedDataset:
    """Open the dataset, once in each process.

    Shards are fetched anew, because what is to be read is the store and not the node's cache, and
    are dropped for the next one.
    """
    return ShardedDataset(
        prefix,
        config=replace(
            config,
            cache_dir=str(scratch / str(os.getpid())),
            cache_limit_gib=2.0**-30,
            open_files=1,
        ),
    )


@lru_cache(maxsize=1)
def _damage_check(decoder: DecoderName) -> DamageCheck:
    """Make the decoder, once in each process."""
    return DamageCheck(decoder)


def _kind(data: bytes) -> tuple[str, tuple[int, int]]:
    """Name the format and colour mode of a sound image; give (width, height), when upright."""
    image = read_image(data)
    return f"{image.format} {open_image(image).mode}", image.upright_size


def _kind_of_latent(data: bytes, latents: LatentFormat) -> tuple[str, tuple[int, int]]:
    """Read one latent; give its kind, and (width, height).

    Raises:
        DataError: It is no latent.
    """
    for mirrored in (False, True)[: latents.views]:
        latents.moments(data, mirrored=mirrored)
    mirror = ", mirrored ones too" if latents.views == 2 else ""
    return f"{latents.dtype} of {latents.channels} channels{mirror}", (latents.size,) * 2
