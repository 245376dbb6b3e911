"""Addresses that may carry credentials, which would reach logs."""

from __future__ import annotations

_FILES = ("file", "sqlite")


class CredentialsInAddress(ValueError):
    """An address that may carry credentials, which would reach logs; it is not quoted."""


def may_carry_credentials(address: str) -> bool:
    """Tell whether a URL has what may be a user, a password or a token."""
    scheme, is_url, rest = address.partition("://")
    if not is_url:
        return False
    before_path = rest.partition("/")[0]
    if scheme in _FILES:
        return not {"@", ":"}.isdisjoint(before_path)
    if scheme == "s3":
        # An "@" and a "#" are fine in a key, and a secret comes with a ":" before the first slash.
        return not {"@", ":"}.isdisjoint(before_path) or "?" in rest
    return not {"@", "?", "#"}.isdisjoint(rest)


def check_no_credentials(key: str, address: str) -> None:
    """Refuse a URL that may carry credentials.

    Raises:
        CredentialsInAddress: Naming the setting and not its value.
    """
    if may_carry_credentials(address):
        raise CredentialsInAddress(
            f"{key} must be an address with no credentials, which would reach logs, but its value "
            "has an '@', a '?', a '#' or a ':' that may come with some; give them by the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD) or store.profile"
        )
