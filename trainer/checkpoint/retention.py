"""Which checkpoints, and which remains of unfinished ones, to delete. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from trainer.checkpoint import layout


def expired(checkpoints: Mapping[int, bool], *, keep_last: int, saved: int) -> list[int]:
    """Return the checkpoints to delete, oldest first.

    Kept are the newest `keep_last` valid ones, the one just saved, and every damaged one that is
    newer than the oldest of these, for somebody to look at.

    Args:
        checkpoints: Whether each committed checkpoint is valid, by images.
        keep_last: Valid checkpoints to keep, at least 1.
        saved: Images of the checkpoint just saved; kept in any case.

    Returns:
        Images of the checkpoints to delete; never the newest valid one.
    """
    assert keep_last >= 1
    valid = sorted((images for images, good in checkpoints.items() if good), reverse=True)
    kept = valid[:keep_last]
    oldest = min(kept, default=min(checkpoints, default=0))
    return sorted(images for images in checkpoints if images < oldest and images != saved)


def remains(keys: Collection[str], *, run: str, used: Collection[str], committed: int) -> list[str]:
    """Return the content objects that no checkpoint uses and no save will still commit.

    Args:
        keys: Keys under the run's checkpoints.
        run: Name of the run.
        used: Keys the checkpoints that stay consist of.
        committed: Images of the checkpoint just saved. A save before it has come too late; one
            at it, or beyond, may be another writer's that is still under way.

    Returns:
        Keys to delete, without manifests.
    """
    late = []
    for key in keys:
        images = layout.images_of(run, key)
        if images is None or images >= committed or key == layout.manifest_key(run, images):
            continue
        if key not in used:
            late.append(key)
    return sorted(late)
