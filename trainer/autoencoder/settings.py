"""What an autoencoder's config.json says, each value of its type and within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipelines.console import visible
from pipelines.documents import DocumentError, read_json, validate_as

MAX_CONFIG_BYTES = 1 << 20
_CLASS = "AutoencoderKL"

_Channels = Annotated[int, Field(ge=1, le=8192)]
_Blocks = Annotated[tuple[str, ...], Field(min_length=1, max_length=10)]


class AutoencoderError(ValueError):
    """An autoencoder that is missing, damaged, or not the one the settings describe."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The arguments of `diffusers.AutoencoderKL`, with its defaults for what is left out.

    Attributes:
        in_channels: Channels of the images that it encodes.
        out_channels: Channels of those that it decodes to.
        down_block_types: Names of the encoder's blocks.
        up_block_types: Names of the decoder's blocks.
        block_out_channels: Channels of each block; each but the first halves height and width.
        layers_per_block: Layers in each.
        act_fn: Name of the non-linearity.
        latent_channels: Channels of a latent.
        norm_num_groups: Groups of the normalisations.
        sample_size: Height and width of the images it was trained on.
        scaling_factor: Brings latents near unit variance.
        shift_factor: What is subtracted before; None subtracts nothing.
        latents_mean: Mean of each channel; no codec here knows what to do with it.
        latents_std: Deviation of each channel; likewise.
        force_upcast: Whether it fails in half precision.
        use_quant_conv: Whether a convolution follows the encoder.
        use_post_quant_conv: Whether one comes before the decoder.
        mid_block_add_attention: Whether the middle blocks attend.
    """

    in_channels: _Channels = 3
    out_channels: _Channels = 3
    down_block_types: _Blocks = ("DownEncoderBlock2D",)
    up_block_types: _Blocks = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[_Channels, ...], Field(min_length=1, max_length=10)] = (64,)
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 1
    act_fn: str = "silu"
    latent_channels: _Channels = 4
    norm_num_groups: _Channels = 32
    sample_size: Annotated[int, Field(ge=1, le=1 << 20)] | tuple[int, ...] = 32
    scaling_factor: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.18215
    shift_factor: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool | None = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels for one element of a latent, along each side."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A config.json that was read and checked.

    Attributes:
        written: All that it says.
        settings: What of it decides the autoencoder.
    """

    written: Mapping[str, Any]
    settings: AutoencoderSettings

    def arguments(self) -> dict[str, Any]:
        """Return what it says of the autoencoder, which was checked, without what it leaves out."""
        known = {field.name for field in fields(AutoencoderSettings)}
        return {name: value for name, value in self.written.items() if name in known}

    def for_diffusers(self) -> dict[str, Any]:
        """Return what diffusers is to read: nothing else that it may act on."""
        return {"_class_name": _CLASS, **self.arguments()}


def read_config(file: Path, *, place: str) -> AutoencoderConfig:
    """Read a config.json.

    Args:
        file: Where it is.
        place: What the user named, for messages.

    Raises:
        AutoencoderError: It cannot be read, or is not that of an AutoencoderKL.
    """
    try:
        written = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    except (OSError, DocumentError) as error:
        raise AutoencoderError(f"codec.source={place}: {file} cannot be read: {error}") from error
    kind = written.get("_class_name") if isinstance(written, dict) else None
    if kind != _CLASS:
        shown = visible(kind)[:80] if isinstance(kind, str) and kind else "something else"
        raise AutoencoderError(
            f"codec.source={place} holds {shown}, not an {_CLASS}; give an autoencoder of that "
            "class"
        )
    try:
        settings = validate_as(AutoencoderSettings, written)
    except DocumentError as error:
        raise AutoencoderError(
            f"codec.source={place}: {file} cannot be used: {error}; copy it again from where the "
            "autoencoder was made"
        ) from error
    return AutoencoderConfig(written=written, settings=settings)
