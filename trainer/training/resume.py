"""Where a run starts: from its own newest checkpoint, from another run's, or from nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field

from pipelines.documents import DocumentError, validate_as
from trainer.checkpoint.errors import DamagedCheckpoint, InvalidManifest
from trainer.checkpoint.layout import manifest_key
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import JobConfig, changed_science, config_fingerprint
from trainer.config.reading import ConfigError
from trainer.engine.protocol import Engine
from trainer.evaluation.choice import open_checkpoint, parse_uri
from trainer.host_group import HostGroup
from trainer.metrics.buffer import MetricBuffer, Reduction
from trainer.metrics.tracker import MAX_POINTS, Point
from trainer.state import TrainState

logger = logging.getLogger(__name__)


def check_start(job: JobConfig, chosen: Mapping[str, Any], own: Manifest | None) -> list[str]:
    """Refuse a start that would mix different runs.

    Args:
        job: The configuration.
        chosen: Its science.
        own: Newest valid checkpoint of the run's name, if there is one.

    Returns:
        The settings in which the run's checkpoint differs, where `resume_changed` allows that.

    Raises:
        ConfigError: If the checkpoint belongs to another configuration, if `resume=never` meets a
            run that exists, or if `resume` is neither a mode nor a checkpoint's URI.
    """
    if job.resume == "never" and own is not None:
        raise ConfigError(
            f"resume=never, but run={job.run} already has a checkpoint of {own.images:,} images at "
            f"{paths.run_uri(job)}; choose another run=NAME, or resume=auto to continue it"
        )
    if job.resume not in ("auto", "never"):
        parse_uri(job.resume)
    return [] if own is None else science_changes(job, chosen, own, place=f"run={job.run}")


def science_changes(
    job: JobConfig, chosen: Mapping[str, Any], manifest: Manifest, *, place: str
) -> list[str]:
    """Compare the science of a job with that of a checkpoint.

    Args:
        job: The configuration.
        chosen: Its science.
        manifest: The checkpoint.
        place: What to call it.

    Returns:
        What differs, as `key: old -> new`.

    Raises:
        ConfigError: If anything does and `resume_changed` is not set.
        InvalidManifest: If the checkpoint records something else than settings.
    """
    for group, settings in manifest.science.items():
        if not isinstance(settings, Mapping):
            raise _invalid(manifest, f"its {group} is no group of settings")
    if manifest.config_fingerprint == config_fingerprint(chosen):
        return []
    changes = changed_science(manifest.science, chosen)
    if changes and not job.resume_changed:
        raise ConfigError(
            f"the checkpoint of {manifest.images:,} images of {place} was trained with other "
            f"settings ({'; '.join(changes)}); use those settings to continue it, another run=NAME "
            "to start anew, or resume_changed=true to go on from it with yours"
        )
    return changes


def _check_number(text: str) -> str:
    try:
        float.fromhex(text)
    except OverflowError as error:
        raise ValueError(f"{text} is beyond all numbers") from error
    return text


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[str, AfterValidator(_check_number)]


@dataclass(frozen=True, kw_only=True)
class SavedCounters:
    """What a checkpoint holds of a run beside its tensors.

    Attributes:
        images: Images seen.
        updates: Optimizer updates applied.
        skipped_updates: Updates skipped because a gradient was not finite.
        metrics: What was recorded since the last point of the curves: `MetricBuffer.state`.
        unsent_points: Points that had not reached the tracker: each `Point.to_json`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    images: _Count
    updates: _Count
    skipped_updates: _Count
    metrics: dict[str, tuple[Reduction, _Number, _Number]] = field(default_factory=dict)
    unsent_points: Annotated[
        tuple[tuple[_Count, dict[str, _Number]], ...], Field(max_length=MAX_POINTS)
    ] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> SavedCounters:
        """Read what a checkpoint's manifest holds, believing nothing.

        Raises:
            InvalidManifest: It is nothing that a run has saved.
        """
        try:
            counters = validate_as(cls, manifest.train_state)
        except DocumentError as error:
            raise _invalid(manifest, f"of its train_state {error}") from error
        if counters.images != manifest.images:
            raise _invalid(manifest, f"its train_state is one of {counters.images} images")
        return counters

    @property
    def state(self) -> TrainState:
        """The run's counters, to go on from."""
        return TrainState(
            images=self.images, updates=self.updates, skipped_updates=self.skipped_updates
        )

    @property
    def unsent(self) -> list[Point]:
        """The points that had not reached the tracker."""
        return [Point.from_json(encoded) for encoded in self.unsent_points]


def _invalid(manifest: Manifest, reason: str) -> InvalidManifest:
    return InvalidManifest(
        f"The manifest {manifest_key(manifest.run, manifest.images)} cannot be used: {reason}. It "
        "was edited, or another version wrote it: restore it, or remove that checkpoint to go on "
        "from the one before."
    )


class Restored(NamedTuple):
    """Where a run goes on."""

    state: TrainState
    unsent: list[Point]
    """Points of its own curves that had not reached the tracker when the checkpoint was saved."""
    position: int | None
    """Images of the run's own checkpoint; None for a new run and for another run's checkpoint."""
    fingerprint: str
    """Digest of the science with which the training began that goes on: a version that knows more
    settings would compute another one of the same."""


def restore(
    job: JobConfig,
    chosen: Mapping[str, Any],
    *,
    engine: Engine,
    metrics: MetricBuffer,
    checkpoints: CheckpointReader,
    ranks: HostGroup,
    report: Callable[[dict[str, object]], None],
) -> Restored:
    """Bring the engine to where the run left off; a collective call.

    A checkpoint whose content turns out damaged is passed over for the one before it.

    Args:
        job: The configuration.
        chosen: Its science.
        engine: Holds freshly initialised weights.
        metrics: Takes what was recorded since the last point of the curves.
        checkpoints: The run's own checkpoints.
        ranks: How this rank agrees with the others.
        report: Takes a note for the user.

    Returns:
        The run's counters, and points of its curves to record again.

    Raises:
        ConfigError: If every checkpoint of the run is damaged, if its newest was saved with another
            configuration, or if `resume` names one that does not fit.
    """
    before: int | None = None
    while (manifest := checkpoints.newest_valid(before=before)) is not None:
        # It may have appeared since the start was checked, by another launch of the same name.
        changes = science_changes(job, chosen, manifest, place=f"run={job.run}")
        try:
            restored = _load(checkpoints, manifest, engine, metrics, report)
            known = config_fingerprint(chosen) if changes else manifest.config_fingerprint
            return restored._replace(position=manifest.images, fingerprint=known)
        except (DamagedCheckpoint, InvalidManifest) as damage:
            report({"kind": "warning", "text": str(damage)})
            before = manifest.images
    if not checkpoints.is_empty():
        # The engine may hold part of what was read; and a new run must not replace the evidence.
        raise all_damaged_error(job)
    if job.resume not in ("auto", "never"):
        _, source, manifest = open_checkpoint(job.resume, job.store, ranks=ranks)
        science_changes(job, chosen, manifest, place=job.resume)
        try:
            restored = _load(source, manifest, engine, metrics, report)
            # Its points are of the other run's curves, and this training is not that one.
            return restored._replace(unsent=[], fingerprint=config_fingerprint(chosen))
        except (DamagedCheckpoint, InvalidManifest) as damage:
            raise ConfigError(f"resume={job.resume} is damaged: {damage}") from damage
    return Restored(TrainState(), [], None, config_fingerprint(chosen))


def all_damaged_error(job: JobConfig) -> ConfigError:
    """Return the error for a run that has checkpoints and none that can be used."""
    return ConfigError(
        f"run={job.run} has checkpoints at {paths.run_uri(job)}, and each of them is damaged; "
        "restore the store, remove that folder to start the run anew, or choose another run=NAME"
    )


def _load(
    checkpoints: CheckpointReader,
    manifest: Manifest,
    engine: Engine,
    metrics: MetricBuffer,
    report: Callable[[dict[str, object]], None],
) -> Restored:
    logger.info("reading the checkpoint %s", checkpoints.uri(manifest.images))
    counters = SavedCounters.of(manifest)
    checkpoints.restore(manifest, engine.fragments())
    metrics.load_state(counters.metrics)
    state = counters.state
    engine.load_fragments(state.updates)
    uri = checkpoints.uri(manifest.images)
    report({"kind": "resumed", "images": state.images, "uri": uri})
    return Restored(state, counters.unsent, None, manifest.config_fingerprint)
