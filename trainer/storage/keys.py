"""Keys of objects that are safe on every store."""

from __future__ import annotations

import re

from trainer.storage.errors import InvalidKey

MAX_KEY_LENGTH = 900  # S3 allows 1024 bytes, and the store's own prefix comes on top

# No segment begins with a dot: that rules out "..", and keeps a store's temporary files apart.
_SEGMENT = re.compile(r"[A-Za-z0-9_=+@-][A-Za-z0-9_=+@.-]*")


def check_key(key: str) -> str:
    """Return the key if it is safe on every store.

    Raises:
        InvalidKey: It is empty, absolute, too long, climbs out with "..", has a part that begins
            with a dot, or uses other characters than letters, digits and `_ = + @ . -`.
    """
    if len(key) > MAX_KEY_LENGTH or not all(map(_SEGMENT.fullmatch, key.split("/"))):
        shown = key if len(key) <= 100 else key[:100] + "…"
        raise InvalidKey(
            f"{shown!r} cannot name an object: use up to {MAX_KEY_LENGTH} letters, digits and "
            "_ = + @ . - in parts separated by single slashes, no part beginning with a dot."
        )
    return key


def check_prefix(prefix: str) -> None:
    """Check that safe keys can begin so: with nothing, a key, or a key and a slash.

    Raises:
        InvalidKey: They cannot.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
