"""How far an ingest is."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from pipelines.ingest.shard_files import FinishedShard

_TELL_EVERY_S = 5.0


class Progress:
    """Tells how far an ingest is, and when it will be done.

    Args:
        images: Images in each shard that is to be written.
        note: Takes lines for the user.
        sizes: Bytes of the images of each shard, where time goes by bytes.
    """

    def __init__(
        self,
        images: Sequence[int],
        *,
        note: Callable[[str], None],
        sizes: Sequence[int] | None = None,
    ) -> None:
        self._images = images
        self._work = images if sizes is None else sizes
        self._unit, self._unit_size = ("images", 1) if sizes is None else ("MiB", 2**20)
        self._note = note

    def follow(self, shards: Iterable[FinishedShard]) -> Iterator[FinishedShard]:
        """Pass finished shards on, telling every few seconds and at the end."""
        began = told = time.monotonic()
        total = sum(self._work)
        images = skipped = done = fresh = 0
        for shard in shards:
            yield shard
            images += self._images[shard.number]
            skipped += len(shard.filled.skipped)
            done += self._work[shard.number]
            # What an earlier start has written says nothing about the speed of this one.
            fresh += 0 if shard.kept else self._work[shard.number]
            now = time.monotonic()
            if now - told < _TELL_EVERY_S and done < total:
                continue
            told = now
            rate = fresh / max(now - began, 1e-9)
            left = f", about {(total - done) / rate:,.0f} s left" if rate else ""
            self._note(
                f"{images:,} images ({done / total:.0%}), {skipped:,} skipped, "
                f"{rate / self._unit_size:,.1f} {self._unit}/s{left}"
            )
