"""The history of a run in its store: its curves, its settings, and what it ran on.

    <store>/<run>/history/000000000007-00002.json       one for each attempt of each launch
    <store>/<run>/history/000000012800-samples-IDENTITY.png     grids on the way, made smaller

A tracker has more, and may be away, or gone together with a machine. What is here is enough to draw
a run's page, and lies beside its checkpoints. A document is bounded however long the run is; grids
are one for each that the run draws, of at most 640 pixels a side.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from pipelines.addresses import hide_credentials
from pipelines.documents import DocumentError, seal, validate_as
from trainer.metrics.tracker import Point, Tracker
from trainer.storage.errors import MissingObject, StoreError
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store, check_key

logger = logging.getLogger(__name__)

_MAX_POINTS = 400
_MAX_CURVES = 256
_MAX_BYTES = 1 << 24
_LEAST_S = 30.0
_SHARE = 0.01
"""It is written again when the attempt has lasted so much longer."""
_LEAVE_S = 15.0
_MAX_SIDE = 640
_NODE = re.compile(r"system/node_\d+/(\w+)")
_PICTURE = re.compile(r"(\d{12})-samples-(\w+)\.png")
_IDENTITY_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class KeptCurve:
    """A curve, thinned out evenly.

    Attributes:
        images: Positions of the run, rising.
        values: One for each; None is no number.
    """

    images: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class AttemptHistory:
    """What one attempt of a launch has told.

    Attributes:
        identity: Tells the training from others that were begun under the same name.
        began_ms: When it began, in milliseconds since 1970.
        about: The command, the commit, versions and machines, by name.
        settings: All of its settings.
        curves: Its metrics.
        science: Those that decide its weights, as its checkpoints record them, with the digests of
            data set and autoencoder; none in documents of older versions.
        began_images: How many images the weights had seen that it went on from; None in documents
            of older versions.
    """

    identity: str
    began_ms: Annotated[int, Field(ge=0, lt=2**53)]
    about: dict[str, str]
    settings: dict[str, Any]
    curves: dict[str, KeptCurve]
    science: dict[str, Any] = field(default_factory=dict)
    began_images: Annotated[int, Field(ge=0, lt=2**63)] | None = None


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """What all attempts of a training have told.

    Attributes:
        attempts: Oldest first.
        pictures: Keys of the grids on the way, by images.
    """

    attempts: tuple[AttemptHistory, ...] = ()
    pictures: Mapping[int, str] = field(default_factory=dict)

    def curves(self) -> dict[str, dict[int, float]]:
        """Return the values of all metrics by images.

        What came after the checkpoint from which a later attempt went on is lost work. Where
        attempts overlap the newest counts.
        """
        joined: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for attempt in self.attempts:
            if (began := attempt.began_images) is not None:
                for name, points in joined.items():
                    joined[name] = {at: value for at, value in points.items() if at <= began}
            for name, curve in attempt.curves.items():
                for images, value in zip(curve.images, curve.values, strict=False):
                    joined[name][images] = math.nan if value is None else value
        return {name: dict(sorted(points.items())) for name, points in joined.items() if points}


@contextmanager
def keep_history(
    tracker: Tracker,
    store: Store,
    *,
    run: str,
    writer: str,
    identity: str,
    about: Mapping[str, str],
    settings: Mapping[str, Any],
    science: Mapping[str, Any],
    began_images: int,
) -> Iterator[Tracker]:
    """Keep what a tracker is told in the store too, for the length of a `with` block.

    Args:
        tracker: Is told all of it.
        store: Where runs are kept; one that fails is told of in a line, and stops nothing.
        run: Name of the run.
        writer: This attempt's number among all of the run.
        identity: Tells the training from others under the run's name.
        about: See `AttemptHistory`; credentials of addresses that it quotes are left out.
        settings: All settings.
        science: See `AttemptHistory`.
        began_images: See `AttemptHistory`.

    Yields:
        A tracker that keeps and passes on.
    """
    attempt = AttemptHistory(
        identity=identity,
        began_ms=int(time.time() * 1000),
        about={name: hide_credentials(text) for name, text in about.items()},
        settings=dict(settings),
        curves={},
        science=dict(science),
        began_images=began_images,
    )
    keeper = _Keeper(store, run=run, writer=writer, attempt=attempt)
    try:
        yield _KeptTracker(tracker, keeper)
    finally:
        keeper.close()


class _Curve:
    """Keeps every first, second, fourth… point, so that there are never too many."""

    def __init__(self) -> None:
        self._stride = 1
        self._count = 0
        self._points: list[tuple[int, float | None]] = []
        self._newest: tuple[int, float | None] | None = None

    def add(self, images: int, value: float) -> None:
        self._newest = images, _shortened(value)
        if self._count % self._stride == 0:
            self._points.append(self._newest)
            if len(self._points) > _MAX_POINTS:
                del self._points[1::2]
                self._stride *= 2
        self._count += 1

    def kept(self) -> KeptCurve:
        points = dict(self._points)
        if self._newest is not None:
            points[self._newest[0]] = self._newest[1]
        shown = sorted(points.items())
        return KeptCurve(
            images=tuple(images for images, _ in shown),
            values=tuple(value for _, value in shown),
        )


def _shortened(value: float) -> float | None:
    """Leave a number the digits that a picture shows; what is no number is none in JSON either."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


class _Keeper:
    """Writes what was told, every now and then, in a thread of its own.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        writer: Names the document.
        attempt: What is known at the beginning.
    """

    def __init__(self, store: Store, *, run: str, writer: str, attempt: AttemptHistory) -> None:
        self._store = store
        self._folder = _folder(run)
        self._writer = writer
        self._attempt = attempt
        self._owner = _owner(attempt.identity)
        self._curves: dict[str, _Curve] = {}
        self._pictures: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._is_new = True
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._write_on, name="history", daemon=True)
        self._thread.start()

    def add(self, values: Mapping[str, float], images: int) -> None:
        """Take points."""
        with self._lock:
            for name, value in _of_all_nodes(values).items():
                if name in self._curves or len(self._curves) < _MAX_CURVES:
                    self._curves.setdefault(name, _Curve()).add(images, value)
            self._is_new = True

    def add_picture(self, png: bytes, images: int) -> None:
        """Take a grid."""
        with self._lock:
            self._pictures[f"{images:012d}-samples-{self._owner}.png"] = png

    def hurry(self) -> None:
        """Have it written now: a run may go on from here without this process."""
        self._wake.set()

    def close(self) -> None:
        """Write what is left, unless the store takes too long."""
        self._ending.set()
        self._wake.set()
        self._thread.join(_LEAVE_S)

    def _write_on(self) -> None:
        began = time.monotonic()
        while True:
            is_last = self._ending.is_set()
            try:
                self._write()
                self._has_failed = False
            except Exception as error:  # whatever it is, the next writing may succeed
                if not self._has_failed:
                    expected = isinstance(error, StoreError)
                    why = str(error) if expected else f"{type(error).__name__}: {error}"
                    logger.warning("the history of the run is not kept for now: %s", why)
                self._has_failed = True
            if is_last:
                return
            self._wake.wait(max(_LEAST_S, _SHARE * (time.monotonic() - began)))
            if not self._ending.is_set():
                self._wake.clear()

    def _write(self) -> None:
        with self._lock:
            pictures = dict(self._pictures)
            curves = {name: curve.kept() for name, curve in self._curves.items()}
            is_new, self._is_new = self._is_new, False
        try:
            for name, png in pictures.items():
                try:
                    shown = smaller(png)
                except (OSError, ValueError) as error:
                    logger.warning("the grid %s is not kept in the history: %s", name, error)
                else:
                    self._store.put(f"{self._folder}{name}", shown)
                with self._lock:
                    if self._pictures.get(name) is png:
                        del self._pictures[name]
            if is_new:
                told = {
                    **asdict(self._attempt),
                    "curves": {name: vars(curve) for name, curve in curves.items()},
                }
                content = json.dumps(seal(told), separators=(",", ":")).encode()
                self._store.put(f"{self._folder}{self._writer}.json", content)
        except Exception:
            with self._lock:
                self._is_new = self._is_new or is_new
            raise


def _of_all_nodes(values: Mapping[str, float]) -> dict[str, float]:
    """Put the average of all nodes in the place of what each of them uses: there may be many."""
    whole, of_nodes = dict[str, float](), defaultdict[str, list[float]](list)
    for name, value in values.items():
        if node := _NODE.fullmatch(name):
            of_nodes[node[1]].append(value)
        else:
            whole[name] = value
    means = {f"system/nodes/{kind}": sum(each) / len(each) for kind, each in of_nodes.items()}
    return whole | means


def smaller(png: bytes, *, max_side: int = _MAX_SIDE) -> bytes:
    """Return a picture as a PNG of at most so many pixels on a side.

    Raises:
        OSError: It is no picture.
    """
    with Image.open(io.BytesIO(png)) as picture:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


class _KeptTracker(Tracker):
    """Passes on what it is told, and keeps a part of it."""

    def __init__(self, tracker: Tracker, keeper: _Keeper) -> None:
        self._tracker = tracker
        self._keeper = keeper

    def config(
        self,
        resolved: Mapping[str, Any],
        *,
        lasting: Mapping[str, Any],
        present: Mapping[str, Any],
    ) -> None:
        self._tracker.config(resolved, lasting=lasting, present=present)

    def metrics(self, values: Mapping[str, float], *, images: int) -> None:
        self._keeper.add(values, images)
        self._tracker.metrics(values, images=images)

    def unsent(self) -> list[Point]:
        return self._tracker.unsent()

    def image(self, name: str, png: bytes, *, images: int) -> None:
        if name == "samples":
            self._keeper.add_picture(png, images)
        self._tracker.image(name, png, images=images)

    def file(self, name: str, data: bytes) -> None:
        self._tracker.file(name, data)

    def tags(self, values: Mapping[str, str]) -> None:
        self._tracker.tags(values)

    def checkpoint(self, uri: str, *, images: int) -> None:
        self._tracker.checkpoint(uri, images=images)
        self._keeper.hurry()

    def measured(
        self, values: Mapping[str, float], *, images: int, lowest: str, protocol: str
    ) -> None:
        self._tracker.measured(values, images=images, lowest=lowest, protocol=protocol)

    def close(self, status: str, reason: str = "") -> None:
        self._tracker.close(status, reason)


def read_history(store: Store, run: str, *, keys: Sequence[str] | None = None) -> RunHistory:
    """Read the history of the training that was begun last under a run's name.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        keys: Keys of the run, if they are known.

    Returns:
        What there is. A document that cannot be believed is passed over with a warning.

    Raises:
        StoreError: The store fails.
    """
    folder = _folder(run)
    names = [
        key for key in (store.list(folder) if keys is None else keys) if key.startswith(folder)
    ]
    attempts = []
    for key in sorted(name for name in names if name.endswith(".json")):
        try:
            told = read_sealed(store, key, max_bytes=_MAX_BYTES)
            attempts.append(validate_as(AttemptHistory, told))
        except MissingObject:
            continue
        except DocumentError as error:
            logger.warning("passing over %s, which cannot be believed: %s", store.uri(key), error)
    newest = attempts[-1].identity if attempts else ""
    found = {name: _PICTURE.fullmatch(name.removeprefix(folder)) for name in names}
    return RunHistory(
        attempts=tuple(each for each in attempts if each.identity == newest),
        pictures={
            int(match[1]): name
            for name, match in found.items()
            if match is not None and match[2] == _owner(newest)
        },
    )


def _owner(identity: str) -> str:
    """Return what the names of a training's grids end in."""
    return identity[:_IDENTITY_LENGTH]


def _folder(run: str) -> str:
    return f"{check_key(run)}/history/"
