"""Addresses that may carry credentials, which would reach logs: told, and quoted without them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/*")
_FILES = ("file", "sqlite")
_MARKS = frozenset("@?#")


def may_carry_credentials(address: str) -> bool:
    """Tell whether a URL has what may be a user, a password or a token."""
    scheme, is_url, rest = address.partition("://")
    if not is_url:
        return False
    if scheme not in _FILES:
        rest = rest.lstrip("/")  # which may be slashes too many
        if scheme != "s3":
            return not _MARKS.isdisjoint(rest)
    # An "@" and a "#" are fine in a path or key; a secret comes with a ":" before the first slash.
    in_host = not {"@", ":"}.isdisjoint(rest.partition("/")[0])
    return in_host or (scheme == "s3" and "?" in rest)


def quote_address(address: str) -> str:
    """Quote an address for a message: of one that may carry credentials the scheme alone.

    One that is mistyped, with a slash too few or too many, is judged by what was meant.
    """
    match = _SCHEME.match(address)
    if match and may_carry_credentials(f"{match[1].lower()}://{address[match.end() :]}"):
        return f"'{match[0].strip()}…'"
    return repr(address)


def find_endpoint_fault(url: str) -> str | None:
    """Say what is wrong with the address of an S3 service; None if it is a plain web address."""
    if not _MARKS.isdisjoint(url):
        return (
            "The S3 endpoint contains an '@', a '?' or a '#', which credentials may come with: "
            "leave them out of it and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
            "environment."
        )
    try:
        parts = urlsplit(url)
        is_plain = parts.scheme in ("http", "https") and bool(parts.netloc)
    except ValueError:  # brackets that are no address
        is_plain = False
    if not is_plain:
        return (
            f"The S3 endpoint {quote_address(url)} is not a web address: write e.g. "
            "'http://localhost:9000'."
        )
    return None
