"""A real autoencoder of diffusers, small enough for tests: 0.3 M parameters, factor 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tiny_autoencoder(*, channels: int = 1, seed: int = 0, **settings: Any) -> Any:
    """Build an AutoencoderKL with random weights that a seed decides."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        **settings,
    )


def saved_autoencoder(folder: Path, *, channels: int = 1, seed: int = 0) -> Path:
    """Save one as diffusers does, and return its folder."""
    tiny_autoencoder(channels=channels, seed=seed).save_pretrained(folder)
    return folder
