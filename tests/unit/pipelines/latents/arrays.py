"""Arrays as other programs write them, and the command that takes them in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.shards import ShardedDataset
from tests.unit.pipelines.latents.encoding import stored
from trainer.cli.latents import main

CHANNELS, SIZE = 4, 4


def moments(count: int, *, views: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Made-up moments, [count, views, mean and deviation, channels, size, size]."""
    numbers = np.random.default_rng(seed).standard_normal(
        (count, views, 2, CHANNELS, SIZE, SIZE), dtype=np.float32
    )
    numbers[:, :, 1] = np.abs(numbers[:, :, 1])
    return numbers


def save(folder: Path, arrays: Sequence[NDArray[np.generic]], classes: int = 1) -> Path:
    """Write arrays into class folders in turn."""
    for number, array in enumerate(arrays):
        path = folder / f"class{number % classes}" / f"{number:03d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return folder


def take_in(place: Path, folder: Path, target: Path, *more: str) -> int:
    """Run the command in float32, for arrays of means and deviations unless told otherwise."""
    options = ["--autoencoder", str(place / "autoencoder"), "--dtype", "float32", "--workers", "1"]
    return main([str(folder), str(target), *options, "--arrays", "mean-std", *more])


def as_a_set(found: NDArray[np.generic]) -> list[bytes]:
    """Forget the order, which mixes the classes."""
    return sorted(sample.tobytes() for sample in found)


def same(prefix: Path, wanted: NDArray[np.float32]) -> bool:
    """Tell whether a dataset holds these moments, in whatever order."""
    return as_a_set(stored(prefix)) == as_a_set(wanted)


def labels(prefix: Path) -> dict[bytes, int]:
    """Label of each sample."""
    dataset = ShardedDataset(str(prefix))
    return {sample.data: sample.label for sample in map(dataset.read, range(len(dataset)))}
