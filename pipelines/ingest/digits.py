"""The handwritten digits that come with scikit-learn, as a dataset: 1797 grey images of 8 x 8.

They need no network, so they are the dataset of the main job on a machine without one, and of the
tests.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.encoded import as_png
from pipelines.ingest.listing import choose_fraction
from pipelines.ingest.plan import check_seed
from pipelines.ingest.target import has_dataset
from pipelines.ingest.write import LabelledImage, write_dataset

IMAGE_SIZE = 8
CHANNELS = 1
CLASSES = 10

_BRIGHTEST = 16  # the values in scikit-learn are 0, …, 16


def ensure_digits(prefix: str, *, test_fraction: float = 0.2, seed: int = 0) -> None:
    """Write the dataset unless it is there.

    Args:
        prefix: Local folder or URL, to which /train and /test are added. Finished datasets there
            are taken to be the digits.
        test_fraction: Fraction of each class that goes to the test split.
        seed: Seed of the split.

    Raises:
        IngestSettingError: The seed is negative.
    """
    check_seed(seed)
    prefix = prefix.rstrip("/")
    missing = [split for split in ("train", "test") if not has_dataset(f"{prefix}/{split}")]
    if not missing:
        return
    images, labels = _load()
    in_test = choose_fraction(labels, fraction=test_fraction, seed=seed)
    for split in missing:
        chosen = np.flatnonzero(in_test == (split == "test"))
        write_dataset(_encode(images[chosen], labels[chosen]), f"{prefix}/{split}")


def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    # Its file alone: to import what reads it, SciPy included, takes a second.
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",")  # 64 values from left to right and down, and the label
    values = rows[:, :-1].reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    images = np.rint(values * (255 / _BRIGHTEST)).astype(np.uint8)
    return images, rows[:, -1].astype(np.int64)


def _encode(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterable[LabelledImage]:
    for image, label in zip(images, labels, strict=True):
        yield LabelledImage(as_png(image[..., np.newaxis]), int(label))
