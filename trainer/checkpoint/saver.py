"""Saving and restoring a run: every rank its own slices, all ranks one decision.

A save writes content first and the manifest last, with a conditional PUT: that is the commit. Until
then the checkpoint does not exist, so a reader sees the old one or the new one and never a mix.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint import content, layout
from trainer.checkpoint.agreement import Agreement, Gather, alone
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.errors import (
    CheckpointError,
    CheckpointMismatch,
    DamagedCheckpoint,
    InvalidManifest,
    StoreError,
)
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.save_plan import announce, plan_save
from trainer.checkpoint.store import Store
from trainer.state import Fragment

logger = logging.getLogger(__name__)

GIB = 1024**3
PACKAGES = ("lapflow-trainer", "torch", "safetensors", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run is saved and how much of it is kept.

    Attributes:
        interval_images: Images from one checkpoint to the next; what a failure costs at most. 0 is
            never.
        keep_last: Newest valid checkpoints to keep; with 1 there is nothing to fall back to.
    """

    interval_images: int = 500_000
    keep_last: int = 3

    def __post_init__(self) -> None:
        if self.interval_images < 0:
            raise ValueError(
                f"checkpoint.interval_images={self.interval_images} must be 0 (never) or more"
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last} must be at least 1")


class Checkpoints:
    """The checkpoints of one run, as one of its ranks sees them.

    All methods but `uri` and `is_saved` are collective: every rank calls them, and what fails on
    one raises on all.

    Args:
        store: Where they are kept.
        run: Name of the run.
        config: What to keep.
        rank: This rank.
        world_size: Number of ranks.
        gather: Returns the list of every rank's object, in rank order, on every rank.
    """

    def __init__(
        self,
        store: Store,
        *,
        run: str,
        config: CheckpointConfig,
        rank: int,
        world_size: int,
        gather: Gather,
    ) -> None:
        self._store = store
        self._run = layout.check_key(run)
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._ranks = Agreement(rank=rank, gather=gather)
        self._catalogue = Catalogue(store, run=run)
        self._saved_images: int | None = None

    @classmethod
    def reader(cls, store: Store, *, run: str) -> Checkpoints:
        """Open a run's checkpoints in one process, to look at them or sample from them."""
        return cls(store, run=run, config=CheckpointConfig(), rank=0, world_size=1, gather=alone)

    def save(
        self,
        *,
        images: int,
        fragments: Sequence[Fragment],
        train_state: Mapping[str, Any],
        science: Mapping[str, Any],
        science_hash: str,
    ) -> str:
        """Save the state, whole or not at all, and retire old checkpoints.

        Args:
            images: Images the run has seen.
            fragments: What this rank holds; all ranks together must hold everything. A slice that
                several ranks hold is written by one of them.
            train_state: The run's counters, as JSON values; the first rank's are kept.
            science: The configuration that determines the result, as JSON values.
            science_hash: Its hash, for a quick comparison on resume.

        Returns:
            The checkpoint's address.

        Raises:
            StoreError: The store failed. The checkpoint does not exist, unless the very last
                answer was lost.
            CheckpointMismatch: The ranks' fragments do not make up one whole state.
            CheckpointConflict: Another run's checkpoint stands in the place.
            RankFailed: A rank failed for another reason.
        """
        began = time.monotonic()
        announced = self._ranks.each(
            lambda: announce(
                fragments, images=images, science_hash=science_hash, attempt=uuid.uuid4().hex[:12]
            )
        )
        assert len(announced) == self._world_size
        plan = plan_save(announced)
        key = layout.object_key(self._run, images, plan.attempt, self._rank)
        mine = [each for each in fragments if each.name in plan.writes[self._rank]]
        try:
            entries = self._ranks.each(
                lambda: content.write(self._store, key, mine) if mine else None
            )
        except CheckpointError:
            self._discard(key)
            raise
        objects = tuple(entry for entry in entries if entry is not None)
        self._ranks.first(
            lambda: self._commit(
                Manifest(
                    run=self._run,
                    images=images,
                    attempt=plan.attempt,
                    world_size=self._world_size,
                    science_hash=science_hash,
                    science=science,
                    train_state=train_state,
                    kinds=plan.kinds,
                    parameters=plan.parameters,
                    objects=objects,
                    versions=_versions(),
                )
            )
        )
        self._saved_images = images
        if self._rank == 0:
            logger.info(
                "saved %s (%.2f GiB in %.1f s)",
                self.uri(images),
                sum(entry.size_bytes for entry in objects) / GIB,
                time.monotonic() - began,
            )
        return self.uri(images)

    def newest_valid(self, *, before: int | None = None) -> Manifest | None:
        """Find the newest checkpoint that is whole, as far as can be told without reading it.

        Args:
            before: Consider only checkpoints of fewer images.

        Returns:
            Its manifest, or None if there is none. For each newer one that is damaged the first
            rank logs a warning that names it.

        Raises:
            StoreError: The store failed, which does not mean that there is no checkpoint.
        """
        return self._ranks.first(lambda: self._catalogue.newest_valid(before=before))

    def manifest(self, images: int) -> Manifest | None:
        """Return the manifest of one checkpoint, or None, with a warning, if it is not whole."""
        return self._ranks.first(lambda: self._examined(images))

    def restore(self, manifest: Manifest, fragments: Sequence[Fragment]) -> dict[str, Any]:
        """Fill the live state from a checkpoint of any number of ranks.

        Args:
            manifest: The checkpoint.
            fragments: What this rank holds; filled in place, undefined after an error.

        Returns:
            The train state that was saved.

        Raises:
            DamagedCheckpoint: Content is missing or changed. `newest_valid` then passes this
                checkpoint over, so asking it again gives the one to fall back to.
            CheckpointMismatch: The checkpoint is of another model.
            StoreError: The store failed.
        """
        names = self._ranks.each(lambda: self._fitting(manifest, fragments))
        if unknown := set(manifest.parameters).difference(*names):
            raise CheckpointMismatch(
                f"The checkpoint {self.uri(manifest.images)} holds {len(unknown)} parameters that "
                f"the model lacks, such as {min(unknown)}: build the model it was saved from."
            )
        try:
            self._ranks.each(lambda: content.fill(self._store, manifest, fragments))
        except DamagedCheckpoint:
            self._catalogue.mark_damaged(manifest)
            raise
        self._saved_images = manifest.images
        return copy.deepcopy(dict(manifest.train_state))

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self._catalogue.uri(images)

    def is_saved(self, images: int) -> bool:
        """Tell whether the last save or restore of this process was of this position."""
        return self._saved_images == images

    def _commit(self, manifest: Manifest) -> None:
        standing = self._catalogue.commit(manifest)
        try:
            self._catalogue.retire(standing, keep_last=self._config.keep_last)
        except StoreError as error:
            # The save is done; what could not be deleted goes after the next one.
            logger.warning("old checkpoints of %s are still there: %s", self._run, error)

    def _discard(self, key: str) -> None:
        """Remove this rank's part of a save that was not committed; it may fill a disk."""
        try:
            self._store.delete(key)
        except StoreError as error:
            logger.warning("the remains of a failed save are still there: %s", error)

    def _examined(self, images: int) -> Manifest | None:
        try:
            return self._catalogue.examine(images)
        except (InvalidManifest, DamagedCheckpoint) as error:
            logger.warning("checkpoint %s is not valid: %s", self.uri(images), error)
            return None

    def _fitting(self, manifest: Manifest, fragments: Sequence[Fragment]) -> set[str]:
        content.check_fit(manifest, fragments)
        for fragment in fragments:
            if unread := set(manifest.kinds) - set(fragment.tensors):
                raise CheckpointMismatch(
                    f"The checkpoint {self.uri(manifest.images)} also holds {', '.join(unread)} "
                    f"of {fragment.name}, which the engine has no place for."
                )
        return set(content.by_name(fragments))


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
