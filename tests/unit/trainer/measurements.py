"""Reports of evaluations as they lie in a run's store."""

from __future__ import annotations

from typing import Any

from trainer.config.job import EvalConfig
from trainer.evaluation.figures import Distance, Nearness, RealFigures
from trainer.evaluation.reports import (
    CheckpointReport,
    EvaluationReport,
    Measurement,
    Origin,
    evaluation_key,
)
from trainer.storage.store import Store

RUN = "night-1"
SAMPLER: dict[str, Any] = {"solver": "heun"}


def real_figures(frechet: float) -> RealFigures:
    """Tells what real images reach."""
    return RealFigures(
        images=100,
        frechet=frechet,
        diversity=2.0,
        nearest=Nearness(mean=1.5, close_share=0.01),
    )


def checkpoint_report(
    images: int,
    frechet: float = 1.0,
    *,
    samples: int = 100,
    weights: str = "ema",
    attempt: str = "good",
    features: tuple[str, ...] = ("random_conv",),
) -> CheckpointReport:
    """Tells what `python -m trainer.evaluate` measures of a checkpoint."""
    return CheckpointReport(
        checkpoint="somewhere",
        run=RUN,
        images=images,
        real_images=50,
        network_evaluations=16.0,
        distances=tuple(Distance(features=each, frechet=frechet) for each in features),
        measurement=Measurement(
            attempt=attempt,
            weights=weights,
            samples=samples,
            seed=1,
            sampler=SAMPLER,
            extractors=dict.fromkeys(features, ""),
            held_out_index="c0ffee",
            compared=EvalConfig.compared,
        ),
    )


def measured(store: Store, images: int, frechet: float, *, name: str = "a", **others: Any) -> None:
    """Puts down what `python -m trainer.evaluate` writes; see `checkpoint_report`."""
    report = checkpoint_report(images, frechet, **others)
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
        network_evaluations=16.0,
        segment_evaluations=(8.0, 8.0),
        settings={"seed": 1, "sampler": SAMPLER, "compared": EvalConfig.compared},
        origin=Origin(run=RUN, attempt=attempt, held_out_index="c0ffee", extractor=""),
    )
    store.put(evaluation_key(RUN, images, "report.json"), report.to_json())
