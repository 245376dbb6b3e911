"""What was measured of a run's checkpoints, for choosing among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from trainer.checkpoint import layout
from trainer.checkpoint.store import Store
from trainer.evaluate.measured import measured_distances


class _Measured(NamedTuple):
    """One distance; of several of one checkpoint the greatest counts."""

    samples: int
    report: str
    frechet: float


def frechet_scores(store: Store, run: str, features: str) -> dict[int, float]:
    """Read the Fréchet distances of a run's checkpoints by one extractor: see `measured_scores`."""
    return measured_scores(store, run).get(features, {})


def measured_scores(store: Store, run: str) -> dict[str, dict[int, float]]:
    """Read the Fréchet distances of the EMA weights of a run's checkpoints.

    Where one was measured several times, the measurement with most samples counts, and of equal
    ones the last by name. Distances fall with the number of samples, so checkpoints compare only
    where they were measured alike, which is the user's to see to.

    Args:
        store: Where runs are kept.
        run: Name of the run.

    Returns:
        For each extractor the distances by images, of checkpoints that exist. A report that makes
        no sense is passed over with a warning that names it.

    Raises:
        StoreError: The store fails, which does not mean that nothing was measured.
    """
    keys = store.list(f"{layout.check_key(run)}/")
    found: defaultdict[str, dict[int, _Measured]] = defaultdict(dict)
    for images, attempts in sorted(_attempts(run, keys).items()):
        for each in measured_distances(store, run, images, keys=keys, attempts=attempts):
            if each.weights == "ema":
                measured = _Measured(each.samples, each.report, each.frechet)
                by_images = found[each.features]
                by_images[images] = max(by_images.get(images, measured), measured)
    return {
        features: {images: each.frechet for images, each in by_images.items()}
        for features, by_images in sorted(found.items())
    }


def _attempts(run: str, keys: Mapping[str, int]) -> dict[int, set[str]]:
    """Return the attempts that lie in the folder of each committed checkpoint."""
    attempts: defaultdict[int, set[str]] = defaultdict(set)
    for key in keys:
        images = layout.images_of(run, key)
        if images is not None and layout.manifest_key(run, images) in keys:
            attempts[images].add(key.removeprefix(layout.checkpoint_key(run, images)).split("/")[1])
    return attempts
