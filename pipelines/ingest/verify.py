"""Read a whole dataset once, and say what is in it.

    python -m pipelines.ingest verify data/digits/train

checks every shard against its hash, decodes every image, and counts the classes.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.encoded import BadImageError, open_image, pixels
from pipelines.shards import ShardedDataset, ShardsConfig


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a dataset holds.

    Attributes:
        images: How many.
        shards: In how many files.
        digest: SHA-256 of the index.
        images_per_class: By label.
        images_per_size: By (width, height) in pixels.
        undecodable: Sample id, shard and reason of each image that cannot be decoded.
    """

    images: int
    shards: int
    digest: str
    images_per_class: Mapping[int, int]
    images_per_size: Mapping[tuple[int, int], int]
    undecodable: Sequence[tuple[int, str, str]]


def verify(prefix: str, *, config: ShardsConfig | None = None) -> Report:
    """Read and decode every sample.

    Raises:
        DataError: The dataset cannot be read, see `pipelines.shards.ShardedDataset`.
    """
    dataset = ShardedDataset(prefix, config=config)
    classes: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    undecodable = []
    for sample_id in range(len(dataset)):
        sample = dataset.read(sample_id)
        classes[sample.label] += 1
        try:
            image = open_image(sample.data)
            pixels(image, channels=3)
        except BadImageError as error:
            undecodable.append((sample_id, dataset.shard_of(sample_id), str(error)))
        else:
            sizes[image.size] += 1
    return Report(
        images=len(dataset),
        shards=len(dataset.shard_sizes),
        digest=dataset.digest,
        images_per_class=dict(sorted(classes.items())),
        images_per_size=dict(sizes.most_common()),
        undecodable=undecodable,
    )


def describe(report: Report) -> str:
    """Put a report into words."""
    (size, count), *others = report.images_per_size.items() or [((0, 0), 0)]
    labels = report.images_per_class
    lines = [
        f"{report.images} images in {report.shards} shards, index sha256 {report.digest}",
        f"{count} of {size[0]} x {size[1]} pixels, {len(others)} other sizes",
        f"{len(labels)} classes, labels {min(labels)} to {max(labels)}, "
        f"{min(labels.values())} to {max(labels.values())} images each",
        f"{len(report.undecodable)} images cannot be decoded",
    ]
    for sample_id, shard, reason in report.undecodable:
        lines.append(f"  sample {sample_id} in shard {shard}: {reason}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("prefix", help="local folder or s3:// URL of one split")


def run(options: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Carry out a parsed command line.

    Returns:
        Exit status: 1 if images cannot be decoded.
    """
    report = verify(options.prefix)
    note(describe(report))
    return 1 if report.undecodable else 0
