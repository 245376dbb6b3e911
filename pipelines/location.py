"""Where a dataset is, as it is written: a folder of this node, or a URL.

A URL is handed to libraries that take it apart each in its own way, and what they take for a query
or a fragment they drop. So what they might read differently is refused here.
"""

import re

from pipelines.errors import DataError

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/*)")
_SCHEMES = {"s3", "gs", "gcs", "oci", "azure", "hf", "sftp", "file", "http", "https"}
_DROPPED = re.compile(r"[#?\x00-\x1f\x7f]")


class LocationError(DataError):
    """A place that is neither a folder nor a URL that every library reads alike."""


def is_url(text: str) -> bool:
    """Tell whether a place is a URL, or a folder of this node.

    Raises:
        LocationError: It is a mistyped URL, or one that libraries read differently.
    """
    match = _SCHEME.match(text)
    scheme, slashes = match.groups() if match else ("", "")
    if not slashes and scheme.lower() not in _SCHEMES:
        return False
    assert match is not None
    rest = text[match.end() :]
    shown = "A place with @ in it" if "@" in text else repr(text)  # a password may be there
    if slashes != ("///" if scheme == "file" else "//") or text[: match.end(1)] != scheme.lower():
        right = f"{scheme.lower()}:{'///' if scheme.lower() == 'file' else '//'}"
        raise LocationError(
            f"{shown} is not written as a URL is. Begin it with {right}, or with ./ if it is a "
            "folder of that name."
        )
    parts = rest.rstrip("/").split("/")
    if _DROPPED.search(rest) or rest != rest.strip() or {"", ".", ".."} & {*parts}:
        raise LocationError(
            f"{shown} cannot be used, because libraries read it differently. Leave out #, ?, "
            "control characters, spaces at the ends, empty parts, . and .."
        )
    return True
