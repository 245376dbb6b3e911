"""What is measured of a run's checkpoints while it is trained: where it is kept, and how told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field

from pipelines.documents import seal
from trainer.checkpoint import layout
from trainer.checkpoint.errors import DamagedCheckpoint, InvalidManifest
from trainer.checkpoint.index import CheckpointIndex
from trainer.config.job import EvalConfig
from trainer.config.reading import to_dict
from trainer.engine.protocol import EngineConfig
from trainer.evaluation.precision import is_of_training
from trainer.evaluation.reports import (
    CheckpointReport,
    Measurement,
    evaluation_key,
    read_distances,
    reference_kind,
)
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreError
from trainer.storage.kept import read_or_set_aside
from trainer.storage.store import Store

_TOLD_AGAIN = 2
"""Reports of which the tracker is told again; those before are older than the last checkpoint."""
MAX_TRIES = 2
"""How often measuring one checkpoint may end a process before it is left out."""


def asked_during(config: EvalConfig) -> EvalConfig:
    """Return what is drawn and measured of a checkpoint on the way."""
    samples = config.samples if config.during.samples is None else config.during.samples
    return replace(config, samples=samples)


@dataclass(frozen=True)
class MeasuredCheckpoints:
    """What is known of the checkpoints of one run.

    Attributes:
        store: Where it is kept.
        run: Name of the run.
        config: How the run measures itself at its end.
        tracker: Takes figures and grids.
        report: Takes a message for the driver.
        launch: Number of the launch that measures.
        engine: How the run trains.
    """

    store: Store
    run: str
    config: EvalConfig
    tracker: Tracker
    report: Callable[[dict[str, object]], None]
    launch: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def catch_up(self, is_due: Callable[[int], bool]) -> list[int]:
        """Find out which committed checkpoints are still to be measured, oldest first.

        Of the newest that are measured the tracker is told again: the process that measured them
        may have died with what it had told. What is there already it passes over.

        Args:
            is_due: Tells of a checkpoint whether it is one that is measured.

        Raises:
            StoreError: The store fails.
        """
        keys = self.store.list(f"{self.run}/")
        index = CheckpointIndex(self.store, run=self.run)
        unmeasured: list[int] = []
        reports: list[str] = []
        for images in sorted(layout.folders(self.run, keys)):
            if is_due(images) and layout.manifest_key(self.run, images) in keys:
                try:
                    attempt = index.examine(images).attempt
                except (DamagedCheckpoint, InvalidManifest):
                    continue
                found = self._find_report(images, attempt, sorted(keys))
                if found is None:
                    unmeasured.append(images)
                elif found != evaluation_key(self.run, images, "report.json"):
                    reports.append(found)  # and not that of an end, which its launch tells
        for key in reports[-_TOLD_AGAIN:]:
            if (report := read_or_set_aside(self.store, key, CheckpointReport)) is not None:
                self._track(report, None)
        return unmeasured

    def _find_report(self, images: int, attempt: str, keys: list[str]) -> str | None:
        """Return the key of the report of a checkpoint; None if it was not measured alike."""
        for each in read_distances(self.store, self.run, images, keys=keys, attempts={attempt}):
            is_own = each.distance.features == self.config.features.name
            if is_own and self._is_alike(each.measurement):
                return each.report
        return None

    def _is_alike(self, measurement: Measurement) -> bool:
        asked = asked_during(self.config)
        wanted = Measurement(
            attempt=measurement.attempt,
            weights="ema",
            samples=asked.samples,
            seed=asked.seed,
            sampler=to_dict(asked.sampler),
            extractors=measurement.extractors,
            held_out_index=measurement.held_out_index,
            reference=reference_kind(asked.reference),
            compared=asked.compared,
            precision=measurement.precision,
        )
        # What measures beside the workers may do so on a processor.
        is_own = is_of_training(measurement.precision, self.engine)
        return is_own and measurement == wanted

    def is_there(self, images: int) -> bool:
        """Tell whether a checkpoint can be measured; True also if the store does not say."""
        try:
            return CheckpointIndex(self.store, run=self.run).is_committed(images)
        except StoreError:
            return True

    def begin(self, images: int, *, again: bool) -> bool:
        """Note that a checkpoint is being measured, which may be the end of this process.

        Args:
            images: Which checkpoint.
            again: Whether tries of earlier launches count: they do for the same checkpoint, and not
                where it was trained again. Those of this launch count in any case, since what ends
                the process before the checkpoint is saved does so after it is trained again.

        Returns:
            Whether it may be tried.

        Raises:
            StoreError: The store fails.
        """
        key = self._begun_key(images)
        before = read_or_set_aside(self.store, key, _Begun)
        tries = 0
        if before is not None and (again or before.launch == self.launch):
            tries = before.tries
        if tries < MAX_TRIES:
            noted = {"tries": tries + 1, "launch": self.launch}
            self.store.put(key, json.dumps(seal(noted)).encode())
        return tries < MAX_TRIES

    def end(self, images: int) -> None:
        """Note that this process has lived through it.

        Raises:
            StoreError: The store fails.
        """
        self.store.delete(self._begun_key(images))

    def _begun_key(self, images: int) -> str:
        return evaluation_key(self.run, images, "begun.json")

    def keep(self, report: CheckpointReport, grid: bytes) -> None:
        """Write a report where `python -m trainer.evaluate` looks for it.

        Raises:
            StoreError: The store fails.
        """
        for name, data in (("grid.png", grid), ("report.json", report.to_json())):
            self.store.put(self.key(report, name), data)

    def key(self, report: CheckpointReport, name: str) -> str:
        """Return the key of one result."""
        return evaluation_key(self.run, report.images, f"{report.measurement.name}/{name}")

    def tell(self, report: CheckpointReport, grid: bytes | None) -> None:
        """Show what was measured of a checkpoint, to the user and to the tracker.

        Figures that do not compare with those of the end have curves of their own.

        Args:
            report: The figures.
            grid: Some of the samples; None if they cannot be had.
        """
        self._track(report, grid)
        distance = report.distance(self.config.features.name)
        real = "" if distance.real is None else f", real images {distance.real.frechet:.4f}"
        self.report(
            {
                "kind": "note",
                "text": f"measured after {report.images:,} images: Fréchet distance "
                f"({distance.features}) {distance.frechet:.4f} of {report.measurement.samples:,} "
                f"samples{real}",
            }
        )

    def _track(self, report: CheckpointReport, grid: bytes | None) -> None:
        distance = report.distance(self.config.features.name)
        figures = {**distance.metrics(), "eval/network_evaluations": report.network_evaluations}
        lowest = f"eval/frechet_{distance.features}"
        if report.measurement.samples != self.config.samples:
            figures = {_apart(name): value for name, value in figures.items()}
            lowest = _apart(lowest)
        self.tracker.measured(
            figures,
            images=report.images,
            lowest=lowest,
            protocol=report.measurement.protocol(distance.features),
        )
        # Grids on the way show other samples, and their slider shows the same ones all along.
        if grid is not None and self.config.grid_interval_images == 0:
            self.tracker.image("samples", grid, images=report.images)

    def warn(self, images: int, reason: str) -> None:
        """Say why a checkpoint is not measured."""
        text = f"the checkpoint of {images:,} images is not measured: {reason}"
        self.report({"kind": "warning", "text": text})


def _apart(name: str) -> str:
    group, _, rest = name.partition("/")
    return f"{group}_during/{rest}"


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A measurement that was begun.

    Attributes:
        tries: How often.
        launch: Number of the launch that did so last.
    """

    tries: Annotated[int, Field(ge=1)]
    launch: Annotated[int, Field(ge=0)] = 0
