"""Pictures that a user names: read with a check of what they are, and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipelines.files import write_atomic
from trainer.config.reading import ConfigError


def read_picture(setting: str, path: str, *, channels: int, size: int) -> Tensor:
    """Read a picture, [1, c, size, size] in [-1, 1].

    Args:
        setting: The setting that names the file, for messages.
        path: The file.
        channels: 1 makes it grey, 3 RGB.
        size: Height and width it must have.

    Raises:
        ConfigError: If it is missing, no picture, or of another size.
    """
    try:
        with Image.open(Path(path).expanduser()) as picture:
            if picture.size != (size, size):
                width, height = picture.size
                raise ConfigError(
                    f"{setting}={path} has {width} x {height} pixels, but the model works on "
                    f"{size} x {size}; crop or resize it first"
                )
            values = np.array(picture.convert("L" if channels == 1 else "RGB"))
    except FileNotFoundError as error:
        raise ConfigError(f"{setting}={path}: there is no such file") from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"{setting}={path} is not a picture that can be read") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{setting}={path} cannot be read: {error}") from error
    pixels = torch.from_numpy(values).reshape(1, size, size, channels).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def write_picture(path: str, png: bytes) -> Path:
    """Write a PNG whole or not at all, its folder included, and return where it is.

    Raises:
        ConfigError: If it cannot be written.
    """
    output = Path(path).expanduser()
    try:
        if output.exists() and not output.is_file():
            output.write_bytes(png)  # such as a pipe, which is not to be replaced
        else:
            write_atomic(output.resolve(), png)
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written: {error}") from error
    return output
