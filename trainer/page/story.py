"""What a page tells of a run, read from its store; no tracker and no machine is asked."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from cluster.hardware import peak_tflops
from models.transformer.cost import ModelShape, parameters, training_flops
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.job import fingerprinted
from trainer.evaluation.model_record import ModelRecord
from trainer.evaluation.reports import (
    CheckpointReport,
    EvaluationReport,
    MeasuredDistance,
    distances_of,
    evaluation_key,
    read_reports,
)
from trainer.metrics.history import RunHistory, read_history
from trainer.page.pictures import fetch_picture
from trainer.storage.errors import CheckpointError, StoreError
from trainer.storage.store import Store
from trainer.training.goodput import KINDS, Kind, LaunchTime, read_launches, total_time

logger = logging.getLogger(__name__)

_MAX_ON_THE_WAY = 6
_Report = EvaluationReport | CheckpointReport
_SCIENCE = ("data", "data_set", "codec", "autoencoder", "model", "flow", "optim", "train")


class Drawn(NamedTuple):
    """A picture of samples, and of which weights they are."""

    content: bytes
    """As `fetch_picture` returns it."""
    report: EvaluationReport | CheckpointReport
    """What was measured of the same samples."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a page shows of a run.

    Attributes:
        grid: Samples of the newest averaged weights that were measured, or of others if no averaged
            ones were.
        film: How samples come into being, scale by scale.
        on_the_way: Smaller grids by images, the first, the last and some between, each as
            `fetch_picture` returns it.
    """

    grid: Drawn | None = None
    film: Drawn | None = None
    on_the_way: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunStory:
    """All that a page tells of a run.

    Attributes:
        name: Its name.
        uri: Its place.
        newest: Its newest valid checkpoint; None if there is none.
        checkpoints: Images of all that are there.
        history: What it has told while it was trained.
        curves: Its metrics by images.
        distances: All that was measured, by images.
        final: The figures of its end; None before.
        launches: What the time of each launch went into.
        pictures: What it has drawn.
    """

    name: str
    uri: str
    newest: Manifest | None
    checkpoints: tuple[int, ...]
    history: RunHistory
    curves: Mapping[str, Mapping[int, float]]
    distances: Mapping[int, list[MeasuredDistance]]
    final: EvaluationReport | None
    launches: tuple[LaunchTime, ...]
    pictures: Pictures

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return self.newest is None and not self.history.attempts and not self.distances

    @property
    def images(self) -> int:
        """How many images it is known to have seen."""
        seen = [max(points) for points in self.curves.values() if points]
        return max([*seen, *self.checkpoints, *self.distances], default=0)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its settings: all of the newest attempt, or what a checkpoint records."""
        if self.history.attempts:
            return self.history.attempts[-1].settings
        return {} if self.newest is None else self.newest.science

    @property
    def about(self) -> Mapping[str, str]:
        """Command, commit, versions and machines of the newest attempt."""
        if self.history.attempts:
            return self.history.attempts[-1].about
        return {} if self.newest is None else {**self.newest.versions}

    @property
    def science(self) -> Mapping[str, Any]:
        """The settings that decide its weights, but for the seed, as runs of one arm share them."""
        told = self._recorded_science
        science = fingerprinted(
            {group: told[group] for group in _SCIENCE if isinstance(told.get(group), Mapping)}
        )
        train = {k: v for k, v in science.get("train", {}).items() if k != "seed"}
        return {
            **science,
            "train": train,
            "engine": {"precision": _of(told, "engine", "precision")},
        }

    @property
    def _recorded_science(self) -> Mapping[str, Any]:
        # Of equal runs one may have no checkpoint yet, so what every attempt records comes first.
        if self.history.attempts and self.history.attempts[-1].science:
            return self.history.attempts[-1].science
        return self.settings if self.newest is None else self.newest.science

    @property
    def seed(self) -> object:
        """Seed of its training; None if nothing tells it."""
        return _of(self.settings, "train", "seed")

    @property
    def total_images(self) -> int | None:
        """Its length; None if nothing tells it."""
        told = _of(self.settings, "train", "total_images")
        return told if isinstance(told, int) else None

    @property
    def is_complete(self) -> bool:
        """Whether it has come to its end."""
        newest = 0 if self.newest is None else self.newest.images
        return self.total_images is not None and newest >= self.total_images

    @property
    def workers(self) -> int:
        """How many it was trained by last."""
        if self.newest is not None:
            return self.newest.world_size
        told = self.about.get("workers", "1")
        return int(told) if told.isdecimal() else 1

    @cached_property
    def shape(self) -> ModelShape | None:
        """Sizes of its model; None if no checkpoint tells them."""
        if self.newest is None:
            return None
        try:
            return ModelRecord.of(self.newest).sizes
        except (CheckpointError, ValueError) as error:
            logger.warning("what the model of %s costs is not told: %s", self.name, error)
            return None

    @property
    def parameters(self) -> int | None:
        """Parameters of its model."""
        return None if self.shape is None else parameters(self.shape).total

    @property
    def flops_per_image(self) -> float | None:
        """What training takes for an image, by formula."""
        if self.shape is None:
            return None
        return training_flops(self.shape)

    @property
    def images_per_s(self) -> float | None:
        """The median of its speed."""
        speeds = [each for each in self.curves.get("speed/images_per_s", {}).values() if each > 0]
        return statistics.median(speeds) if speeds else None

    @property
    def flops_per_s(self) -> float | None:
        """What all its devices compute in a second of training."""
        if self.flops_per_image is None or self.images_per_s is None:
            return None
        return self.flops_per_image * self.images_per_s

    @property
    def mfu(self) -> float | None:
        """Share of its devices' peak, 0 to 1; None where that is not known, as of processors."""
        peak = peak_tflops(self.about.get("device", ""))
        if peak is None or self.flops_per_s is None:
            return None
        return self.flops_per_s / (1e12 * peak * self.workers)

    @cached_property
    def time(self) -> dict[Kind, float]:
        """Seconds of all launches by what they went into."""
        return total_time(self.launches)

    @property
    def wall_s(self) -> float:
        """How long all launches have lasted."""
        return sum(self.time[kind] for kind in KINDS)

    @property
    def device_hours(self) -> float:
        """Hours of all its devices together, while it had them."""
        return self.workers * (self.wall_s - self.time["waiting_for_room"]) / 3600


def _of(settings: Mapping[str, Any], group: str, key: str) -> Any:
    part = settings.get(group)
    return part.get(key) if isinstance(part, Mapping) else None


def read_story(store: Store, run: str) -> RunStory:
    """Read what there is to tell of a run.

    Args:
        store: Where runs are kept.
        run: Name of the run.

    Returns:
        What there is. What cannot be believed is passed over with a warning.

    Raises:
        StoreError: The store fails.
    """
    keys = store.list(f"{run}/")
    reader = CheckpointReader(store, run=run)
    newest = reader.newest_valid()
    history = read_history(store, run, keys=list(keys))
    manifests = reader.index.listing().manifests
    reports = _reports(store, run, keys, manifests)
    final = None
    if newest is not None:
        final = reports.get(newest.images, {}).get(
            evaluation_key(run, newest.images, "report.json")
        )
    return RunStory(
        name=run,
        uri=store.uri(run),
        newest=newest,
        checkpoints=tuple(sorted(manifests)),
        history=history,
        curves=history.curves(),
        distances={
            images: distances
            for images, measured in reports.items()
            if (distances := distances_of(measured))
        },
        final=final if isinstance(final, EvaluationReport) else None,
        launches=tuple(read_launches(store, run, only_read=True)),
        pictures=_pictures(store, keys, history, reports),
    )


def _reports(
    store: Store, run: str, keys: Mapping[str, int], manifests: Mapping[int, Manifest]
) -> dict[int, dict[str, _Report]]:
    """Read all that was ever measured, also of checkpoints that were deleted since."""
    folders = {key.split("/")[2] for key in keys if key.startswith(f"{run}/evaluation/")}
    found = {}
    for images in sorted(int(name) for name in folders if name.isdecimal()):
        manifest = manifests.get(images)
        attempts = None if manifest is None else [manifest.attempt]
        if measured := read_reports(store, run, images, keys=sorted(keys), attempts=attempts):
            found[images] = measured
    return found


def _rank(report: _Report) -> tuple[bool, int, bool]:
    """Return what decides which samples stand for a run: of the same weights those of its end."""
    is_own = isinstance(report, EvaluationReport)
    return report.measurement.weights == "ema", report.images, is_own


def _pictures(
    store: Store,
    keys: Mapping[str, int],
    history: RunHistory,
    reports: Mapping[int, Mapping[str, _Report]],
) -> Pictures:
    by_key = {key: report for measured in reports.values() for key, report in measured.items()}
    ranked = sorted(by_key, key=lambda key: (_rank(by_key[key]), key), reverse=True)

    def newest(name: str) -> Drawn | None:
        for report in ranked:
            key = f"{report.removesuffix('report.json')}{name}"
            if key in keys and (content := fetch_picture(store, key, max_side=1600)) is not None:
                return Drawn(content, by_key[report])
        return None

    on_the_way = {}
    for images in _spread(sorted(history.pictures)):
        try:
            drawn = fetch_picture(store, history.pictures[images], max_side=360)
        except StoreError as error:
            logger.warning("a grid on the way is not shown: %s", error)
            continue
        if drawn is not None:
            on_the_way[images] = drawn
    return Pictures(grid=newest("grid.png"), film=newest("film.png"), on_the_way=on_the_way)


def _spread(images: list[int]) -> list[int]:
    """Choose the first, the last and some between them."""
    if len(images) <= _MAX_ON_THE_WAY:
        return images
    steps = range(_MAX_ON_THE_WAY)
    return [images[round(step * (len(images) - 1) / (_MAX_ON_THE_WAY - 1))] for step in steps]
