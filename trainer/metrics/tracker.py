"""What training needs of an experiment tracker.

Checkpoints take along the points that are still on their way to it. Else a kill would lose them for
good: the resumed run does not train again what came before its checkpoint, and the process that
would have sent them may be gone together with its machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from pipelines.domains import Checked

MAX_POINTS = 1000
"""So many points a checkpoint takes along at most; of older ones the store has a copy."""
UNKNOWN = "unknown"
"""Stands for the protocol of figures whose protocol nothing tells."""


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


_OF_PROTOCOL = re.compile(r"([^/@]+)@([^/@]+)/(.+)")


class Figure(NamedTuple):
    """The name of a figure that was measured by a protocol: only those of the same compare."""

    group: str
    """Its first part, such as "eval"."""
    protocol: str
    """How it was measured."""
    rest: str
    """What follows in its name."""

    @classmethod
    def parse(cls, name: str) -> Figure | None:
        """Take a name of `by_protocol` apart; None if a metric has no protocol."""
        found = _OF_PROTOCOL.fullmatch(name)
        return None if found is None else cls(*found.groups())


def by_protocol(figures: Mapping[str, float], protocol: str) -> dict[str, float]:
    """Name figures after their protocol too: `eval/x` becomes `eval@PROTOCOL/x`.

    So they carry it wherever points go, through checkpoints too, and whoever draws curves can keep
    protocols apart.
    """
    named = {}
    for name, value in figures.items():
        group, _, rest = name.partition("/")
        named[f"{group}@{protocol or UNKNOWN}/{rest}"] = value
    return named


class InvalidTrackingUri(ValueError):
    """A tracking address that must not be used."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked):
    """Where runs are tracked.

    Attributes:
        uri: MLflow tracking URI: `http(s)://…` for a server, `sqlite:///…` for a file; None is a
            SQLite file in the home folder of the job.
        experiment: MLflow experiment that holds the runs.
        sweep: Name of a sweep, below whose own page MLflow shows the run; `--multirun` gives it.
        required: Refuse to start when the tracker cannot be reached. Once training runs, a lost
            tracker never stops it either way.
        flush_timeout_s: Longest wait at the end for points that are still on their way.
    """

    uri: str | None = field(default=None, metadata={"place": "uri"})
    experiment: str = "lapflow"
    sweep: str | None = None
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
        """Return the recorded values that neither the tracker nor a store has, oldest first."""
        return []

    def image(self, name: str, png: bytes, *, images: int) -> None:
        """Record a picture at a position of the run."""

    def file(self, name: str, data: bytes) -> None:
        """Record a file about the run, in place of an older one of this name."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Attach or replace named texts."""

    def checkpoint(self, uri: str, *, images: int) -> None:
        """Record a checkpoint, from which the run may go on, also on another machine."""

    def measured(
        self, values: Mapping[str, float], *, images: int, lowest: str, protocol: str
    ) -> None:
        """Record figures of a checkpoint.

        Args:
            values: The figures.
            images: The checkpoint's position of the run.
            lowest: That of the figures which is the lowest for the best one; it may be missing.
            protocol: How they were measured; only figures of the same are compared, or in one
                curve.
        """

    def close(self, status: str, reason: str = "") -> None:
        """Send what is left and end the run as "FINISHED", "KILLED" or "FAILED", for a reason."""
