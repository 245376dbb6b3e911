"""What was measured of a checkpoint, found in its store for a model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import Store
from trainer.evaluate.checkpoint_report import CheckpointReport
from trainer.evaluate.report import EvaluationReport, evaluation_key

logger = logging.getLogger(__name__)

_REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One Fréchet distance with what it has to be compared with.

    Attributes:
        weights: Weights that were measured, "ema" or "master".
        features: Name of the extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        frechet_real_halves: One half of the held-out real images against the other.
        samples: Images drawn.
        sampler: Solver, steps and guidance, in words.
    """

    weights: str
    features: str
    frechet: float
    frechet_real_halves: float
    samples: int
    sampler: str


def find_results(store: Store, manifest: Manifest, weights: Collection[str]) -> list[Result]:
    """Read the reports of a checkpoint that lie in its run's store.

    A report that cannot be read is left out with a warning: weights are worth having without it.

    Args:
        store: The store of the run.
        manifest: The checkpoint.
        weights: Which weights matter.

    Raises:
        StoreError: The store failed.
    """
    found: list[Result] = []
    for key in store.list(evaluation_key(manifest.run, manifest.images, "")):
        if key.rpartition("/")[2] != _REPORT:
            continue
        own = key == evaluation_key(manifest.run, manifest.images, _REPORT)
        try:
            data = store.get(key)
            found += _of_run(data) if own else _of_checkpoint(data, manifest)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            logger.warning("%s is no report and is left out: %s", store.uri(key), error)
    return [result for result in found if result.weights in weights]


def _of_run(data: bytes) -> list[Result]:
    """Read the run's own report, which is of the EMA."""
    report = EvaluationReport.from_dict(json.loads(data))
    return [
        Result(
            weights="ema",
            features=report.features,
            frechet=float(report.frechet),
            frechet_real_halves=float(report.frechet_real_halves),
            samples=int(report.samples),
            sampler=_sampler(report.settings["sampler"]),
        )
    ]


def _of_checkpoint(data: bytes, manifest: Manifest) -> list[Result]:
    """Read a later report, unless it is of a checkpoint that this one has replaced."""
    report = CheckpointReport.from_json(data)
    if report.measurement.attempt != manifest.attempt:
        return []
    return [
        Result(
            weights=report.measurement.weights,
            features=distance.features,
            frechet=float(distance.frechet),
            frechet_real_halves=float(distance.frechet_real_halves),
            samples=int(report.measurement.samples),
            sampler=_sampler(report.measurement.sampler),
        )
        for distance in report.distances
    ]


def _sampler(settings: Mapping[str, Any]) -> str:
    steps = "" if settings["solver"] == "dopri5" else f", {settings['steps']} steps"
    return f"{settings['solver']}{steps}, guidance {settings['guidance_scale']}"
