"""JPEG files to decode: a folder of them, or photograph-like ones made on the spot."""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.ingest.write import LabelledImage

_HEIGHT, _WIDTH = 375, 500  # the commonest size in ImageNet
_QUALITY = 90  # together with the grain below about 110 KB, ImageNet's mean
_SUFFIXES = (".jpeg", ".jpg")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the files."""
    parser.add_argument(
        "--images", type=Path, help="folder of JPEG files; default: made, 500 x 375 pixels"
    )


def photographs(folder: Path | None, *, count: int) -> Sequence[bytes]:
    """Read the first files under a folder in the order of their names, or make some.

    If the folder holds fewer, they are repeated.

    Args:
        folder: Where to look; None makes them.
        count: How many.

    Raises:
        SystemExit: The folder holds no JPEG file.
    """
    if folder is None:
        return [_make_photograph(seed) for seed in range(count)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise SystemExit(f"error: {folder} holds no file that ends in {' or '.join(_SUFFIXES)}")
    files = [path.read_bytes() for path in paths[:count]]
    return [files[number % len(files)] for number in range(count)]


def label_files(files: Sequence[bytes], *, count: int) -> Iterator[LabelledImage]:
    """Repeat files up to a number of samples, with labels from 0 to 9."""
    for number in range(count):
        yield LabelledImage(files[number % len(files)], number % 10)


def _make_photograph(seed: int) -> bytes:
    """Make noise whose spectrum falls as photographs' do, with power 1 / frequency²."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(_HEIGHT)[:, None], np.fft.rfftfreq(_WIDTH)[None, :]
    frequency = np.maximum(np.hypot(rows, columns), 1 / _WIDTH)
    planes = []
    for _ in range(3):
        white = np.fft.rfft2(rng.normal(size=(_HEIGHT, _WIDTH)))
        plane = np.fft.irfft2(white / frequency, (_HEIGHT, _WIDTH))
        planes.append(plane / plane.std())
    grey = planes[0][..., None]
    colours = 128 + 50 * grey + 12 * np.stack(planes, -1) + rng.normal(size=grey.shape) * 4
    file = io.BytesIO()
    Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
