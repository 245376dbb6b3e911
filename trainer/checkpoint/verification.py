"""Reading every byte of a checkpoint, to know that it is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipelines.formats import format_bytes, format_duration
from trainer.checkpoint.blocks import read_block
from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.manifest import Manifest, ObjectEntry
from trainer.storage.store import Store, in_threads

_REPORT_EVERY_S = 5.0


class ReadProgress:
    """Tells how much has been read, and when it will be done.

    Args:
        total_bytes: What there is to read.
        report: Takes a line every few seconds, and one at the end.
    """

    def __init__(self, total_bytes: int, *, report: Callable[[str], None]) -> None:
        self._total = total_bytes
        self._report = report
        self._done = 0
        self._began = self._reported = time.monotonic()
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """Bytes that are done."""
        return self._done

    def add(self, size: int) -> None:
        """Count bytes as done; from any thread."""
        with self._lock:
            self._done += size
            now = time.monotonic()
            if now - self._reported < _REPORT_EVERY_S and self._done < self._total:
                return
            self._reported = now
            rate = self._done / max(now - self._began, 1e-9)
            self._report(
                f"{format_bytes(self._done)} of {format_bytes(self._total)} "
                f"({self._done / self._total:.0%})  {format_bytes(rate)}/s  "
                f"ETA {format_duration((self._total - self._done) / rate)}"
            )


def damaged_objects(store: Store, manifest: Manifest, progress: ReadProgress) -> dict[str, str]:
    """Read all objects of a checkpoint and compare them with its manifest.

    Args:
        store: The store of the manifest's keys.
        manifest: The checkpoint.
        progress: Counts what is read.

    Returns:
        What is wrong with each damaged object, by its key; empty if all is whole.

    Raises:
        StoreError: The store failed, which says nothing about the checkpoint.
    """

    def read(entry: ObjectEntry, number: int) -> None:
        block = read_block(store, entry, number, block_bytes=manifest.block_bytes)
        progress.add(len(block))

    damage = {}
    for entry in manifest.objects:
        before = progress.done
        try:
            in_threads(read, ((entry, number) for number in range(len(entry.block_sha256))))
        except DamagedCheckpoint as error:
            damage[entry.key] = str(error)
            # The rest of it is passed over.
            progress.add(before + entry.size_bytes - progress.done)
    return damage
