"""What a run tells about its progress, with the time at which it told it."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_PROGRESS = re.compile(r"^([\d,]+)/[\d,]+ images \(", re.M)
_RESUMED = re.compile(r"resumed after ([\d,]+) images")


@dataclass(frozen=True)
class Mark:
    """A run is so far, or begins again from there.

    Attributes:
        time: Of `time.monotonic`, in seconds.
        images: How many images are trained.
        resumed: Whether that is what a checkpoint had that the run goes on from.
    """

    time: float
    images: int
    resumed: bool = False


class Watch:
    """Reads what a driver prints, from its own thread.

    Args:
        log: The file that drivers append their output to.

    Attributes:
        marks: What was told, in its order. Only ever grows.
    """

    def __init__(self, log: Path) -> None:
        self.marks: list[Mark] = []
        self._log = log
        self._ended = threading.Event()
        log.touch()
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self._thread.start()

    @property
    def images(self) -> int:
        """How far the run has come by now; less than before once it was set back."""
        return self.marks[-1].images if self.marks else 0

    def progress_since(self, when: float, *, beyond: int) -> bool:
        """Whether an update was told after a time, and by it the run is beyond some images."""
        return any(
            not mark.resumed and mark.time > when and mark.images > beyond
            for mark in reversed(self.marks)
        )

    def close(self) -> None:
        """Read what is left."""
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        with self._log.open(encoding="utf-8", errors="replace") as file:
            rest = ""
            while True:
                is_last = self._ended.is_set()
                *lines, rest = (rest + file.read()).split("\n")
                now = time.monotonic()
                for line in lines:
                    if found := _PROGRESS.search(line):
                        self._progress(now, _number(found[1]))
                    elif found := _RESUMED.search(line):
                        self.marks.append(Mark(now, _number(found[1]), resumed=True))
                if is_last:
                    return
                time.sleep(0.05)

    def _progress(self, now: float, images: int) -> None:
        if images < self.images and not self.marks[-1].resumed:
            # It began without a checkpoint, of which nothing is told.
            self.marks.append(Mark(now, 0, resumed=True))
        self.marks.append(Mark(now, images))


def _number(text: str) -> int:
    return int(text.replace(",", ""))
