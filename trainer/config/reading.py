"""Plain values read into configuration dataclasses, and written back."""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Mapping
from functools import reduce
from typing import Any, TypeVar

from trainer.config.renamed import with_current_names
from trainer.config.settings import closest, listed, settings_of
from trainer.config.values import UnfitValue, fitted, shown
from trainer.storage.credentials import check_no_credentials

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting cannot be used; the message names the key, the value and the fix."""


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
    values = with_current_names(values, path)
    types = typing.get_type_hints(kind, include_extras=True)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ConfigError(unknown_key(f"{path}{unknown[0]}", [f"{path}{name}" for name in types]))
    places = {
        spec.name for spec in dataclasses.fields(typing.cast(Any, kind)) if "place" in spec.metadata
    }
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key, wanted = f"{path}{name}", types[name]
        if isinstance(value, str) and name in places:
            check_no_credentials(key, value)
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}={shown(value)} must be a group of settings, not a value")
            arguments[name] = from_dict(typing.cast(type[Any], wanted), value, path=f"{key}.")
            continue
        if (part := listed(wanted)) is not None:
            if not isinstance(value, list | tuple) or not all(
                isinstance(v, Mapping) for v in value
            ):
                raise ConfigError(f"{key}={shown(value)} must be a list of groups of settings")
            arguments[name] = tuple(
                from_dict(part, entry, path=f"{key}.{number}.")
                for number, entry in enumerate(value)
            )
            continue
        try:
            arguments[name] = fitted(wanted, value)
        except UnfitValue as error:
            raise ConfigError(f"{key}={shown(value)} {error}") from error
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path or 'the configuration '}: {error}") from error
    except ValueError as error:
        # A component names its own field; the user needs to know whose.
        raise ConfigError(f"{path.rstrip('.')}: {error}" if path else str(error)) from error


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
