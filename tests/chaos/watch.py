"""What a run tells about its progress, with the time at which it told it."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_PROGRESS = re.compile(r"^([\d,]+)/[\d,]+ images \(", re.M)
_RESUMED = re.compile(r"resumed after ([\d,]+) images")
_SAVED = re.compile(r"(?:^|: )checkpoint: \S*/0*(\d+)/?$", re.M)
_FAILED = re.compile(r"([\d,]+) images were trained, ")


@dataclass(frozen=True)
class Mark:
    """A run is so far, or begins again from there.

    Attributes:
        time: Of `time.monotonic`, in seconds.
        images: How many images are trained.
        resumed: Whether that is what a checkpoint had that the run goes on from.
        reached: If so, how many images were trained before, by all that the run has told.
        saved: Likewise, what the newest checkpoint had that it told of.
    """

    time: float
    images: int
    resumed: bool = False
    reached: int = 0
    saved: int = 0

    @property
    def lost(self) -> int:
        """Images that were trained, and are trained again from here."""
        return max(0, self.reached - self.images) if self.resumed else 0

    def at_risk(self, interval_images: int) -> int:
        """The most images that may be trained again from here.

        That is what came after the newest save that was told of, which is the last or, as long as
        that is on its way, the one before.

        Args:
            interval_images: Images between two saves.
        """
        due = self.reached - self.reached % interval_images
        return max(0, self.reached - max(self.saved, due - interval_images))


class Watch:
    """Reads what a driver prints, from its own thread.

    Args:
        log: The file that drivers append their output to.

    Attributes:
        marks: What was told, in its order. Only ever grows.
    """

    def __init__(self, log: Path) -> None:
        self.marks: list[Mark] = []
        self._reached = 0
        self._saved = 0
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
                        self._resume(now, _number(found[1]))
                    elif found := _SAVED.search(line):
                        self._saved = max(self._saved, _number(found[1]))
                    elif found := _FAILED.search(line):
                        # By workers that outlived those whose last lines were lost with them.
                        self._reached = max(self._reached, _number(found[1]))
                if is_last:
                    return
                time.sleep(0.05)

    def _progress(self, now: float, images: int) -> None:
        if images < self.images and not self.marks[-1].resumed:
            # It began without a checkpoint, of which nothing is told.
            self._resume(now, 0)
        self.marks.append(Mark(now, images))
        self._reached = max(self._reached, images)

    def _resume(self, now: float, images: int) -> None:
        self.marks.append(Mark(now, images, resumed=True, reached=self._reached, saved=self._saved))
        self._reached = images


def _number(text: str) -> int:
    return int(text.replace(",", ""))
