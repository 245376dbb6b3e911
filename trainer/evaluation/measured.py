"""What was measured of a run's checkpoints, as the reports in its store tell."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.documents import DocumentError, validate_as
from trainer.checkpoint import layout
from trainer.evaluation.reports import CheckpointReport, EvaluationReport, evaluation_key
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_sealed
from trainer.storage.keys import check_key
from trainer.storage.store import Store

logger = logging.getLogger(__name__)

_REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class MeasuredDistance:
    """One Fréchet distance with what it has to be compared with.

    Attributes:
        report: Key of the report that tells it.
        weights: Weights that were measured, "ema" or "master".
        features: Name of the extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        frechet_real_halves: One half of the held-out real images against the other; None where
            there were too few for halves.
        samples: Images drawn.
        sampler: Solver, steps and guidance, as far as the report tells them.
    """

    report: str
    weights: str
    features: str
    frechet: float
    frechet_real_halves: float | None
    samples: int
    sampler: Mapping[str, Any]


def read_distances(
    store: Store, run: str, images: int, *, keys: Iterable[str], attempts: Collection[str]
) -> list[MeasuredDistance]:
    """Read the run's own report, of its end, and those of later measurements.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        images: Images of the checkpoint.
        keys: Keys of the store, at least those of the checkpoint's evaluations.
        attempts: The checkpoint's own attempts; others' reports are of one that it has replaced.

    Returns:
        The distances, in the order of the keys. A report that is damaged is passed over with a
        warning that names it.

    Raises:
        StoreError: The store fails, which does not mean that nothing was measured.
    """
    found: list[MeasuredDistance] = []
    for key in _reports(run, images, keys):
        try:
            found += _distances(key, read_sealed(store, key), attempts)
        except MissingObject:
            continue  # deleted since the listing
        except DocumentError as error:
            logger.warning(
                "passing over the report %s, which cannot be believed: %s; measure that "
                "checkpoint again, with the command that did",
                store.uri(key),
                error,
            )
    return found


def _reports(run: str, images: int, keys: Iterable[str]) -> list[str]:
    """Return the keys of what the run, and what `python -m trainer.evaluate`, has written."""
    folder = evaluation_key(run, images, "")
    return [
        key
        for key in keys
        if key.startswith(folder)
        and key.endswith(f"/{_REPORT}")
        and key.removeprefix(folder).count("/") <= 1
    ]


def _distances(
    key: str, values: Mapping[str, Any], attempts: Collection[str]
) -> list[MeasuredDistance]:
    later = "measurement" in values
    report = (
        validate_as(CheckpointReport, values) if later else validate_as(EvaluationReport, values)
    )
    measurement = report.measurement
    if measurement.attempt not in attempts:
        return []
    return [
        MeasuredDistance(
            report=key,
            weights=measurement.weights,
            features=each.features,
            frechet=each.frechet,
            frechet_real_halves=each.frechet_real_halves,
            samples=measurement.samples,
            sampler=measurement.sampler,
        )
        for each in report.distances
    ]


class _Measured(NamedTuple):
    """One distance; of several of one checkpoint the greatest counts."""

    samples: int
    report: str
    frechet: float


def frechet_scores(store: Store, run: str, features: str) -> dict[int, float]:
    """Read the Fréchet distances of a run's checkpoints by one extractor: see `read_scores`."""
    return read_scores(store, run).get(features, {})


def read_scores(store: Store, run: str) -> dict[str, dict[int, float]]:
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
    keys = store.list(f"{check_key(run)}/")
    found: defaultdict[str, dict[int, _Measured]] = defaultdict(dict)
    for images, attempts in sorted(_attempts(run, keys).items()):
        for each in read_distances(store, run, images, keys=keys, attempts=attempts):
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
