"""How far an ingest is."""

import time
from collections.abc import Callable, Sequence

from pipelines.ingest.shard_files import FinishedShard, Part

_TELL_EVERY_S = 5.0


class Progress:
    """Tells how far an ingest is, and when it will be done.

    Args:
        parts: Everything that is to be written.
        note: Takes lines for the user.
    """

    def __init__(self, parts: Sequence[Part], *, note: Callable[[str], None]) -> None:
        self._sizes = [(len(part.images), sum(i.size for i in part.images)) for part in parts]
        self._total = sum(size for _, size in self._sizes)
        self._images = self._bytes = self._skipped = 0
        self._note = note
        self._began = self._told = time.monotonic()

    def __call__(self, shard: FinishedShard) -> None:
        """Count a shard, and tell every few seconds and at the end."""
        images, size = self._sizes[shard.number]
        self._images += images
        self._bytes += size
        self._skipped += len(shard.skipped)
        now = time.monotonic()
        if now - self._told < _TELL_EVERY_S and self._bytes < self._total:
            return
        self._told = now
        rate = self._bytes / max(now - self._began, 1e-9)
        left_s = (self._total - self._bytes) / rate
        self._note(
            f"{self._images:,} images ({self._bytes / self._total:.0%}), "
            f"{self._skipped:,} skipped, {rate / 2**20:.1f} MiB/s, about {left_s:.0f} s left"
        )
