"""Which checkpoints stay, and why, and what else of a run is dead. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig

NEWEST, LAST, SAVED = "newest valid", "last", "just saved"
DAMAGED = "damaged, to be looked at"


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """Which checkpoints stay.

    Attributes:
        keep_last: Newest valid ones, at least 1.
        keep_every_images: The first valid one at or after each multiple of this; 0 is none.
        keep_best: Valid ones of the lowest measured distance.
    """

    keep_last: int = 3
    keep_every_images: int = 0
    keep_best: int = 0

    @classmethod
    def of(cls, config: CheckpointConfig) -> RetentionPolicy:
        """Return the policy of a run."""
        return cls(
            keep_last=config.keep_last,
            keep_every_images=config.keep_every_images,
            keep_best=config.keep_best,
        )


def reasons_to_keep(
    checkpoints: Mapping[int, bool],
    policy: RetentionPolicy,
    *,
    scores: Mapping[int, float],
    saved: int | None = None,
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
    for images, good in checkpoints.items():
        if not good and (not last or images > last[0]):
            reasons[images].append(DAMAGED)
    return {images: tuple(found) for images, found in reasons.items()}


def superseded(key: str, *, run: str, committed: int) -> bool:
    """Tell whether a key belongs to a save that cannot be committed any more.

    Args:
        key: A key of the store.
        run: Name of the run.
        committed: Images of a checkpoint that was committed. A save before it has come too late;
            one at it, or beyond, may be another writer's that is still under way.
    """
    images = layout.images_of(run, key)
    return images is not None and images < committed


def remains(keys: Collection[str], *, run: str, used: Collection[str], committed: int) -> list[str]:
    """Return the content objects that no checkpoint uses and no save will still commit.

    Args:
        keys: Keys under the run's checkpoints.
        run: Name of the run.
        used: Keys the checkpoints that stay consist of.
        committed: Images of the newest checkpoint that counts: see `superseded`.

    Returns:
        Keys to delete: content that saves wrote, and no file that somebody put beside it.
    """
    return sorted(
        key
        for key in keys
        if superseded(key, run=run, committed=committed)
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
