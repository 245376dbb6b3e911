"""The space that a job's flow works in, and the pictures that people see of it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.autoencoder.config import CodecConfig
from trainer.config.job import DataConfig, JobConfig


def encodes(job: JobConfig) -> bool:
    """Tell whether the images of the shards are encoded on the way to the flow."""
    return job.data.space == "pixel" and job.codec.kind != "identity"


def picture_shape(data: DataConfig, codec: CodecConfig) -> ImageShape:
    """Return the shape of the pictures that people see, which samples are compared with."""
    if data.space == "pixel":
        return ImageShape(channels=data.channels, size=data.image_size, classes=data.classes)
    return ImageShape(channels=3, size=data.image_size * codec.factor, classes=data.classes)


def flow_shape(data: DataConfig, codec: CodecConfig) -> ImageShape:
    """Return the shape of what the flow and the model work on: images or their latents."""
    size, channels = data.image_size, data.channels
    if data.space == "pixel" and codec.kind != "identity":
        size, channels = size // codec.factor, codec.channels
    return ImageShape(channels=channels, size=size, classes=data.classes)


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """Shape of what the flow works on, an image or its latent, and the number of classes.

    Attributes:
        channels: Channels.
        size: Height and width in elements.
        classes: Labels are 0 … classes - 1; index `classes` is the null label.
    """

    channels: int
    size: int
    classes: int
