"""Proxies of the environment: easily forgotten, and named where a server seems not to answer."""

from __future__ import annotations

import os
import urllib.request
from urllib.parse import urlsplit

_AWS = "https://s3.amazonaws.com"


def proxy_hint(url: str | None) -> str:
    """Say that requests for an address go through a proxy, and how they would not.

    Args:
        url: The address; None is AWS, or what S3_ENDPOINT_URL names.

    Returns:
        A sentence with a space before it; empty if no proxy is used. It quotes no address of a
        proxy, which may carry a password.
    """
    address = urlsplit(url or os.environ.get("S3_ENDPOINT_URL") or _AWS)
    names = [f"{address.scheme}_proxy", f"{address.scheme}_proxy".upper()]
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None or not address.hostname or urllib.request.proxy_bypass(address.netloc):
        return ""
    host = address.hostname
    return (
        f" {name} is set, so that requests for {host} go through a proxy: if it is to be reached "
        f"directly, add {host} to NO_PROXY."
    )
