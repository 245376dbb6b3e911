"""Datasets on disk: reading them whole, and doing them harm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.ingest.images import IngestConfig, plan_images
from pipelines.ingest.listing import Listing
from pipelines.ingest.write import LabelledImage
from pipelines.shards import ShardedDataset, ShardsConfig


def ingest(
    listing: Listing, prefix: str, *, config: IngestConfig, report: Callable[[str], None]
) -> None:
    """Write the images of a listing, or go on with what was interrupted."""
    plan_images(listing, prefix, config=config).carry_out(report)


def cached(prefix: Path, cache: Path, **config: Any) -> ShardedDataset:
    """The dataset as if it were remote: read through a cache."""
    return ShardedDataset(f"file://{prefix}", config=ShardsConfig(cache_dir=str(cache), **config))


def read_all(dataset: ShardedDataset) -> list[tuple[bytes, int, int]]:
    samples = [dataset.read(sample_id) for sample_id in range(len(dataset))]
    return [(sample.data, sample.label, sample.sample_id) for sample in samples]


def expected(images: list[LabelledImage]) -> list[tuple[bytes, int, int]]:
    return [(image.data, image.label, number) for number, image in enumerate(images)]


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.mds"))


def flip(path: Path, place: int = -10) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
