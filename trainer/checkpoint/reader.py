"""Finding a run's checkpoints and restoring from them, on any number of ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from trainer.checkpoint import content
from trainer.checkpoint.agreement import Agreement, Gather, alone
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.errors import CheckpointMismatch, DamagedCheckpoint, InvalidManifest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import Store
from trainer.state import Fragment

logger = logging.getLogger(__name__)


class CheckpointReader:
    """The checkpoints of one run, to look at and to restore from.

    All methods but `uri` are collective: every rank calls them, and what fails on one raises on
    all. A single process needs no more than the store and the run.

    Args:
        store: Where they are kept.
        run: Name of the run.
        rank: This rank.
        gather: Returns the list of every rank's object, in rank order, on every rank.

    Attributes:
        catalogue: The checkpoints as this process knows them.
    """

    def __init__(self, store: Store, *, run: str, rank: int = 0, gather: Gather = alone) -> None:
        self._store = store
        self._ranks = Agreement(rank=rank, gather=gather)
        self.catalogue = Catalogue(store, run=run)

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
        return self._ranks.first(lambda: self.catalogue.newest_valid(before=before))

    def is_empty(self) -> bool:
        """Tell whether the run has no checkpoint, not even a damaged one."""
        return self._ranks.first(self.catalogue.is_empty)

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
            self.catalogue.mark_damaged(manifest)
            raise
        return copy.deepcopy(dict(manifest.train_state))

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self.catalogue.uri(images)

    def _examined(self, images: int) -> Manifest | None:
        try:
            return self.catalogue.examine(images)
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
