"""An epoch from an S3 server against the same from local files, and the memory along the way."""

import shutil
import time
from collections.abc import Sequence
from itertools import count

import psutil

from benchmarks import command
from benchmarks.data.epochs import Places, Reading, read, write_places
from benchmarks.data.photographs import add_images, photographs
from benchmarks.interleaved import interleave, stopwatch_of

_DESCRIPTION = """\
Read and decode whole epochs, with an empty cache each time, from an S3 server on loopback
(OpenStack Swift, of the tests; it shares the machine's cores) and from local files. `later` is the
speed after the first tenth, when the wait for the first shards is over. The table tells the
process's memory at a tenth, half and the end of a round.

  python -m benchmarks.data streaming --images ~/imagenet/val --samples 4000"""

_FIRST = 0.1  # share of a round after which it counts as under way


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("data streaming", description=_DESCRIPTION, rounds=4)
    add_images(parser)
    parser.add_argument("--samples", type=command.positive, default=2000, help="default 2000")
    parser.add_argument("--image-size", type=command.positive, default=256, help="default 256")
    parser.add_argument("--batch", type=command.positive, default=64, help="default 64")
    parser.add_argument("--decode-threads", type=command.positive, help="default: the loader's")
    parser.add_argument(
        "--epochs", type=command.positive, default=1, help="in each round; default 1"
    )
    parser.add_argument("--no-s3", action="store_true", help="local files only")
    options = parser.parse_args(arguments)
    setting = command.setting("data streaming", options)
    files = photographs(options.images, count=min(options.samples, 400))
    reading = Reading(
        image_size=options.image_size,
        batch=options.batch,
        decode_threads=options.decode_threads,
        device=setting.device,
    )
    with write_places(files, samples=options.samples, with_s3=not options.no_s3) as places:
        works = {
            name: _Epochs(places, prefix, reading, options.epochs)
            for name, prefix in places.named.items()
        }
        timings = interleave(
            works, rounds=options.rounds, stopwatch=stopwatch_of(setting.device), warmup=1
        )
    later = {name: (1 - _FIRST) * options.samples / work.later_s for name, work in works.items()}
    for timing in timings:
        setting.report.add(
            source=timing.name,
            minimum_s=timing.minimum,
            spread=timing.spread,
            images_per_s=options.epochs * options.samples / timing.minimum,
            ratio=timings[0].minimum / timing.minimum,
            later_images_per_s=options.epochs * later[timing.name],
            later_ratio=later[timing.name] / later[timings[0].name],
            **works[timing.name].memory_mib,
        )
    setting.deliver()
    return 0


class _Epochs:
    """Opens a dataset with an empty cache and reads some epochs, each time it is called."""

    def __init__(self, places: Places, prefix: str, reading: Reading, epochs: int) -> None:
        self._places, self._prefix, self._reading = places, prefix, reading
        self._epochs = epochs
        self._numbers = count()
        self.later_s = float("inf")
        self.memory_mib: dict[str, float] = {}

    def __call__(self) -> None:
        cache = self._places.scratch / f"cache-{next(self._numbers)}"
        samples, process = self._epochs * self._places.samples, psutil.Process()
        marks = {"mib_at_10%": _FIRST, "mib_at_50%": 0.5, "mib_at_100%": 1.0}
        began = None
        with self._reading.loader(self._prefix, cache=cache) as loader:
            for done in read(loader, start=0, images=samples):
                for mark in [mark for mark, share in marks.items() if done >= share * samples]:
                    self.memory_mib[mark] = process.memory_info().rss / 2**20
                    began = began or time.perf_counter()
                    del marks[mark]
        assert began is not None
        self.later_s = min(self.later_s, time.perf_counter() - began)
        shutil.rmtree(cache, ignore_errors=True)
