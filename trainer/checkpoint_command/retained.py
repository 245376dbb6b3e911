"""Which checkpoints of a run are kept, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.inventory import Clearance, Inventory
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.store import StoreConfig
from trainer.checkpoint_command.run_place import RunPlace, open_run
from trainer.checkpoint_command.table import Entry, entries
from trainer.evaluate.features import FeatureName
from trainer.evaluate.scores import measured_scores
from trainer.schema import ConfigError


@dataclass(frozen=True, kw_only=True)
class RetentionSettings:
    """A run, and what of it is kept.

    Attributes:
        uri: URI of the run.
        keep_last: Newest valid checkpoints to keep.
        keep_every_images: Keep the first one at or after each multiple of this; 0 keeps none.
        keep_best: Checkpoints of the lowest Fréchet distance to keep.
        features: Extractor of the distances; None takes the one most were measured with.
        store: How to reach the store.
    """

    uri: str = field(metadata={"place": "run"})
    keep_last: int = CheckpointConfig.keep_last
    keep_every_images: int = CheckpointConfig.keep_every_images
    keep_best: int = CheckpointConfig.keep_best
    features: FeatureName | None = None
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        try:
            _ = self.policy
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("checkpoint.")) from error

    @property
    def policy(self) -> RetentionPolicy:
        """What is kept."""
        config = CheckpointConfig(
            keep_last=self.keep_last,
            keep_every_images=self.keep_every_images,
            keep_best=self.keep_best,
        )
        return RetentionPolicy.of(config)


class RetainedCheckpoints(NamedTuple):
    """A run's checkpoints and what is decided about them.

    Attributes:
        place: The run.
        inventory: What there is.
        clearance: What can be deleted, and why the rest stays.
        entries: The rows of the table.
        features: Extractor of the distances; None if nothing was measured and none was asked for.
        notes: What the user should know about the settings.
    """

    place: RunPlace
    inventory: Inventory
    clearance: Clearance
    entries: list[Entry]
    features: str | None
    notes: tuple[str, ...]


def retained_checkpoints(settings: RetentionSettings) -> RetainedCheckpoints:
    """Look at a run and decide what of it stays; nothing is deleted.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails.
    """
    place = open_run(settings.uri, settings.store)
    if place.images is not None:
        raise ConfigError(f"{settings.uri} is one checkpoint; give its run, {place.uri}")
    inventory = place.inventory()
    by_features = measured_scores(place.store, place.run)
    features = settings.features or _most_used(by_features)
    scores = by_features.get(features, {}) if features else {}
    clearance = inventory.clearance(settings.policy, scores=scores)
    listed = entries(inventory, uri=place.catalogue.uri, reasons=clearance.reasons, scores=scores)
    notes = _unmeasured(settings, listed, features)
    return RetainedCheckpoints(place, inventory, clearance, listed, features, notes)


def _most_used(by_features: Mapping[str, Mapping[int, float]]) -> str | None:
    """Return the extractor that most checkpoints were measured with, the first of equals."""
    return max(sorted(by_features), key=lambda features: len(by_features[features]), default=None)


def _unmeasured(
    settings: RetentionSettings, listed: Sequence[Entry], features: str | None
) -> tuple[str, ...]:
    if not settings.keep_best or any(each.frechet is not None for each in listed):
        return ()
    extractor = f" with features={features}" if features else ""
    return (
        f"keep_best={settings.keep_best} keeps nothing: no checkpoint was measured{extractor}; "
        "measure them with python -m trainer.evaluate",
    )
