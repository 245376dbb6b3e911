"""Settings held to the types and domains that their dataclasses declare.

A domain stands once, beside its field: `beta1: Annotated[float, Field(ge=0, lt=1)]`. What users
type is read by it, pages of settings show it, and a configuration made in Python checks itself.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipelines.addresses import may_carry_credentials, quote_address

# No setting means anything when it is infinite, or no number at all.
_FINITE = ConfigDict(allow_inf_nan=False)
_REASONS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number, an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dataclass_type": "must be a group of settings, not a value",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "string_type": "must be a text",
}
_NUMBER = re.compile(r"\s*[+-]?[\d_.]+(e[+-]?\d+)?\s*", re.IGNORECASE)


class SettingError(ValueError):
    """A setting has a value that it cannot have; the message names both."""


class Checked:
    """A configuration dataclass that refuses values outside of its declared types and domains.

    Raises:
        SettingError: A field has such a value.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)  # hashable, whatever mypy thinks of the classes of dataclasses
        for name, adapter in _adapters(kind).items():
            value = getattr(self, name)
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as error:
                raise SettingError(f"{name}={shown(value)} {reason(error.errors())}") from error


@cache
def _adapters(kind: type[Any]) -> dict[str, TypeAdapter[Any]]:
    """Make what checks each field; a field that is a configuration itself has been checked."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        spec.name: TypeAdapter(hints[spec.name], config=_FINITE)
        for spec in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(hints[spec.name])
    }


def shown(value: Any) -> str:
    """Put a value into a message, in short, and without what may be credentials."""
    if isinstance(value, str) and may_carry_credentials(value):
        return quote_address(value)
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "…"


def reason(details: Sequence[Mapping[str, Any]]) -> str:
    """Say why a value does not fit; the text goes on behind `key=value`.

    Args:
        details: Pydantic's errors on this value.
    """
    reasons = dict.fromkeys(_reason(each) for each in details)
    if all(each["type"] in _REASONS for each in details):
        return " and ".join(reasons)
    return f"cannot be used: {'; '.join(f'it {each}' for each in reasons)}"


def _reason(detail: Mapping[str, Any]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return "has too few values"
    if kind not in _REASONS:
        return str(detail["msg"]).replace("Input should", "must")
    text = _REASONS[kind].format(**detail.get("ctx", {}))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "string_type" and is_number:
        return f'{text}; write it in quotes, "{value}"'
    if kind in ("int_type", "float_type") and isinstance(value, str) and _NUMBER.fullmatch(value):
        return f"{text}; write it without quotes"
    return text
