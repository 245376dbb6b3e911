"""The handwritten digits that come with scikit-learn, as a dataset: 1797 grey images of 8 x 8.

    python -m pipelines.ingest digits data/digits

writes <prefix>/train and <prefix>/test. It needs no network, so it is the dataset of the main job
on a machine without one, and of the tests.
"""

import argparse
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pipelines.encoded import as_png
from pipelines.errors import IngestSettingError
from pipelines.ingest.write import LabelledImage, has_dataset, write_dataset
from pipelines.order import permutation

IMAGE_SIZE = 8
CHANNELS = 1
CLASSES = 10

_BRIGHTEST = 16  # the values in scikit-learn are 0, …, 16


def ensure_digits(prefix: str, *, test_share: float = 0.2, seed: int = 0) -> None:
    """Write the dataset unless it is there.

    Args:
        prefix: Local folder or URL, to which /train and /test are added. Finished datasets there
            are taken to be the digits.
        test_share: Share of each class that goes to the test split.
        seed: Seed of the split.

    Raises:
        IngestSettingError: The seed is negative.
    """
    if seed < 0:
        raise IngestSettingError(f"seed={seed} must be 0 or more.")
    prefix = prefix.rstrip("/")
    missing = [split for split in ("train", "test") if not has_dataset(f"{prefix}/{split}")]
    if not missing:
        return
    images, labels = _load()
    in_test = _choose_test(labels, share=test_share, seed=seed)
    for split in missing:
        chosen = np.flatnonzero(in_test == (split == "test"))
        write_dataset(_encode(images[chosen], labels[chosen]), f"{prefix}/{split}")


def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / _BRIGHTEST)).astype(np.uint8)
    return images, digits.target.astype(np.int64)


def _choose_test(labels: NDArray[np.int64], *, share: float, seed: int) -> NDArray[np.bool_]:
    """Mark the same share of each class, chosen at random."""
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[permutation(len(members), seed, int(label))]
        in_test[shuffled[: round(share * len(members))]] = True
    return in_test


def _encode(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterable[LabelledImage]:
    for image, label in zip(images, labels, strict=True):
        yield LabelledImage(as_png(image[..., np.newaxis]), int(label))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("prefix", help="local folder or s3:// URL; /train and /test are added")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split into train and test")


def run(options: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Carry out a parsed command line."""
    ensure_digits(options.prefix, seed=options.seed)
    note(f"{options.prefix}: complete")
    return 0
