"""Finding a run's checkpoints and restoring from them, on any number of ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.checkpoint import content
from trainer.checkpoint.agreement import Agreement
from trainer.checkpoint.errors import CheckpointMismatch, DamagedCheckpoint, InvalidManifest
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.manifest import Manifest
from trainer.host_group import HostGroup
from trainer.state import Fragment
from trainer.storage.store import Store

logger = logging.getLogger(__name__)


class CheckpointReader:
    """The checkpoints of one run, to look at and to restore from.

    All methods but `uri` are collective: every rank calls them, and what fails on one raises on
    all. A single process needs no more than the store and the run.

    Args:
        store: Where they are kept.
        run: Name of the run.
        ranks: How this rank agrees with the others.
        on_read: Called by several threads, after each block that is read for `restore`.

    Attributes:
        index: The checkpoints as this process knows them.
    """

    def __init__(
        self,
        store: Store,
        *,
        run: str,
        ranks: HostGroup | None = None,
        on_read: Callable[[], None] = content.do_nothing,
    ) -> None:
        self._store = store
        self._on_read = on_read
        self._ranks = Agreement(ranks or HostGroup(alone=True))
        self.index = CheckpointIndex(store, run=run)

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
        return self._share_manifest(lambda: self.index.newest_valid(before=before))

    def is_empty(self) -> bool:
        """Tell whether the run has no checkpoint, not even a damaged one."""
        return self._ranks.run_on_rank0(lambda: b"empty" if self.index.is_empty() else b"") != b""

    def manifest(self, images: int) -> Manifest | None:
        """Return the manifest of one checkpoint, or None, with a warning, if it is not whole."""
        return self._share_manifest(lambda: self._examine(images))

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
        held = self._ranks.gather(lambda: self._check_fit(manifest, fragments))
        self._ranks.run_on_rank0(lambda: self._check_all_wanted(manifest, held))
        try:
            self._ranks.run_on_all(
                lambda: content.fill(self._store, manifest, fragments, on_read=self._on_read)
            )
        except DamagedCheckpoint:
            self.index.mark_damaged(manifest)
            raise
        return copy.deepcopy(dict(manifest.train_state))

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self.index.uri(images)

    def _examine(self, images: int) -> Manifest | None:
        try:
            return self.index.examine(images)
        except (InvalidManifest, DamagedCheckpoint) as error:
            logger.warning("checkpoint %s is not valid: %s", self.uri(images), error)
            return None

    def _share_manifest(self, find: Callable[[], Manifest | None]) -> Manifest | None:
        """Find a manifest on the first rank, and return it on every rank."""
        found: list[Manifest] = []

        def encode() -> bytes:
            manifest = find()
            if manifest is None:
                return b""
            found.append(manifest)
            return manifest.to_json()

        heard = self._ranks.run_on_rank0(encode)
        if not heard:
            return None
        return found[0] if found else Manifest.from_json(heard, run=self.index.run)

    def _check_fit(self, manifest: Manifest, fragments: Sequence[Fragment]) -> bytes:
        """Check that a rank's fragments fit, and tell for each parameter whether it is one."""
        content.check_fit(manifest, fragments)
        for fragment in fragments:
            if unread := set(manifest.kinds) - set(fragment.tensors):
                raise CheckpointMismatch(
                    f"The checkpoint {self.uri(manifest.images)} also holds {', '.join(unread)} "
                    f"of {fragment.name}, which the engine has no place for."
                )
        named = content.by_name(fragments)
        return np.packbits([name in named for name in manifest.parameters]).tobytes()

    def _check_all_wanted(self, manifest: Manifest, held: Sequence[bytes]) -> bytes:
        masks = np.frombuffer(b"".join(held), np.uint8).reshape(len(held), -1)
        wanted = np.unpackbits(np.bitwise_or.reduce(masks), count=len(manifest.parameters))
        unknown = [
            name
            for name, is_wanted in zip(manifest.parameters, wanted, strict=True)
            if not is_wanted
        ]
        if unknown:
            raise CheckpointMismatch(
                f"The checkpoint {self.uri(manifest.images)} holds {len(unknown)} parameters that "
                f"the model lacks, such as {min(unknown)}: build the model it was saved from."
            )
        return b""
