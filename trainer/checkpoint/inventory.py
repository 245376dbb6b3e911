"""What lies under the checkpoints of a run at one moment, and what of it can go. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from trainer.checkpoint import layout
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.retention import RetentionPolicy, reasons_to_keep, remains


@dataclass(frozen=True, kw_only=True)
class Clearance:
    """What to delete, in this order: manifests, content, and what unfinished uploads left.

    Attributes:
        reasons: Why each committed checkpoint stays; it goes if there is no reason.
        manifests: Keys of the manifests of those that go.
        content: Keys of content that no checkpoint uses any more.
        committed: Unfinished uploads of saves at fewer images are dead; None knows of none.
    """

    reasons: Mapping[int, tuple[str, ...]]
    manifests: tuple[str, ...]
    content: tuple[str, ...]
    committed: int | None

    @property
    def expired(self) -> list[int]:
        """Checkpoints that go, oldest first."""
        return [images for images, reasons in self.reasons.items() if not reasons]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The objects of a run's checkpoints, and what they amount to.

    Attributes:
        run: Name of the run.
        sizes: Bytes of every object under the run's checkpoints, by key.
        manifests: Valid checkpoints, by images.
        damaged: Why each other committed checkpoint is not valid, by images.
    """

    run: str
    sizes: Mapping[str, int]
    manifests: Mapping[int, Manifest]
    damaged: Mapping[int, str]

    @cached_property
    def folders(self) -> Mapping[int, Mapping[str, int]]:
        """The objects of each position of the run, committed or not, oldest first."""
        return layout.folders(self.run, self.sizes)

    @property
    def newest_valid(self) -> Manifest | None:
        """The checkpoint that a run resumes from."""
        return self.manifests[max(self.manifests)] if self.manifests else None

    def clearance(
        self, policy: RetentionPolicy, *, scores: Mapping[int, float], saved: Manifest | None = None
    ) -> Clearance:
        """Decide what can go.

        Args:
            policy: Which checkpoints stay.
            scores: Measured distances by images, lower is better.
            saved: The checkpoint just saved; None takes the newest valid one for that which all
                saves at fewer images have come too late for.
        """
        reasons = reasons_to_keep(
            {images: images in self.manifests for images in (*self.manifests, *self.damaged)},
            policy,
            scores=scores,
            saved=None if saved is None else saved.images,
        )
        reference = saved or self.newest_valid
        if reference is None:
            return Clearance(reasons=reasons, manifests=(), content=(), committed=None)
        kept = {images for images, found in reasons.items() if found}
        used = {
            entry.key
            for images in kept & self.manifests.keys()
            for entry in self.manifests[images].objects
        }
        # Of a damaged checkpoint that stays nothing is known for sure, so all of it stays.
        for images in kept & self.damaged.keys():
            used.update(self.folders.get(images, ()))
        return Clearance(
            reasons=reasons,
            manifests=tuple(
                layout.manifest_key(self.run, images) for images in reasons if images not in kept
            ),
            content=tuple(remains(self.sizes, run=self.run, used=used, committed=reference.images)),
            committed=reference.images,
        )
