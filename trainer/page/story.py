"""What a page tells of a run, read from its store; no tracker and no machine is asked."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cluster.hardware import peak_tflops
from models.transformer.cost import ModelShape, parameters, training_multiply_adds
from pipelines.documents import DocumentError, validate_as
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.job import fingerprinted
from trainer.evaluation.model_record import ModelRecord
from trainer.evaluation.reports import (
    EvaluationReport,
    MeasuredDistance,
    evaluation_key,
    read_distances,
)
from trainer.metrics.history import RunHistory, read_history
from trainer.page.pictures import fetch_picture
from trainer.storage.errors import CheckpointError, MissingObject, StoreError
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store
from trainer.training.goodput import KINDS, Kind, LaunchTime, read_launches, total_time

logger = logging.getLogger(__name__)

_FLOPS_PER_MULTIPLY_ADD = 6
"""Of the forward pass: 2 there, and twice as many in the backward pass."""
_MAX_ON_THE_WAY = 6
_SCIENCE = ("data", "data_set", "codec", "autoencoder", "model", "flow", "optim", "train")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a page shows of a run, each as `fetch_picture` returns it.

    Attributes:
        grid: Samples of the newest weights that were measured.
        film: How samples come into being, scale by scale.
        on_the_way: Smaller grids by images, the first, the last and some between.
    """

    grid: bytes | None = None
    film: bytes | None = None
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
        told = self.newest.science if self.newest is not None else self.settings
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
        return _FLOPS_PER_MULTIPLY_ADD * training_multiply_adds(self.shape)

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
    final = None if newest is None else _final(store, run, newest.images)
    manifests = reader.index.listing().manifests
    return RunStory(
        name=run,
        uri=store.uri(run),
        newest=newest,
        checkpoints=tuple(sorted(manifests)),
        history=history,
        curves=history.curves(),
        distances=_distances(store, run, keys, manifests),
        final=final,
        launches=tuple(read_launches(store, run)),
        pictures=_pictures(store, run, keys, history),
    )


def _final(store: Store, run: str, images: int) -> EvaluationReport | None:
    key = evaluation_key(run, images, "report.json")
    try:
        return validate_as(EvaluationReport, read_sealed(store, key))
    except (MissingObject, DocumentError):
        return None  # what is damaged was told of when all that was measured was read


def _distances(
    store: Store, run: str, keys: Mapping[str, int], manifests: Mapping[int, Manifest]
) -> dict[int, list[MeasuredDistance]]:
    """Read all that was ever measured, also of checkpoints that were deleted since."""
    folders = {key.split("/")[2] for key in keys if key.startswith(f"{run}/evaluation/")}
    found = {}
    for images in sorted(int(name) for name in folders if name.isdecimal()):
        manifest = manifests.get(images)
        attempts = None if manifest is None else [manifest.attempt]
        if measured := read_distances(store, run, images, keys=sorted(keys), attempts=attempts):
            found[images] = measured
    return found


def _pictures(store: Store, run: str, keys: Mapping[str, int], history: RunHistory) -> Pictures:
    def newest(name: str) -> bytes | None:
        found = [key for key in keys if key.startswith(f"{run}/evaluation/")]
        for key in sorted((key for key in found if key.endswith(f"/{name}")), reverse=True):
            if (drawn := fetch_picture(store, key, max_side=1600)) is not None:
                return drawn
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
