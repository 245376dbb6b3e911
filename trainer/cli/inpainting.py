"""What a model draws where a picture is missing, beside the picture and its mask."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from models.flow.inpaint import inpaint
from pipelines.command import Outcome
from trainer import rng
from trainer.cli.drawing_config import InpaintConfig
from trainer.cli.pictures import read_picture, write_picture
from trainer.evaluation.grid import grid_png
from trainer.evaluation.loading import LoadedModel, load_model
from trainer.evaluation.precision import products_in

logger = logging.getLogger(__name__)


def draw_missing(config: InpaintConfig) -> Outcome:
    """Draw them, and answer where they were written; see `trainer.cli.inpaint.fill_in`."""
    trained = load_model(config, precision=config.precision)
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
