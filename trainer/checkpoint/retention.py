"""What lies under the checkpoints of a run at one moment, what of it stays, and why. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.manifest import Manifest

NEWEST, LAST, SAVED, IN_USE = "newest valid", "last", "just saved", "being measured"
DAMAGED = "damaged, to be looked at"


def reasons_to_keep(
    checkpoints: Mapping[int, bool],
    policy: CheckpointConfig,
    *,
    scores: Mapping[int, float],
    saved: int | None = None,
    in_use: Collection[int] = (),
) -> dict[int, tuple[str, ...]]:
    """Tell of each checkpoint why it stays.

    A damaged one stays, for somebody to look at, while it is newer than the oldest of the last
    valid ones. One that nobody has measured is not among the best, and expires like any other.

    Args:
        checkpoints: Whether each committed checkpoint is valid, by images.
        policy: What to keep.
        scores: Measured distances, lower is better; what is not finite does not count, and of
            equal ones the newer is better.
        saved: The checkpoint just saved, which stays in any case.
        in_use: Those that somebody reads now; they stay until they were read.

    Returns:
        Reasons such as "last" or "best (12.31)", oldest checkpoint first. Without a reason a
        checkpoint expires, and the newest valid one always has one.
    """
    assert policy.keep_last >= 1
    reasons: dict[int, list[str]] = {images: [] for images in sorted(checkpoints)}
    valid = [images for images in reasons if checkpoints[images]]
    last = valid[-policy.keep_last :]
    for images in last:
        reasons[images].append(NEWEST if images == valid[-1] else LAST)
    if policy.keep_every_images:
        for images in _firsts(valid, policy.keep_every_images):
            reasons[images].append(f"every {policy.keep_every_images:,}")
    measured = [images for images in valid if math.isfinite(scores.get(images, math.nan))]
    best = sorted(measured, key=lambda images: (scores[images], -images))
    for images in best[: policy.keep_best]:
        reasons[images].append(f"best ({scores[images]:.4g})")
    if saved in reasons:
        reasons[saved].append(SAVED)
    for images in reasons.keys() & set(in_use):
        reasons[images].append(IN_USE)
    for images, good in checkpoints.items():
        if not good and (not last or images > last[0]):
            reasons[images].append(DAMAGED)
    return {images: tuple(found) for images, found in reasons.items()}


def is_stale(key: str, *, run: str, committed: int) -> bool:
    """Tell whether a key belongs to a save that cannot be committed any more.

    Args:
        key: A key of the store.
        run: Name of the run.
        committed: Images of a checkpoint that was committed. A save before it has come too late;
            one at it, or beyond, may be another writer's that is still under way.
    """
    images = layout.images_of(run, key)
    return images is not None and images < committed


def orphans(keys: Collection[str], *, run: str, used: Collection[str], committed: int) -> list[str]:
    """Return the content objects that no checkpoint uses and no save will still commit.

    Args:
        keys: Keys under the run's checkpoints.
        run: Name of the run.
        used: Keys the checkpoints that stay consist of.
        committed: Images of the newest checkpoint that counts: see `is_stale`.

    Returns:
        Keys to delete: content that saves wrote, and no file that somebody put beside it.
    """
    return sorted(
        key
        for key in keys
        if is_stale(key, run=run, committed=committed)
        and layout.is_content(run, key)
        and key not in used
    )


def _firsts(valid: Collection[int], every: int) -> list[int]:
    """Return the first of `valid`, ascending, at or after each multiple of `every`."""
    reached, firsts = 0, []
    for images in valid:
        if images // every > reached:
            reached = images // every
            firsts.append(images)
    return firsts


@dataclass(frozen=True, kw_only=True)
class DeletionPlan:
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
class CheckpointListing:
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

    def deletion_plan(
        self,
        policy: CheckpointConfig,
        *,
        scores: Mapping[int, float],
        saved: Manifest | None = None,
        in_use: Collection[int] = (),
    ) -> DeletionPlan:
        """Decide what can go.

        Args:
            policy: Which checkpoints stay.
            scores: Measured distances by images, lower is better.
            saved: The checkpoint just saved; None takes the newest valid one for that which all
                saves at fewer images have come too late for.
            in_use: Checkpoints that somebody reads now.
        """
        reasons = reasons_to_keep(
            {images: images in self.manifests for images in (*self.manifests, *self.damaged)},
            policy,
            scores=scores,
            saved=None if saved is None else saved.images,
            in_use=in_use,
        )
        reference = saved or self.newest_valid
        if reference is None:
            return DeletionPlan(reasons=reasons, manifests=(), content=(), committed=None)
        kept = {images for images, found in reasons.items() if found}
        used = {
            entry.key
            for images in kept & self.manifests.keys()
            for entry in self.manifests[images].objects
        }
        # Of a damaged checkpoint that stays nothing is known for sure, so all of it stays.
        for images in kept & self.damaged.keys():
            used.update(self.folders.get(images, ()))
        return DeletionPlan(
            reasons=reasons,
            manifests=tuple(
                layout.manifest_key(self.run, images) for images in reasons if images not in kept
            ),
            content=tuple(orphans(self.sizes, run=self.run, used=used, committed=reference.images)),
            committed=reference.images,
        )
