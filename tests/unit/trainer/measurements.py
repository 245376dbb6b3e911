"""Reports of evaluations as they lie in a run's store."""

from __future__ import annotations

from trainer.evaluation.reports import (
    CheckpointReport,
    Distance,
    EvaluationReport,
    Measurement,
    Origin,
    evaluation_key,
)
from trainer.storage.store import Store

RUN = "night-1"


def measured(
    store: Store,
    images: int,
    frechet: float,
    *,
    name: str = "a",
    samples: int = 100,
    weights: str = "ema",
    attempt: str = "good",
    features: tuple[str, ...] = ("random_conv",),
) -> None:
    """Puts down what `python -m trainer.evaluate` writes."""
    report = CheckpointReport(
        checkpoint="somewhere",
        run=RUN,
        images=images,
        real_images=50,
        network_evaluations=16.0,
        distances=tuple(
            Distance(features=each, frechet=frechet, frechet_real_halves=0.1) for each in features
        ),
        measurement=Measurement(
            attempt=attempt,
            weights=weights,
            samples=samples,
            seed=1,
            sampler={"solver": "heun"},
            extractors=dict.fromkeys(features, ""),
            held_out_index="c0ffee",
        ),
    )
    store.put(evaluation_key(RUN, images, f"{name}/report.json"), report.to_json())


def finished(
    store: Store, images: int, frechet: float, *, samples: int = 100, attempt: str = "good"
) -> None:
    """Puts down what a run writes at its end."""
    report = EvaluationReport(
        images=images,
        samples=samples,
        features="random_conv",
        frechet=frechet,
        frechet_untrained=9.0,
        frechet_real_halves=0.1,
        gap_closed=0.5,
        network_evaluations=16.0,
        segment_evaluations=(8.0, 8.0),
        settings={},
        origin=Origin(run=RUN, attempt=attempt, held_out_index="c0ffee", extractor=""),
    )
    store.put(evaluation_key(RUN, images, "report.json"), report.to_json())
