"""Encoded images to bands: DALI against Pillow + torch and the fastest decoder there is."""

import importlib.util
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks import command
from benchmarks.data.photographs import add_images, photographs
from benchmarks.interleaved import interleave
from pipelines.augment import AugmentConfig, SampleKey
from pipelines.decode.contract import DecodeConfig
from pipelines.decode.cpu import split_bands
from pipelines.decode.dali import DaliDecoder

_DESCRIPTION = """\
Decode, crop the central square, resize to --image-size, mirror half, normalise and split into
bands, one batch at a time. The baseline is what a PyTorch user would write with Pillow. simplejpeg
(libjpeg-turbo) with OpenCV takes part where both are installed: pip install
'.[bench]'. Filters differ: Pillow and DALI average over what a pixel covers, and so
does OpenCV's INTER_AREA in its own way. On CUDA, DALI decodes on the GPU.

  python -m benchmarks.data decoding --threads 1
  python -m benchmarks.data decoding --images ~/imagenet/train --batch 256 --decode-threads 1,8"""

Work = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("data decoding", description=_DESCRIPTION, rounds=8)
    add_images(parser)
    parser.add_argument("--image-size", type=command.positive, default=256, help="default 256")
    parser.add_argument("--scales", type=command.positive, default=2, help="default 2")
    parser.add_argument("--batch", type=command.positive, default=64, help="default 64")
    parser.add_argument(
        "--decode-threads", type=command.whole_numbers, default=(1,), metavar="N,N", help="of DALI"
    )
    options = parser.parse_args(arguments)
    setting = command.setting("data decoding", options)
    files = photographs(options.images, count=options.batch)
    size, scales = options.image_size, options.scales
    works: dict[str, Work] = {"Pillow + torch": lambda: _by_hand(files, _pillow, size, scales)}
    if has_turbo():
        works["simplejpeg + OpenCV + torch"] = lambda: _by_hand(files, _turbo, size, scales)
    for threads in options.decode_threads:
        works[f"DALI, {threads} threads"] = _dali(
            files, size=size, scales=scales, threads=threads, device=setting.device
        )
    for timing in interleave(works, rounds=options.rounds, stopwatch=_stopwatch(setting.device)):
        setting.report.add(
            decoder=timing.name,
            minimum_s=timing.minimum,
            spread=timing.spread,
            images_per_s=options.batch / timing.minimum,
            ratio=timing.ratio,
            kib_per_image=sum(map(len, files)) / len(files) / 1024,
        )
    setting.deliver()
    return 0


def has_turbo() -> bool:
    """Tell whether simplejpeg and OpenCV are installed."""
    return all(map(importlib.util.find_spec, ("simplejpeg", "cv2")))


def _stopwatch(device: torch.device) -> Callable[[Work], float]:
    """Time from the call until the bands are there; half of the work is the host's."""

    def measure(work: Work) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return measure


def _dali(
    files: Sequence[bytes], *, size: int, scales: int, threads: int, device: torch.device
) -> Work:
    decoder = DaliDecoder(
        DecodeConfig(
            image_size=size,
            scales=scales,
            decode_threads=threads,
            augment=AugmentConfig(flip=True),
        ),
        device=str(device),
    )
    keys = [SampleKey(0, 0, number) for number in range(len(files))]
    return lambda: decoder(files, keys)


def _by_hand(
    files: Sequence[bytes],
    load: Callable[[bytes, int], NDArray[np.uint8]],
    size: int,
    scales: int,
) -> tuple[Tensor, ...]:
    images = [load(data, size) for data in files]
    mirrored = [image[:, ::-1] if number % 2 else image for number, image in enumerate(images)]
    batch = torch.from_numpy(np.stack(mirrored)).permute(0, 3, 1, 2)
    return split_bands(batch.float().div(127.5).sub(1.0).contiguous(), scales=scales)


def _square(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def _pillow(data: bytes, size: int) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, side = _square(*image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _turbo(data: bytes, size: int) -> NDArray[np.uint8]:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    image: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    left, top, side = _square(image.shape[1], image.shape[0])
    square = image[top : top + side, left : left + side]
    shrinks = side >= size
    return np.asarray(
        cv2.resize(
            square, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        ),
        dtype=np.uint8,
    )
