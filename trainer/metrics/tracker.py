"""What training needs of an experiment tracker, and the points that are still on their way to it.

Checkpoints take those along. Else a kill would lose them for good: the resumed run does not train
again what came before its checkpoint, and the process that would have sent them is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from pipelines.domains import Checked

MAX_POINTS = 1000


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
            if len(self._points) > MAX_POINTS:
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


class InvalidTrackingUri(ValueError):
    """A tracking address that must not be used."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked):
    """Where runs are tracked.

    Attributes:
        uri: MLflow tracking URI: `http(s)://…` for a server, `sqlite:///…` for a file; None is a
            SQLite file in the home folder of the job.
        experiment: MLflow experiment that holds the runs.
        required: Refuse to start when the tracker cannot be reached. Once training runs, a lost
            tracker never stops it either way.
        flush_timeout_s: Longest wait at the end for points that are still on their way.
    """

    uri: str | None = field(default=None, metadata={"place": "uri"})
    experiment: str = "lapflow"
    required: bool = True
    flush_timeout_s: Annotated[float, Field(ge=0)] = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uri is not None and "@" in self.uri:
            raise InvalidTrackingUri(
                "tracking.uri contains '@': leave credentials out of it and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )


class Tracker:
    """Takes what a run reports. No method raises for a tracker that is away.

    This one keeps nothing: it is that of every rank but the first.
    """

    def config(
        self,
        resolved: Mapping[str, Any],
        *,
        lasting: Mapping[str, Any],
        present: Mapping[str, Any],
    ) -> None:
        """Record the configuration.

        Args:
            resolved: All of it.
            lasting: What no launch of the run may change.
            present: What else is worth a look, as this launch has it.
        """

    def metrics(self, values: Mapping[str, float], *, images: int) -> None:
        """Record values at a position of the run."""

    def unsent(self) -> list[Point]:
        """Return the recorded values that are not safe yet, oldest first."""
        return []

    def image(self, name: str, png: bytes, *, images: int) -> None:
        """Record a picture at a position of the run."""

    def tag(self, name: str, value: str) -> None:
        """Attach or replace a named text."""

    def close(self, status: str) -> None:
        """Send what is left and end the run as "FINISHED", "KILLED" or "FAILED"."""
