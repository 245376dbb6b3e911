"""One value of a configuration against the type of its setting, and why it does not fit."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trainer.setting import leaf_types

_LARGEST = 2**63 - 1
_FILES = ("file", "sqlite")
# No setting means anything when it is infinite, or no number at all.
_FINITE = ConfigDict(allow_inf_nan=False)
_DOMAINS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "int_parsing_size": f"must lie between -{_LARGEST} and {_LARGEST}",
}


class CredentialsInAddress(ValueError):
    """An address that may carry credentials, which would reach logs; it is not quoted."""


class UnfitValue(ValueError):
    """A value that its setting cannot have; the message goes on behind `key=value`."""


def fitted(wanted: Any, value: Any) -> Any:
    """Return a value as its setting's type has it, such as 1000 for 1e3 where an int is wanted.

    Args:
        wanted: The setting's type, with its domain if that is part of it: `Annotated[int,
            Field(ge=1)]`.
        value: A plain value as YAML gives it.

    Raises:
        UnfitValue: It is of another type, outside the domain, infinite or NaN.
    """
    leaves = leaf_types(wanted)
    found = list(_scalars(value))
    numbers = int in leaves or float in leaves
    if numbers and bool not in leaves and any(isinstance(each, bool) for each in found):
        raise UnfitValue("must be a number, not true or false")
    if any(isinstance(each, int) and abs(each) > _LARGEST for each in found):
        raise UnfitValue(f"must lie between -{_LARGEST} and {_LARGEST}")
    if str in leaves and not numbers and isinstance(value, int | float):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UnfitValue(f'must be a text; write it in quotes, "{value}"')
        value = str(value)
    try:
        return TypeAdapter(wanted, config=_FINITE).validate_python(value)
    except ValidationError as error:
        raise UnfitValue(_reason(error.errors())) from error


def shown(value: Any) -> str:
    """Put a value into a message, in short."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "…"


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


def _reason(details: Sequence[Mapping[str, Any]]) -> str:
    outside = [
        _DOMAINS[each["type"]].format(**each.get("ctx", {}))
        for each in details
        if each["type"] in _DOMAINS
    ]
    if len(outside) == len(details):
        return " and ".join(dict.fromkeys(outside))
    said = {str(each["msg"]).replace("Input should be", "it must be") for each in details}
    return f"cannot be used: {'; '.join(sorted(said))}"


def _scalars(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [each for pair in value.items() for part in pair for each in _scalars(part)]
    if isinstance(value, list | tuple):
        return [each for part in value for each in _scalars(part)]
    return [value]
