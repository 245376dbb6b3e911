"""Samples in one picture: a grid, a film of how they come about, or what lies between seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipelines.command import Outcome
from trainer.cli.drawing_config import SampleConfig
from trainer.cli.pictures import write_picture
from trainer.evaluation.grid import grid_png
from trainer.evaluation.loading import load_model
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.strips import film, film_picture, interpolation, png_of
from trainer.storage.open import open_store

logger = logging.getLogger(__name__)


def draw_picture(config: SampleConfig) -> Outcome:
    """Draw one picture, and answer where it was written; see `trainer.cli.sample.draw`."""
    trained = load_model(config, precision=config.precision)
    shown = 3 if config.film else 10
    classes = tuple(config.classes or range(min(shown, trained.shape.classes)))
    trained.record.check_classes(classes)
    sampler = trained.image_sampler(
        config.sampler.over(trained.own.sampler),
        seed=config.seed,
        batch=config.batch,
        share_coarse=config.share_coarse,
    )
    columns = config.columns
    values: dict[str, Any] = {"images": len(classes)}
    if config.film:
        png = _film(config, trained.model, sampler, classes)
    elif seeds := config.seeds():
        png = _interpolation(config, trained.model, sampler, classes, seeds)
        values = {"images": len(classes) * config.columns, "seeds": seeds}
    else:
        images_per_class = columns
        if config.share_coarse > 1:
            columns = config.share_coarse
            images_per_class = max(1, config.columns // columns) * columns
        labels = torch.tensor(classes).repeat_interleave(images_per_class)
        logger.info("drawing %d images on %s", len(labels), trained.device)
        drawn = sampler.all(trained.model, labels)
        png = grid_png(drawn.images, columns=columns)
        values = {"images": len(labels), "network_evaluations": sum(drawn.nfe)}
    output = _write_picture(config, png)
    return Outcome(
        output,
        {
            "output": output,
            "checkpoint": trained.checkpoint,
            "weights": config.weights,
            "precision": trained.precision,
            "classes": classes,
            "columns": columns,
            **values,
        },
    )


def _film(
    config: SampleConfig, model: nn.Module, sampler: ImageSampler, classes: Sequence[int]
) -> bytes:
    logger.info("drawing %d images on %s, each by itself", len(classes), sampler.device)
    films = [
        film(sampler, model, label, index=index, moments=config.columns)
        for index, label in enumerate(classes)
    ]
    return png_of(film_picture(sampler, films, classes))


def _interpolation(
    config: SampleConfig,
    model: nn.Module,
    sampler: ImageSampler,
    classes: Sequence[int],
    seeds: tuple[int, int],
) -> bytes:
    logger.info("drawing %d images on %s", len(classes) * config.columns, sampler.device)
    first, last = (replace(sampler, seed=seed) for seed in seeds)
    images = interpolation(sampler, model, classes, ends=(first, last), steps=config.columns)
    return grid_png(images, columns=config.columns)


def _write_picture(config: SampleConfig, png: bytes) -> str:
    output = config.output or "samples.png"
    if "://" not in output:
        return str(write_picture(output, png))
    folder, _, name = output.rpartition("/")
    store = open_store(folder, config.store)
    store.put(name, png)
    return store.uri(name)
