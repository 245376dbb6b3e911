"""What was measured of a run's checkpoints, for choosing among them."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.checkpoint import layout
from trainer.checkpoint.errors import MissingObject
from trainer.checkpoint.store import Store
from trainer.evaluate.checkpoint_report import CheckpointReport
from trainer.evaluate.report import EvaluationReport, evaluation_key

logger = logging.getLogger(__name__)

REPORT = "report.json"


class _Measured(NamedTuple):
    """One distance; of several of one checkpoint the greatest counts."""

    samples: int
    key: str
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
    attempts = _attempts(run, keys)
    found: defaultdict[str, dict[int, _Measured]] = defaultdict(dict)
    for images in sorted(attempts):
        for key in _reports(run, images, keys):
            try:
                distances = _distances(json.loads(store.get(key)), attempts[images])
            except MissingObject:
                continue  # deleted since the listing
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                logger.warning(
                    "passing over the report %s, which cannot be read (%s: %s); measure that "
                    "checkpoint again with python -m trainer.evaluate, or delete the report",
                    store.uri(key),
                    type(error).__name__,
                    error,
                )
                continue
            for features, (samples, frechet) in distances.items():
                measured = _Measured(samples, key, frechet)
                found[features][images] = max(found[features].get(images, measured), measured)
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


def _reports(run: str, images: int, keys: Mapping[str, int]) -> list[str]:
    """Return the run's own report, of its end, and those of later measurements."""
    folder = evaluation_key(run, images, "")
    return [
        key
        for key in keys
        if key.startswith(folder)
        and key.endswith(f"/{REPORT}")
        and key.removeprefix(folder).count("/") <= 1
    ]


def _distances(values: Any, attempts: set[str]) -> dict[str, tuple[int, float]]:
    """Return samples and distance for each extractor; none for other weights than the EMA."""
    if not isinstance(values, dict):
        raise TypeError("it is no JSON object")
    if "measurement" not in values:
        own = EvaluationReport.from_dict(values)
        return {str(own.features): (int(own.samples), float(own.frechet))}
    report = CheckpointReport.from_json(json.dumps(values).encode())
    measurement = report.measurement
    # Another attempt's report is of a checkpoint that has been replaced since.
    if measurement.weights != "ema" or measurement.attempt not in attempts:
        return {}
    return {
        str(each.features): (int(measurement.samples), float(each.frechet))
        for each in report.distances
    }
