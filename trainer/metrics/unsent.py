"""Points of the curves that have not reached the tracker, so that a checkpoint takes them along.

Else a kill would lose them for good: the resumed run does not train again what came before its
checkpoint, and the process that would have sent them is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

MOST_POINTS = 1000


class Point(NamedTuple):
    """Values at a position of the run."""

    images: int
    values: dict[str, float]

    def to_json(self) -> list[Any]:
        """Return JSON values that keep every bit, also of what JSON has no number for."""
        return [self.images, {name: value.hex() for name, value in self.values.items()}]

    @classmethod
    def from_json(cls, encoded: Sequence[Any]) -> Point:
        """Rebuild a point from `to_json`."""
        images, values = encoded
        return cls(images, {name: float.fromhex(value) for name, value in values.items()})


class UnsentPoints:
    """The newest points that are still on their way; used from several threads."""

    def __init__(self) -> None:
        self._points: dict[int, Point] = {}
        self._numbers = count()
        self._lock = threading.Lock()

    def add(self, images: int, values: Mapping[str, float]) -> int:
        """Keep a point, and return a number by which it can be forgotten."""
        with self._lock:
            number = next(self._numbers)
            self._points[number] = Point(images, dict(values))
            if len(self._points) > MOST_POINTS:
                del self._points[min(self._points)]
            return number

    def forget(self, number: int) -> None:
        """Forget a point that has arrived."""
        with self._lock:
            self._points.pop(number, None)

    def points(self) -> list[Point]:
        """Return them, oldest first."""
        with self._lock:
            return list(self._points.values())
