"""Plain values read into configuration dataclasses, and written back."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re
import typing
from collections.abc import Mapping
from functools import cache, reduce
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipelines.addresses import may_carry_credentials
from pipelines.domains import reason, shown
from trainer.config.renamed import with_current_names
from trainer.config.settings import Setting, closest, element_type, leaf_types, settings_of

T = TypeVar("T")

_LARGEST = 2**63 - 1
_NUMBERS = re.compile(r"\.\d+(?=\.|$)")
"""Places in a list, within a key."""
_UNKNOWN = "unexpected_keyword_argument"


class ConfigError(ValueError):
    """A setting cannot be used; the message names the key, the value and the fix."""


class CredentialsInAddress(ValueError):
    """An address that may carry credentials, which would reach logs; it is not quoted."""


def defaults(kind: type[Any]) -> dict[str, Any]:
    """Return every key with its default; "???" marks what a configuration must set."""
    result: dict[str, Any] = {}
    for setting in settings_of(kind):
        *groups, name = setting.key.split(".")
        group = reduce(operator.getitem, groups, result)
        group[name] = {} if setting.is_group else _plain(setting.default)
    return result


def from_dict(kind: type[T], values: Mapping[str, Any], *, path: str = "") -> T:
    """Build a configuration dataclass from plain values.

    Args:
        kind: The dataclass.
        values: Plain values, nested like the dataclass; missing keys take their defaults, and those
            of before a renaming are understood.
        path: Key of `values` in the whole configuration, for messages.

    Returns:
        The dataclass.

    Raises:
        ConfigError: For an unknown key, a missing one, or a value that it cannot have.
        CredentialsInAddress: For an address that may carry credentials.
    """
    hashable: Any = kind  # whatever mypy thinks of the classes of dataclasses
    settings = _settings(hashable, path)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.')}={shown(values)} must be a group of settings")
    plain = _check_plain(with_current_names(values, path), path.rstrip("."), settings)
    try:
        # As JSON, in which alone a list may be a tuple while a text is still no number.
        read = _adapter(hashable).validate_json(json.dumps(plain), strict=True, extra="forbid")
    except ValidationError as error:
        raise _refusal(error, plain, path, settings) from error
    return typing.cast(T, read)


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@cache
def _settings(kind: type[Any], path: str) -> Mapping[str, Setting]:
    """Return all settings by their keys; those of a list of groups have no number in them."""
    found: dict[str, Setting] = {}
    for setting in settings_of(kind, path):
        found[setting.key] = setting
        part: Any = element_type(setting.wanted)
        if part is not None:
            found |= _settings(part, f"{setting.key}.")
    return found


def _check_plain(value: Any, key: str, settings: Mapping[str, Setting]) -> Any:
    """Refuse what no setting can be, and make 1e3 an int and 123 a name where these are wanted."""
    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return {
            str(name): _check_plain(v, f"{prefix}{name}", settings) for name, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_check_plain(each, f"{key}.{place}", settings) for place, each in enumerate(value)]
    if isinstance(value, str):
        _check_no_credentials(key, value)  # whatever setting it is, for it may come to be quoted
    if not (value is None or isinstance(value, int | float) or _is_text(value)):
        raise ConfigError(f"{key}={shown(value)} must be a text, a number, true, false or null")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} must be a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{key}={shown(value)} must lie between -{_LARGEST} and {_LARGEST}")
    setting = settings.get(_NUMBERS.sub("", key))
    if setting is None:
        return value
    if isinstance(value, float) and value.is_integer() and int in leaf_types(setting.wanted):
        return int(value)
    if setting.is_text and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _is_text(value: Any) -> bool:
    """Tell whether it is a text, of characters alone: other bytes of a command line are none."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _refusal(
    error: ValidationError, values: Any, path: str, settings: Mapping[str, Setting]
) -> ConfigError:
    """Say which setting cannot be so, and why."""
    details = error.errors(include_url=False)
    first = next((each for each in details if each["type"] == _UNKNOWN), details[0])
    key, value, depth = path.rstrip("."), values, 0
    for part in first["loc"]:
        inner = f"{key}.{part}" if key else str(part)
        if _NUMBERS.sub("", inner) not in settings:
            break
        key, depth = inner, depth + 1
        if first["type"] == "missing" and depth == len(first["loc"]):
            return ConfigError(f"{key} must be given")
        value = value[part]
    if first["type"] == _UNKNOWN:
        group = f"{key}." if key else ""
        beside = _NUMBERS.sub("", group)
        names = [each.removeprefix(beside) for each in settings if each.startswith(beside)]
        known = [f"{group}{name}" for name in names if "." not in name]
        return ConfigError(unknown_key(f"{group}{first['loc'][-1]}", known))
    if first["type"] == "value_error":  # a component's own; most name their field, not themselves
        own = str(first["ctx"]["error"])
        field = f"{key}.{own.partition('=')[0]}"
        is_full = not key or own.startswith(f"{key}.")
        return ConfigError(own if is_full else f"{key}{'.' if field in settings else ': '}{own}")
    same = [each for each in details if each["loc"][:depth] == first["loc"][:depth]]
    return ConfigError(f"{key}={shown(value)} {reason(same)}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that YAML and JSON can hold."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def unknown_key(key: str, known: list[str], *, meant: str | None = None) -> str:
    """Say that a key does not exist and which one was probably meant."""
    meant = meant or closest(key, known)
    hint = f"; did you mean {meant}?" if meant else ""
    return f"there is no setting {key}{hint} (settings here: {', '.join(sorted(known))})"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _check_no_credentials(key: str, address: str) -> None:
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
