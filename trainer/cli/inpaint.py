"""The command that fills in what is missing of a picture, with the model of any checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from models.flow.inpaint import inpaint
from models.flow.sampler_config import SamplerConfig
from pipelines.command import Outcome
from trainer import rng
from trainer.cli.command import run_command
from trainer.cli.pictures import read_picture, write_picture
from trainer.evaluation.grid import grid_png
from trainer.evaluation.loading import LoadedModel, ModelSource
from trainer.evaluation.precision import PrecisionChoice, products_in

logger = logging.getLogger(__name__)

_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits image=photo.png mask=mask.png label=3"
_DESCRIPTION = f"""\
Fill in what is missing of a picture: where the mask is white the picture is kept, where it is black
the model of a checkpoint draws. The output shows the picture, the mask and the results in a row.

  python -m trainer.inpaint {_EXAMPLE}"""


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(ModelSource):
    """What to fill in.

    Attributes:
        image: Picture of the size that the model draws.
        mask: Picture of the same size, white where the image is known.
        label: Class of the picture.
        output: PNG file to write.
        columns: How many results to draw.
        repeats: How often each solver step is made from fresh noise; more follow the known part
            more closely and cost as many times more.
        seed: Seed of the noise.
        precision: What the network computes in: "fp32", "tf32" or "bf16"; "auto" is bf16 on a GPU
            and fp32 elsewhere.
        sampler: Solver with fixed steps, and guidance.
    """

    image: str = field(metadata={"place": "path"})
    mask: str = field(metadata={"place": "path"})
    label: Annotated[int, Field(ge=0)]
    output: str = field(default="inpainted.png", metadata={"place": "path"})
    columns: Annotated[int, Field(ge=1)] = 6
    repeats: Annotated[int, Field(ge=1)] = 5
    seed: Annotated[int, Field(ge=0)] = 1
    precision: PrecisionChoice = "auto"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


def fill_in(config: InpaintConfig) -> Outcome:
    """Draw the results beside the picture and its mask, and answer where they were written.

    Raises:
        ConfigError: For a picture or mask that does not fit, a class that the model does not have,
            guidance without a trained null label, or an output that cannot be written.
        InpaintError: For a solver that chooses its own steps, or ``repeats`` below 1.
        AutoencoderError: If the autoencoder of the checkpoint's latents cannot be had.
        CheckpointError: If the checkpoint is missing or damaged.
    """
    trained = config.load(precision=config.precision)
    trained.record.check_classes([config.label])
    trained.record.check_guidance(config.sampler)
    channels = trained.codec.image_channels(trained.shape.channels)
    size = trained.shape.size * trained.codec.factor
    picture = read_picture("image", config.image, channels=channels, size=size)
    mask = read_picture("mask", config.mask, channels=1, size=size)
    logger.info("drawing %d images on %s", config.columns, trained.device)
    with products_in(trained.precision, trained.device):
        results = _results(config, trained, picture, mask > 0)
    row = torch.cat([picture, mask.expand_as(picture), results])
    output = write_picture(config.output, grid_png(row, columns=len(row)))
    return Outcome(
        f"{output}",
        {
            "output": output,
            "checkpoint": trained.checkpoint,
            "weights": config.weights,
            "precision": trained.precision,
            "label": config.label,
            "images": config.columns,
        },
    )


@torch.no_grad()
def _results(config: InpaintConfig, trained: LoadedModel, picture: Tensor, known: Tensor) -> Tensor:
    """Fill in the latent and keep the picture itself where it is known."""
    codec, shape, device = trained.codec, trained.shape, trained.device
    count, pixels = config.columns, picture.shape[-1]

    def normals(stream: str, images: int, size: int) -> Tensor:
        return rng.normals(config.seed, stream, first=0, count=images, size=size, device=device)

    numbers = normals("inpaint posterior", 1, codec.normals_per_image(pixels))
    latent = codec.encode(picture.to(device), numbers)
    # An element of the latent is known where all its pixels are.
    blocks = known.to(device).unfold(2, codec.factor, codec.factor)
    known_latent = blocks.unfold(3, codec.factor, codec.factor).all(-1).all(-1)
    noise_size = trained.flow.noise_size(channels=shape.channels, image_size=shape.size)
    filled = inpaint(
        trained.model,
        flow=trained.flow,
        config=config.sampler,
        images=latent.expand(count, -1, -1, -1),
        known=known_latent.expand(count, -1, -1, -1),
        noise=lambda draw: normals(f"inpaint {draw}", count, noise_size),
        labels=torch.full((count,), config.label, device=device),
        null_label=shape.classes,
        repeats=config.repeats,
    )
    return torch.where(known, picture, codec.decode(filled.images).cpu())


main = partial(
    run_command,
    InpaintConfig,
    fill_in,
    module="trainer.inpaint",
    description=_DESCRIPTION,
    example=_EXAMPLE,
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
