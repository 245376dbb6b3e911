"""Which checkpoints of a run exist, which of them are whole, and the clearing away of old ones."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.errors import (
    CheckpointConflict,
    DamagedCheckpoint,
    InvalidManifest,
    NewerManifest,
)
from trainer.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest
from trainer.checkpoint.objects import ADVICE
from trainer.checkpoint.retention import CheckpointListing, DeletionPlan, is_stale
from trainer.storage.errors import MissingObject, VanishedObject
from trainer.storage.store import Store

logger = logging.getLogger(__name__)


class CheckpointIndex:
    """One process's view of the checkpoints of a run.

    Args:
        store: Where they are kept.
        run: Name of the run.
    """

    def __init__(self, store: Store, *, run: str) -> None:
        self._store = store
        self._run = run
        self._prefix = layout.checkpoints_prefix(run)
        self._found_damaged: set[tuple[int, str]] = set()
        # The committed ones that were there at the last look; None before the first.
        self._known: set[int] | None = None
        # For each checkpoint, what was found valid and what its folder then held.
        self._valid: dict[int, tuple[Mapping[str, int], Manifest]] = {}

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._run

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self._store.uri(layout.checkpoint_key(self._run, images))

    def mark_damaged(self, manifest: Manifest) -> None:
        """Remember that reading showed a checkpoint to be damaged."""
        self._found_damaged.add((manifest.images, manifest.attempt))
        self._valid.pop(manifest.images, None)

    def newest_valid(self, *, before: int | None = None) -> Manifest | None:
        """Return the newest valid checkpoint, with a warning for each newer one that is not.

        Args:
            before: Consider only checkpoints of fewer images.

        Raises:
            StoreError: The store fails, which is no reason to take an older checkpoint.
        """
        sizes = self._store.list(self._prefix)
        self._known = self._find_committed(sizes)
        for images in sorted(self._known, reverse=True):
            if before is not None and images >= before:
                continue
            try:
                return self.examine(images, sizes)
            except (InvalidManifest, DamagedCheckpoint) as error:
                logger.warning("passing over checkpoint %s: %s", self.uri(images), error)
        return None

    def is_committed(self, images: int) -> bool:
        """Tell whether there is a manifest at this position, whoever wrote it."""
        key = layout.manifest_key(self._run, images)
        return key in self._store.list(key)

    def is_empty(self) -> bool:
        """Tell whether no checkpoint is committed, not even a damaged one."""
        return not self._find_committed(self._store.list(self._prefix))

    def examine(self, images: int, sizes: Mapping[str, int] | None = None) -> Manifest:
        """Return the manifest of a checkpoint whose objects are all there in the right size.

        Args:
            images: Which checkpoint.
            sizes: The keys of the run's checkpoints and their sizes, if they are known.

        Raises:
            InvalidManifest: The manifest cannot be trusted.
            DamagedCheckpoint: There is no manifest, or an object is missing, has another size, or
                was found damaged when it was read.
        """
        key = layout.manifest_key(self._run, images)
        if sizes is None:
            sizes = self._store.list(layout.checkpoint_key(self._run, images) + "/")
        if sizes.get(key, 0) > MAX_MANIFEST_BYTES:
            raise InvalidManifest(f"{self._store.uri(key)} is too large for a manifest. {ADVICE}")
        try:
            data = self._store.get(key)
        except MissingObject as error:
            raise DamagedCheckpoint(f"{self._store.uri(key)} is missing. {ADVICE}") from error
        manifest = Manifest.from_json(data, run=self._run, images=images)
        for entry in manifest.objects:
            size = sizes.get(entry.key)
            if size != entry.size_bytes:
                state = "is missing" if size is None else f"has {size} bytes"
                raise DamagedCheckpoint(
                    f"{self._store.uri(entry.key)} {state}; {entry.size_bytes} bytes were saved. "
                    f"{ADVICE}"
                )
        if (images, manifest.attempt) in self._found_damaged:
            raise DamagedCheckpoint(
                f"{self.uri(images)} was found damaged when it was read. {ADVICE}"
            )
        return manifest

    def commit(self, manifest: Manifest) -> Manifest:
        """Make a checkpoint exist, if nobody else did, and return the one that now does.

        A damaged one in its place is replaced; a valid one of the same science is kept, since the
        same images of the same run were saved twice.

        Raises:
            InvalidManifest: The manifest holds what is no JSON value.
            VanishedObject: An object of it is not there.
            StoreError: The store fails.
            CheckpointConflict: A process with another configuration saves this run too, or has
                saved it here; or there is a checkpoint in a newer format.
        """
        standing = self._commit(manifest)
        if self._known is not None:
            self._known.add(manifest.images)
        return standing

    def _commit(self, manifest: Manifest) -> Manifest:
        key = layout.manifest_key(self._run, manifest.images)
        data = manifest.to_json()
        sizes = self._store.list(self._prefix)
        self._check_uploaded(manifest, sizes)
        self._check_alone(manifest, sizes)
        if self._store.create(key, data):
            return manifest
        try:
            standing = self.examine(manifest.images)
        except NewerManifest as error:
            raise CheckpointConflict(f"{error} Or choose another run name.") from error
        except (InvalidManifest, DamagedCheckpoint) as error:
            logger.warning("replacing checkpoint %s: %s", self.uri(manifest.images), error)
            self._store.delete(key)
            if self._store.create(key, data):
                return manifest
            standing = self.examine(manifest.images)
        if standing.attempt == manifest.attempt:
            return manifest  # the store had repeated a request whose answer was lost
        if standing.config_fingerprint != manifest.config_fingerprint:
            raise CheckpointConflict(
                f"{self.uri(manifest.images)} exists and was saved with another configuration: "
                "choose another run name for this one."
            )
        logger.warning(
            "checkpoint %s was saved by another process of this run meanwhile; keeping that one. "
            "Two processes train run=%s at once: stop one of them, or give it another run=NAME",
            self.uri(manifest.images),
            self._run,
        )
        return standing

    def listing(self, *, saved: Manifest | None = None) -> CheckpointListing:
        """Look at everything under the run's checkpoints, as far as can be told without reading it.

        Args:
            saved: A checkpoint that was just committed, which needs no look.

        Raises:
            StoreError: The store fails.
        """
        sizes = self._store.list(self._prefix)
        folders = layout.folders(self._run, sizes)
        manifests = {} if saved is None else {saved.images: saved}
        damaged = {}
        for images in sorted(self._find_committed(sizes) - manifests.keys()):
            folder, valid = self._valid.get(images, ({}, None))
            if valid is not None and folder == folders[images]:
                manifests[images] = valid
                continue
            try:
                manifests[images] = self.examine(images, sizes)
                self._valid[images] = folders[images], manifests[images]
            except (InvalidManifest, DamagedCheckpoint) as error:
                damaged[images] = str(error)
        return CheckpointListing(run=self._run, sizes=sizes, manifests=manifests, damaged=damaged)

    def prune(
        self,
        saved: Manifest,
        *,
        policy: CheckpointConfig,
        scores: Mapping[int, float],
        in_use: Collection[int] = (),
    ) -> None:
        """Delete what the policy does not keep, after a save.

        Args:
            saved: The checkpoint just saved.
            policy: What to keep.
            scores: Measured distances of the run's checkpoints by images, lower is better.
            in_use: Checkpoints that somebody reads now.

        Raises:
            StoreError: The store fails; what is left over goes at the next save.
        """
        listing = self.listing(saved=saved)
        self.clear(listing.deletion_plan(policy, scores=scores, saved=saved, in_use=in_use))

    def clear(self, plan: DeletionPlan) -> int:
        """Delete what can go; a manifest goes before its objects.

        Returns:
            Remains of unfinished uploads that were removed besides.

        Raises:
            StoreError: The store fails; what is left over can go at the next time.
        """
        self._store.delete_all(plan.manifests)
        self._store.delete_all(plan.content)
        committed = plan.committed
        if committed is None:
            return 0
        return self._store.abort_unfinished(
            self._prefix, lambda key: is_stale(key, run=self._run, committed=committed)
        )

    def _check_uploaded(self, manifest: Manifest, sizes: Mapping[str, int]) -> None:
        """Refuse to commit what is not there: another process may hold this one for dead."""
        for entry in manifest.objects:
            size = sizes.get(entry.key)
            if size != entry.size_bytes:
                state = "is not there" if size is None else f"has {size} bytes there"
                raise VanishedObject(
                    f"{self._store.uri(entry.key)} was uploaded with {entry.size_bytes} bytes but "
                    f"{state}; another process may have deleted it: see that only one process "
                    f"trains run={self._run}."
                )

    def _check_alone(self, manifest: Manifest, sizes: Mapping[str, int]) -> None:
        """Refuse to save beside a process that trains the run with another configuration."""
        if self._known is None:
            return
        for images in sorted(self._find_committed(sizes) - self._known - {manifest.images}):
            try:
                other = self.examine(images, sizes)
            except (InvalidManifest, DamagedCheckpoint):
                continue
            if other.config_fingerprint != manifest.config_fingerprint:
                raise CheckpointConflict(
                    f"{self.uri(images)} was saved meanwhile by a process that trains "
                    f"run={self._run} with another configuration: stop one of the two, or choose "
                    "another run name for it."
                )
            self._known.add(images)

    def _find_committed(self, sizes: Mapping[str, int]) -> set[int]:
        found = {layout.images_of(self._run, key) for key in sizes}
        return {
            images
            for images in found
            if images is not None and layout.manifest_key(self._run, images) in sizes
        }
