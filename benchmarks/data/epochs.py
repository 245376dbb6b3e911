"""A dataset in a folder and in an S3 server, and loaders over both."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.data.photographs import label_files
from pipelines.augment import AugmentConfig
from pipelines.decode.contract import DecodeConfig
from pipelines.ingest.write import write_dataset
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Cursor, Loader
from pipelines.shards import ShardedDataset, ShardsConfig
from trainer.data.loading import return_large_blocks

_SHARD_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Places:
    """The same dataset in two places.

    Attributes:
        local: Folder.
        remote: `s3://` URL; None without a server.
        samples: How many there are.
        scratch: Folder for caches.
    """

    local: str
    remote: str | None
    samples: int
    scratch: Path

    @property
    def named(self) -> dict[str, str]:
        """Prefixes by what to call them."""
        return {"local files": self.local, **({"S3": self.remote} if self.remote else {})}


@contextmanager
def write_places(files: Sequence[bytes], *, samples: int, with_s3: bool) -> Iterator[Places]:
    """Write samples to a temporary folder and, if asked for, to an S3 server of its own.

    Args:
        files: Encoded images, which are repeated.
        samples: How many to write.
        with_s3: Start a server on loopback (OpenStack Swift, as in the tests) and write there too.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lapflow-bench-")))
        local = str(folder / "dataset")
        write_dataset(label_files(files, count=samples), local, shard_bytes=_SHARD_BYTES)
        remote = None
        if with_s3:
            from tests.support.s3_server import s3_server

            server = stack.enter_context(s3_server(folder / "s3"))
            os.environ.update(server.environment)
            remote = f"{server.make_bucket('bench')}/dataset"
            write_dataset(label_files(files, count=samples), remote, shard_bytes=_SHARD_BYTES)
        yield Places(local=local, remote=remote, samples=samples, scratch=folder)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a loader reads.

    Attributes:
        image_size: Height and width in pixels.
        channels: 1 or 3.
        scales: Bands.
        batch: Images in a batch.
        decode_threads: Threads; None is the loader's own choice.
        device: Where the bands go.
    """

    image_size: int
    channels: int = 3
    scales: int = 2
    batch: int
    decode_threads: int | None = None
    device: torch.device

    def loader(self, prefix: str, *, cache: Path) -> Loader:
        """Open a dataset and make its loader."""
        if self.device.type == "cpu":
            return_large_blocks()
        config = LoaderConfig(decode_threads=self.decode_threads)
        return Loader(
            ShardedDataset(prefix, config=ShardsConfig(cache_dir=str(cache))),
            config=config,
            decode=DecodeConfig(
                image_size=self.image_size,
                channels=1 if self.channels == 1 else 3,
                scales=self.scales,
                decode_threads=config.threads_for(1),
                augment=AugmentConfig(flip=True),
            ),
            seed=0,
            batch_images=self.batch,
            device=str(self.device),
        )


def read(loader: Loader, *, start: int, images: int) -> Iterator[int]:
    """Read on from a place in the run; give the images read so far after each batch."""
    done = 0
    for batch, _ in loader.batches(Cursor(start)):
        done += len(batch.labels)
        yield done
        if done >= images:
            return
