"""Which checkpoints of a run are kept, and why: shown, or carried out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from trainer.care.run_place import RunPlace, open_run
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.inventory import Clearance, Inventory
from trainer.checkpoint.listing import STATES, Entry, entries, format_bytes, table
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.store import StoreConfig
from trainer.command import Outcome
from trainer.evaluate.features import FeatureName
from trainer.evaluate.scores import measured_scores
from trainer.schema import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, and what of it is kept.

    Attributes:
        uri: URI of the run.
        keep_last: Newest valid checkpoints to keep.
        keep_every_images: Keep the first one at or after each multiple of this; 0 keeps none.
        keep_best: Checkpoints of the lowest Fréchet distance to keep.
        features: Extractor of the distances; None takes the one most were measured with.
        store: How to reach the store.
    """

    uri: str
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


@dataclass(frozen=True, kw_only=True)
class ListConfig(RunConfig):
    """What to list.

    Attributes:
        json: Print plain values for machines.
    """

    json: bool = False


@dataclass(frozen=True, kw_only=True)
class PruneConfig(RunConfig):
    """What to keep, and whether to delete the rest.

    Attributes:
        yes: Delete; otherwise only show.
    """

    yes: bool = False


class _Shown(NamedTuple):
    """A run's checkpoints and what is decided about them."""

    place: RunPlace
    inventory: Inventory
    clearance: Clearance
    entries: list[Entry]
    features: str | None
    """Extractor of the distances; None if nothing was measured and none was asked for."""


def list_checkpoints(config: ListConfig) -> Outcome:
    """List the checkpoints of a run.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails.
    """
    shown = _shown(config)
    newest = shown.inventory.newest_valid
    resume_from = None if newest is None else shown.place.catalogue.uri(newest.images)
    total = sum(shown.inventory.sizes.values())
    if config.json:
        values = {
            "run": shown.place.uri,
            "resume_from": resume_from,
            "size_bytes": total,
            "features": shown.features,
            "policy": asdict(config.policy),
            "checkpoints": [each.to_dict() for each in shown.entries],
        }
        return Outcome(json.dumps(values, indent=2))
    lines = [
        table(shown.entries, features=shown.features),
        "",
        f"{_counts(shown.entries)}, {format_bytes(total)} in all",
        f"resume from {resume_from}" if resume_from else "there is nothing to resume from",
        *_unmeasured(config, shown),
    ]
    return Outcome("\n".join(lines))


def prune_checkpoints(config: PruneConfig) -> Outcome:
    """Show what can be deleted of a run, or delete it.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails; what is left over can go at the next time.
    """
    shown = _shown(config)
    clearance, sizes = shown.clearance, shown.inventory.sizes
    shown_table = table(
        shown.entries, features=shown.features, gone="deleted" if config.yes else "to be deleted"
    )
    going = (*clearance.manifests, *clearance.content)
    freed = f"{format_bytes(sum(sizes[key] for key in going))} of "
    freed += format_bytes(sum(sizes.values()))
    what = _counted(len(clearance.expired), "checkpoint")
    if left := _left_behind(shown.inventory, clearance):
        what += f" and {_counted(left, 'object')} that no checkpoint uses"
    policy = " ".join(f"{key}={value}" for key, value in asdict(config.policy).items())
    lines = [shown_table, "", f"kept by {policy}", *_unmeasured(config, shown)]
    if config.yes:
        swept = shown.place.catalogue.clear(clearance)
        uploads = f", and {_counted(swept, 'unfinished upload')}" if swept else ""
        lines.append(f"deleted {what}{uploads}: {freed} freed")
    elif going:
        lines.append(f"would delete {what}: frees {freed}")
        lines.append("nothing was deleted; add yes=true to delete it")
    else:
        lines.append("there is nothing to delete")
    return Outcome("\n".join(lines))


def _shown(config: RunConfig) -> _Shown:
    place = open_run(config.uri, config.store)
    if place.images is not None:
        raise ConfigError(f"{config.uri} is one checkpoint; give its run, {place.uri}")
    inventory = place.inventory()
    by_features = measured_scores(place.store, place.run)
    features = config.features or _most_used(by_features)
    scores = by_features.get(features, {}) if features else {}
    clearance = inventory.clearance(config.policy, scores=scores)
    listed = entries(inventory, uri=place.catalogue.uri, reasons=clearance.reasons, scores=scores)
    return _Shown(place, inventory, clearance, listed, features)


def _most_used(by_features: Mapping[str, Mapping[int, float]]) -> str | None:
    """Return the extractor that most checkpoints were measured with, the first of equals."""
    return max(sorted(by_features), key=lambda features: len(by_features[features]), default=None)


def _left_behind(inventory: Inventory, clearance: Clearance) -> int:
    """Count the objects to delete that are no part of a checkpoint that expires."""
    own = {
        entry.key
        for images in clearance.expired
        if images in inventory.manifests
        for entry in inventory.manifests[images].objects
    }
    return len(set(clearance.content) - own)


def _counts(listed: Sequence[Entry]) -> str:
    found = Counter(each.state for each in listed)
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])


def _unmeasured(config: RunConfig, shown: _Shown) -> list[str]:
    if not config.keep_best or any(each.frechet is not None for each in shown.entries):
        return []
    extractor = f" with features={shown.features}" if shown.features else ""
    return [
        f"keep_best={config.keep_best} keeps nothing: no checkpoint was measured{extractor}; "
        "measure them with python -m trainer.evaluate"
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
