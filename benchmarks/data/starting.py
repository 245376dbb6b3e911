"""Time to the first batch, at the start of a run and amid an epoch."""

import shutil
import time
from collections.abc import Sequence

from benchmarks import command
from benchmarks.data.epochs import Places, Reading, read, write_places
from benchmarks.data.photographs import add_images, photographs

_DESCRIPTION = """\
Open a dataset, make the loader and wait for the first batch, with an empty cache, from local files
and from an S3 server on loopback: at the start, and resumed amid the epoch. Imports are done
before. Target: 5 s with 10,000 samples.

  python -m benchmarks.data starting --images ~/imagenet/val --samples 10000"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("data starting", description=_DESCRIPTION, rounds=3)
    add_images(parser)
    parser.add_argument("--samples", type=command.positive, default=10_000, help="default 10000")
    parser.add_argument("--image-size", type=command.positive, default=256, help="default 256")
    parser.add_argument("--batch", type=command.positive, default=64, help="default 64")
    parser.add_argument("--no-s3", action="store_true", help="local files only")
    options = parser.parse_args(arguments)
    setting = command.setting("data starting", options)
    files = photographs(options.images, count=min(options.samples, 400))
    reading = Reading(image_size=options.image_size, batch=options.batch, device=setting.device)
    middle = options.samples // 2 // options.batch * options.batch
    with write_places(files, samples=options.samples, with_s3=not options.no_s3) as places:
        for name, prefix in places.named.items():
            for start in (0, middle):
                taken = [
                    _first_batch_s(places, prefix, reading, start) for _ in range(options.rounds)
                ]
                setting.report.add(
                    source=name, resumed_at=start, shortest_s=min(taken), longest_s=max(taken)
                )
    setting.deliver()
    return 0


def _first_batch_s(places: Places, prefix: str, reading: Reading, start: int) -> float:
    cache = places.scratch / "cache"
    began = time.perf_counter()
    with reading.loader(prefix, cache=cache) as loader:
        next(read(loader, start=start, images=reading.batch))
        taken = time.perf_counter() - began
    shutil.rmtree(cache, ignore_errors=True)
    return taken
