"""Processes of their own that read a dataset batch by batch, for tests that kill them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from pipelines.decode.contract import DecodeConfig
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Batch, Cursor, Loader
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.forked import forked

BATCH_IMAGES = 8
IMAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader reads.

    Attributes:
        prefix: Of the dataset.
        shards: How shards are fetched and kept.
        environment: Variables that name the store and its credentials, and others.
        batches: How many of them.
    """

    prefix: str
    shards: ShardsConfig
    environment: dict[str, str]
    batches: int

    def digests(self) -> Iterator[str]:
        """Read in this process, and give the SHA-256 of each batch: ids, labels and pixels."""
        loader = Loader(
            ShardedDataset(self.prefix, config=self.shards),
            config=LoaderConfig(decoder="pillow", shuffle_block_samples=2 * BATCH_IMAGES),
            decode=DecodeConfig(image_size=IMAGE_SIZE),
            seed=3,
            batch_images=BATCH_IMAGES,
        )
        with loader, closing(loader.batches(Cursor())) as batches:
            for _ in range(self.batches):
                yield _digest(next(batches)[0])


class Reader:
    """A running process.

    Args:
        reading: What it reads.
        before: What it does first.
    """

    def __init__(self, reading: Reading, *, before: Callable[[], object] | None = None) -> None:
        self._pipe, theirs = forked.Pipe(duplex=False)
        self.process: BaseProcess = forked.Process(target=_read, args=(reading, theirs, before))
        self.process.start()
        theirs.close()

    def digests(self) -> Iterator[str]:
        """The batches' digests as they come.

        Raises:
            Exception: What ended the reader, if something did; EOFError if it was killed.
        """
        while (message := self._pipe.recv()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message
        self.process.join()

    def kill(self) -> None:
        """End it as the system ends a process that uses too much memory."""
        self.process.kill()
        self.process.join()


def _read(reading: Reading, pipe: Connection, before: Callable[[], object] | None) -> None:
    os.environ.update(reading.environment)
    try:
        if before is not None:
            before()
        for digest in reading.digests():
            pipe.send(digest)
        pipe.send(None)
    except Exception as error:
        pipe.send(error)


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in (batch.sample_ids, batch.labels, *batch.bands):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
