"""Where the objects of a checkpoint lie: pure functions between names and keys.

    <run>/checkpoints/<images>/MANIFEST.json                      the commit
    <run>/checkpoints/<images>/<attempt>/rank-00000.safetensors   content, never overwritten

Each save has a random attempt of its own, so two writers never touch the same content.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from trainer.storage.errors import InvalidKey
from trainer.storage.store import _SEGMENT, check_key

IMAGES_DIGITS = 12
MAX_IMAGES = 10**IMAGES_DIGITS - 1
MAX_RANKS = 10**5
MANIFEST_NAME = "MANIFEST.json"


def checkpoints_prefix(run: str) -> str:
    """Return the prefix of all checkpoints of a run, with its closing slash."""
    return check_key(run) + "/checkpoints/"


def checkpoint_key(run: str, images: int) -> str:
    """Return the folder of the checkpoint taken after `images` images, without closing slash."""
    if not 0 <= images <= MAX_IMAGES:
        raise InvalidKey(f"a checkpoint after {images} images has no key: 0 to {MAX_IMAGES} have.")
    return f"{checkpoints_prefix(run)}{images:0{IMAGES_DIGITS}d}"


def manifest_key(run: str, images: int) -> str:
    """Return the key whose existence commits a checkpoint."""
    return f"{checkpoint_key(run, images)}/{MANIFEST_NAME}"


def attempt_prefix(run: str, images: int, attempt: str) -> str:
    """Return the prefix of the content one attempt to save writes, with its closing slash."""
    return check_key(f"{checkpoint_key(run, images)}/{attempt}") + "/"


def object_key(run: str, images: int, attempt: str, rank: int) -> str:
    """Return the key of one rank's content."""
    return f"{attempt_prefix(run, images, attempt)}rank-{rank:05d}.safetensors"


def images_of(run: str, key: str) -> int | None:
    """Return the images of the checkpoint a key belongs to, or None if it belongs to none."""
    folder, _, rest = key.removeprefix(checkpoints_prefix(run)).partition("/")
    if not rest or not re.fullmatch(rf"[0-9]{{{IMAGES_DIGITS}}}", folder):
        return None
    return int(folder) if key.startswith(checkpoint_key(run, int(folder)) + "/") else None


def folders(run: str, sizes: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """Group keys and what is known of each by the checkpoint they belong to, oldest first."""
    found: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for key, size in sizes.items():
        images = images_of(run, key)
        if images is not None:
            found[images][key] = size
    return {images: found[images] for images in sorted(found)}


def is_content(run: str, key: str) -> bool:
    """Tell whether a key is of content that a save wrote, and not somebody else's file."""
    folder, _, rest = key.removeprefix(checkpoints_prefix(run)).partition("/")
    return (
        key.startswith(checkpoints_prefix(run))
        and re.fullmatch(rf"[0-9]{{{IMAGES_DIGITS}}}", folder) is not None
        and re.fullmatch(rf"{_SEGMENT.pattern}/rank-[0-9]{{5,}}\.safetensors", rest) is not None
    )


def tensor_key(kind: str, name: str, start: int) -> str:
    """Return the name of one slice inside a content object."""
    return f"{kind}/{name}@{start}"
