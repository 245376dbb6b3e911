"""Runs that have told of themselves, without having been trained."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from pipelines.documents import seal
from trainer.evaluation.figures import Distance, Measures, Nearness, RealFigures
from trainer.evaluation.reports import (
    CheckpointReport,
    EvaluationReport,
    Measurement,
    Origin,
    evaluation_key,
)
from trainer.metrics.history import keep_history
from trainer.metrics.tracker import Tracker
from trainer.storage.store import Store
from trainer.training.goodput import AttemptTime, LaunchTime, Mark

SETTINGS: Mapping[str, Any] = {
    "data": {"name": "digits", "image_size": 8},
    "flow": {"scales": 2},
    "model": {"depth": 2, "width": 32},
    "optim": {"learning_rate": 1e-3},
    "train": {"seed": 0, "total_images": 6400},
}
ABOUT = {"command": "python -m trainer.launch +exp=digits", "device": "NVIDIA H200", "workers": "1"}
METRICS = (
    "loss/total",
    "loss/scale_1",
    "loss/scale_0",
    "speed/images_per_s",
    "optim/gradient_norm",
)


def png(size: int = 16, *, shade: int = 90) -> bytes:
    """Return a picture."""
    pixels = np.full((size, size), shade, np.uint8)
    pixels[::2] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def settings_of(**groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes, by group."""
    names = dict.fromkeys([*SETTINGS, *groups])
    return {name: {**SETTINGS.get(name, {}), **groups.get(name, {})} for name in names}


def tell_run(
    store: Store,
    run: str,
    *,
    settings: Mapping[str, Any] = SETTINGS,
    about: Mapping[str, str] = ABOUT,
    offset: float = 0.0,
    metrics: tuple[str, ...] = METRICS,
    science: Mapping[str, Any] | None = None,
) -> None:
    """Put down what a run leaves in its store beside checkpoints and figures."""
    with keep_history(
        Tracker(),
        store,
        run=run,
        writer="000000000001-00000",
        identity="one",
        about=about,
        settings=settings,
        science=settings if science is None else science,
        began_images=0,
    ) as tracker:
        for images in range(640, 6401, 640):
            values = {name: 1000 / images + number + offset for number, name in enumerate(metrics)}
            tracker.metrics(values, images=images)
        tracker.image("samples", png(shade=40), images=3200)
        tracker.image("samples", png(shade=90), images=6400)
    attempt = AttemptTime(
        began_s=4.0,
        seconds={"start": 3.0, "step": 20.0, "data_wait": 1.0, "checkpoint": 0.5},
        marks=(Mark(6400, 20.0, 1.0),),
    )
    sheet = seal(dataclasses.asdict(LaunchTime(wall_s=30.0, attempts=(attempt,))))
    store.put(f"{run}/goodput/000000000001.json", json.dumps(sheet).encode())


def tell_figures(
    store: Store,
    run: str,
    images: int,
    frechet: float,
    *,
    features: str = "random_conv",
    samples: int = 100,
    seed: int = 1,
    more: Measures | None = None,
    more_real: Measures | None = None,
    attempt: str = "good",
    weights: str = "ema",
    grid: bytes | None = None,
) -> None:
    """Put down what a later measurement writes, and a grid."""
    real = RealFigures(
        images=100,
        frechet=0.5,
        diversity=2.0,
        nearest=Nearness(mean=1.5, close_share=0.01),
        more=more_real,
    )
    distance = Distance(features=features, frechet=frechet, diversity=1.0, more=more, real=real)
    report = CheckpointReport(
        checkpoint="somewhere",
        run=run,
        images=images,
        real_images=50,
        network_evaluations=16.0,
        distances=(distance,),
        measurement=Measurement(
            attempt=attempt,
            weights=weights,
            samples=samples,
            seed=seed,
            sampler={"solver": "heun", "steps": 10},
            extractors={features: ""},
            held_out_index="c0ffee",
        ),
    )
    name = report.measurement.name
    store.put(evaluation_key(run, images, f"{name}/report.json"), report.to_json())
    store.put(evaluation_key(run, images, f"{name}/grid.png"), png() if grid is None else grid)


def tell_end(store: Store, run: str, images: int, frechet: float, *, attempt: str) -> None:
    """Put down what a run writes at its end."""
    report = EvaluationReport(
        images=images,
        samples=100,
        features="random_conv",
        frechet=frechet,
        frechet_untrained=9.0,
        network_evaluations=16.0,
        segment_evaluations=(8.0, 8.0),
        settings={"seed": 1, "sampler": {"solver": "heun", "steps": 10}},
        origin=Origin(run=run, attempt=attempt, held_out_index="c0ffee", extractor=""),
    )
    store.put(evaluation_key(run, images, "report.json"), report.to_json())
    store.put(evaluation_key(run, images, "grid.png"), png(shade=10))
