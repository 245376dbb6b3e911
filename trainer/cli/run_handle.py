"""A run in its store, found by its URI, and which of its checkpoints are kept."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from pydantic import Field

from pipelines.domains import Checked
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.retention import CheckpointListing, DeletionPlan
from trainer.cli.checkpoint_table import Entry, entries
from trainer.config.job import FeatureName
from trainer.config.reading import ConfigError
from trainer.evaluation.reports import read_scores
from trainer.storage.checkpoint_uri import CheckpointUri, parse_checkpoint_uri
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

_MAX_NAMES = 10


@dataclass(frozen=True)
class RunHandle:
    """A run, or one checkpoint of it, in an opened store.

    Attributes:
        address: What the URI names.
        store: The store of all runs.
        index: The run's checkpoints.
    """

    address: CheckpointUri
    store: Store
    index: CheckpointIndex

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.address.run

    @property
    def uri(self) -> str:
        """Address of the run."""
        return self.address.run_uri

    @property
    def images(self) -> int | None:
        """The checkpoint, where the URI named one."""
        return self.address.images

    def listing(self) -> CheckpointListing:
        """Look at everything under the run's checkpoints.

        Raises:
            ConfigError: If there is nothing, saying what is there instead.
            StoreError: If the store fails.
        """
        listing = self.index.listing()
        if not listing.folders:
            raise self._nothing_there()
        return listing

    def list_committed(self, images: int | None) -> CheckpointListing:
        """Look at the committed checkpoints, or at one of them.

        Raises:
            ConfigError: If there is none, or not that one.
            StoreError: If the store fails.
        """
        found = self.listing()
        there = sorted({*found.manifests, *found.damaged})
        if not there:
            raise ConfigError(f"no checkpoint of {self.uri} was finished: it has objects alone")
        if images is None:
            return found
        if images not in there:
            raise ConfigError(
                f"{self.uri} has no checkpoint of {images:,} images; it has those of "
                f"{_join([f'{each:,}' for each in there])}"
            )
        return dataclasses.replace(
            found,
            manifests={k: v for k, v in found.manifests.items() if k == images},
            damaged={k: v for k, v in found.damaged.items() if k == images},
        )

    def _nothing_there(self) -> ConfigError:
        runs = self.address.runs
        keys = [key.split("/") for key in self.store.list("")]
        names = sorted({parts[0] for parts in keys if parts[1:]})
        if self.run not in names:
            close = difflib.get_close_matches(self.run, names, n=1, cutoff=0.4)
            hint = f"; did you mean {runs}/{close[0]}?" if close else ""
            there = f"the runs there are {_join(names)}" if names else "there are no runs"
            return ConfigError(f"there is no run {self.run} in {runs}{hint} ({there})")
        below = sorted(
            {
                parts[1]
                for parts in keys
                if parts[0] == self.run and len(parts) > 3 and parts[2] == "checkpoints"
            }
        )
        if below:
            return ConfigError(
                f"{self.uri} is no run but holds runs ({_join(below)}): give for example "
                f"{self.uri}/{below[0]}"
            )
        return ConfigError(
            f"the run at {self.uri} has no checkpoint yet: one is saved every "
            "checkpoint.interval_images, at the run's end, and when it is stopped"
        )


def open_run(uri: str, config: StoreConfig) -> RunHandle:
    """Open what a URI names; nothing is contacted yet.

    Args:
        uri: A run (`…/runs/NAME`) or a checkpoint (`…/runs/NAME/checkpoints/000000128000`).
        config: How to reach its store.

    Raises:
        CheckpointError: If it is neither, or if the URI or the settings are no store's.
    """
    address = parse_checkpoint_uri(uri)
    store = open_store(address.runs, config)
    return RunHandle(address, store, CheckpointIndex(store, run=address.run))


def _join(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, kw_only=True)
class RetentionSettings(Checked):
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
    keep_last: Annotated[int, Field(ge=1)] = CheckpointConfig.keep_last
    keep_every_images: Annotated[int, Field(ge=0)] = CheckpointConfig.keep_every_images
    keep_best: Annotated[int, Field(ge=0)] = CheckpointConfig.keep_best
    features: FeatureName | None = None
    store: StoreConfig = field(default_factory=StoreConfig)

    @property
    def kept(self) -> dict[str, int]:
        """What is kept, by the names of the settings."""
        names = ("keep_last", "keep_every_images", "keep_best")
        return {name: getattr(self, name) for name in names}

    @property
    def policy(self) -> CheckpointConfig:
        """The same as a run has it."""
        return CheckpointConfig(
            keep_last=self.keep_last,
            keep_every_images=self.keep_every_images,
            keep_best=self.keep_best,
        )


class RetainedCheckpoints(NamedTuple):
    """A run's checkpoints and what is decided about them.

    Attributes:
        handle: The run.
        listing: What there is.
        plan: What can be deleted, and why the rest stays.
        entries: The rows of the table.
        features: Extractor of the distances; None if nothing was measured and none was asked for.
        notes: What the user should know about the settings.
    """

    handle: RunHandle
    listing: CheckpointListing
    plan: DeletionPlan
    entries: list[Entry]
    features: str | None
    notes: tuple[str, ...]


def retained_checkpoints(settings: RetentionSettings) -> RetainedCheckpoints:
    """Look at a run and decide what of it stays; nothing is deleted.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails.
    """
    handle = open_run(settings.uri, settings.store)
    if handle.images is not None:
        raise ConfigError(f"{settings.uri} is one checkpoint; give its run, {handle.uri}")
    listing = handle.listing()
    by_features = read_scores(handle.store, handle.run)
    features = settings.features or _most_used(by_features)
    scores = by_features.get(features, {}) if features else {}
    plan = listing.deletion_plan(settings.policy, scores=scores)
    listed = entries(listing, uri=handle.index.uri, reasons=plan.reasons, scores=scores)
    notes = _note_unmeasured(settings, listed, features)
    return RetainedCheckpoints(handle, listing, plan, listed, features, notes)


def _most_used(by_features: Mapping[str, Mapping[int, float]]) -> str | None:
    """Return the extractor that most checkpoints were measured with, the first of equals."""
    return max(sorted(by_features), key=lambda features: len(by_features[features]), default=None)


def _note_unmeasured(
    settings: RetentionSettings, listed: Sequence[Entry], features: str | None
) -> tuple[str, ...]:
    if not settings.keep_best or any(each.frechet is not None for each in listed):
        return ()
    extractor = f" with features={features}" if features else ""
    return (
        f"keep_best={settings.keep_best} keeps nothing: no checkpoint was measured{extractor}; "
        "measure them with python -m trainer.evaluate",
    )
