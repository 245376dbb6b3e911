"""What was measured of a checkpoint, as the reports in its run's store tell."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.json_document import DocumentError, typed
from trainer.checkpoint.errors import MissingObject
from trainer.checkpoint.kept_documents import read_sealed
from trainer.checkpoint.store import Store
from trainer.evaluate.checkpoint_report import CheckpointReport, Distance
from trainer.evaluate.report import EvaluationReport, evaluation_key

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


def measured_distances(
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
    if "measurement" not in values:
        own = typed(EvaluationReport, values)
        if own.origin.attempt not in attempts:
            return []
        return [_distance(key, own, "ema", own.samples, own.settings.get("sampler", {}))]
    report = typed(CheckpointReport, values)
    measurement = report.measurement
    if measurement.attempt not in attempts:
        return []
    return [
        _distance(key, each, measurement.weights, measurement.samples, measurement.sampler)
        for each in report.distances
    ]


def _distance(
    key: str,
    figures: EvaluationReport | Distance,
    weights: str,
    samples: int,
    sampler: Any,
) -> MeasuredDistance:
    return MeasuredDistance(
        report=key,
        weights=weights,
        features=figures.features,
        frechet=figures.frechet,
        frechet_real_halves=figures.frechet_real_halves,
        samples=samples,
        sampler=sampler if isinstance(sampler, Mapping) else {},
    )
