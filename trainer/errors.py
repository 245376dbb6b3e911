"""Telling a user's mistake, which has a message for them, from a bug, which has a traceback."""

from __future__ import annotations

_PACKAGES = {"trainer", "models", "pipelines", "cluster"}


def is_user_error(error: BaseException) -> bool:
    """Tell whether an error is one of our own subclasses of ValueError.

    torch, numpy and the standard library raise ValueError too, and so do our own assertions about
    shapes; none of these has a message meant for users, or is cured by what they could change.
    """
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, ValueError) and package in _PACKAGES
