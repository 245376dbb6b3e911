"""Which checkpoints of a run exist, which of them are whole, and the clearing away of old ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from trainer.checkpoint import layout
from trainer.checkpoint.errors import (
    CheckpointConflict,
    DamagedCheckpoint,
    InvalidManifest,
    MissingObject,
    NewerManifest,
)
from trainer.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest
from trainer.checkpoint.retention import expired, remains
from trainer.checkpoint.store import Store

logger = logging.getLogger(__name__)


class Catalogue:
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

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self._store.uri(layout.checkpoint_key(self._run, images))

    def mark_damaged(self, manifest: Manifest) -> None:
        """Remember that reading showed a checkpoint to be damaged."""
        self._found_damaged.add((manifest.images, manifest.attempt))

    def newest_valid(self, *, before: int | None = None) -> Manifest | None:
        """Return the newest valid checkpoint, with a warning for each newer one that is not.

        Args:
            before: Consider only checkpoints of fewer images.

        Raises:
            StoreError: The store fails, which is no reason to take an older checkpoint.
        """
        sizes = self._store.list(self._prefix)
        for images in sorted(self._committed(sizes), reverse=True):
            if before is not None and images >= before:
                continue
            try:
                return self.examine(images, sizes)
            except (InvalidManifest, DamagedCheckpoint) as error:
                logger.warning("passing over checkpoint %s: %s", self.uri(images), error)
        return None

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
            raise InvalidManifest(f"{self._store.uri(key)} is too large for a manifest.")
        try:
            data = self._store.get(key)
        except MissingObject as error:
            raise DamagedCheckpoint(f"{self._store.uri(key)} is missing.") from error
        manifest = Manifest.from_json(data, run=self._run, images=images)
        for entry in manifest.objects:
            size = sizes.get(entry.key)
            if size != entry.size_bytes:
                state = "is missing" if size is None else f"has {size} bytes"
                raise DamagedCheckpoint(
                    f"{self._store.uri(entry.key)} {state}; {entry.size_bytes} bytes were saved."
                )
        if (images, manifest.attempt) in self._found_damaged:
            raise DamagedCheckpoint(f"{self.uri(images)} was found damaged when it was read.")
        return manifest

    def commit(self, manifest: Manifest) -> Manifest:
        """Make a checkpoint exist, if nobody else did, and return the one that now does.

        A damaged one in its place is replaced; a valid one of the same science is kept, since the
        same images of the same run were saved twice.

        Raises:
            InvalidManifest: The manifest holds what is no JSON value.
            CheckpointConflict: Another run's checkpoint is there, or one in a newer format.
        """
        key = layout.manifest_key(self._run, manifest.images)
        data = manifest.to_json()
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
        if standing.science_hash != manifest.science_hash:
            raise CheckpointConflict(
                f"{self.uri(manifest.images)} exists and was saved with another configuration: "
                "choose another run name for this one."
            )
        logger.warning(
            "checkpoint %s was saved by another process of this run meanwhile; keeping that one",
            self.uri(manifest.images),
        )
        return standing

    def retire(self, saved: Manifest, *, keep_last: int) -> None:
        """Delete what `retention` says, after a save; a manifest goes before its objects.

        Args:
            saved: The checkpoint just saved.
            keep_last: Valid checkpoints to keep.

        Raises:
            StoreError: The store fails; what is left over goes at the next save.
        """
        sizes = self._store.list(self._prefix)
        committed = self._committed(sizes) | {saved.images}
        manifests = {saved.images: saved}
        for images in committed - {saved.images}:
            try:
                manifests[images] = self.examine(images, sizes)
            except (InvalidManifest, DamagedCheckpoint) as error:
                logger.debug("not counting checkpoint %s: %s", self.uri(images), error)
        old = expired(
            {images: images in manifests for images in committed},
            keep_last=keep_last,
            saved=saved.images,
        )
        for images in old:
            self._store.delete(layout.manifest_key(self._run, images))
        kept = committed.difference(old)
        used = {
            entry.key for images in kept & manifests.keys() for entry in manifests[images].objects
        }
        # Of a damaged checkpoint that stays nothing is known for sure, so all of it stays.
        damaged = kept - manifests.keys()
        used |= {key for key in sizes if layout.images_of(self._run, key) in damaged}
        for key in remains(sizes, run=self._run, used=used, committed=saved.images):
            self._store.delete(key)

    def _committed(self, sizes: Mapping[str, int]) -> set[int]:
        found = {layout.images_of(self._run, key) for key in sizes}
        return {
            images
            for images in found
            if images is not None and layout.manifest_key(self._run, images) in sizes
        }
