"""One value of a configuration against the type of its setting, and why it does not fit."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trainer.config.settings import leaf_types

_LARGEST = 2**63 - 1
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
    if leaves == [bool] and not isinstance(value, bool):
        raise UnfitValue("must be true or false")
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
