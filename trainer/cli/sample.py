"""The command that draws a grid of samples from any checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
from pydantic import Field

from pipelines.command import Outcome
from trainer.cli.command import run_command
from trainer.cli.pictures import write_picture
from trainer.config.reading import ConfigError
from trainer.evaluation.grid import grid_png
from trainer.evaluation.loading import ModelSource, SamplerChoice

logger = logging.getLogger(__name__)

_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Draw a grid of samples from a checkpoint, or from a run's newest one.

  python -m trainer.sample {_EXAMPLE}
  python -m trainer.sample checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT classes=[207,360] columns=4 sampler.guidance_scale=4"""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelSource):
    """What to draw.

    Attributes:
        output: PNG file to write.
        classes: Classes to draw, one row each; None draws the first ten.
        columns: Images per class.
        seed: Seed of the noise.
        batch: Most images in one network call.
        sampler: Changes to the run's own `eval.sampler`: solver, steps and guidance.
    """

    output: str = field(default="samples.png", metadata={"place": "path"})
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    columns: Annotated[int, Field(ge=1)] = 10
    seed: Annotated[int, Field(ge=0)] = 1
    batch: Annotated[int, Field(ge=1)] = 64
    sampler: SamplerChoice = field(default_factory=SamplerChoice)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and not self.classes:
            raise ConfigError(
                "classes=[] names no class; name some, as in classes=[3,5], or leave it away to "
                "draw the first ten"
            )


def sample_grid(config: SampleConfig) -> Outcome:
    """Draw the grid, and answer where it was written.

    Raises:
        ConfigError: For a class or weights the checkpoint does not have, guidance without a trained
            null label, a device that cannot be used, or an output that cannot be written.
        AutoencoderError: If the autoencoder of its latents cannot be had.
        CheckpointError: If the checkpoint is missing or damaged.
    """
    trained = config.load()
    classes = config.classes or range(min(10, trained.shape.classes))
    trained.check_classes(classes)
    image_sampler = trained.image_sampler(
        config.sampler.over(trained.own.sampler), seed=config.seed, batch=config.batch
    )
    labels = torch.tensor(classes).repeat_interleave(config.columns)
    logger.info("drawing %d images on %s", len(labels), trained.device)
    drawn = image_sampler.all(trained.model, labels)
    output = write_picture(config.output, grid_png(drawn.images, columns=config.columns))
    return Outcome(
        f"{output}",
        {
            "output": output,
            "checkpoint": trained.checkpoint,
            "weights": config.weights,
            "classes": classes,
            "columns": config.columns,
            "images": len(labels),
            "network_evaluations": sum(drawn.nfe),
        },
    )


main = partial(
    run_command,
    SampleConfig,
    sample_grid,
    module="trainer.sample",
    description=_DESCRIPTION,
    example=_EXAMPLE,
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
