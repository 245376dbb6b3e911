"""Settings that name places: made absolute once, in the process that a user started.

Workers have other working directories, perhaps other homes, so a relative path or a ~ would mean
another place to each of them. A field of a configuration says with `metadata={"place": KIND}` what
it names: a "path" of this machine, a "uri" (a path or a URL), a "run" (such a place inside of
another), a "hub" name (or a path or URL), or a "url" alone.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from pipelines.addresses import may_carry_credentials, quote_address
from trainer.config.reading import ConfigError
from trainer.config.settings import field_types, leaf_types

T = TypeVar("T")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(?!//).*", re.IGNORECASE)
_SQLITE = "sqlite:///"


def resolve_places(config: T, prefix: str = "") -> T:
    """Make the places that a configuration names absolute, and hold its names to a line.

    Args:
        config: A configuration dataclass.
        prefix: Its key and a dot, for messages.

    Raises:
        ConfigError: A place is empty or mistyped, or another text is not one line.
    """
    changed: dict[str, Any] = {}
    kind: Any = type(config)  # hashable, whatever mypy thinks of the classes of dataclasses
    hints = field_types(kind)
    for spec in dataclasses.fields(typing.cast(Any, config)):
        key, value = f"{prefix}{spec.name}", getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            changed[spec.name] = resolve_places(value, f"{key}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changed[spec.name] = tuple(
                resolve_places(each, f"{key}.{number}.") for number, each in enumerate(value)
            )
        elif "place" in spec.metadata and isinstance(value, tuple):
            changed[spec.name] = tuple(
                _absolute(f"{key}.{number}", each, spec.metadata["place"])
                for number, each in enumerate(value)
            )
        elif "place" in spec.metadata and value not in (None, *leaf_types(hints[spec.name])):
            changed[spec.name] = _absolute(key, value, spec.metadata["place"])
        elif isinstance(value, str) and not ("place" in spec.metadata or _is_line(value)):
            raise ConfigError(f"{key}={value!r} must be one line of text, and not empty")
    return typing.cast(T, dataclasses.replace(typing.cast(Any, config), **changed))


def _is_line(text: str) -> bool:
    return bool(text.strip()) and text.isprintable()


def _absolute(key: str, text: str, kind: str) -> str:
    if not text.strip():
        raise ConfigError(f"{key} is empty; give a place, or leave it out")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ConfigError(
            f"{key} has a control character, such as a line's end or NUL; leave it out"
        )
    scheme, is_url, _ = text.partition("://")
    if mistyped := _SCHEME.fullmatch(text):
        raise ConfigError(
            f"{key}={quote_address(text)} lacks a slash; begin it with {mistyped[1].lower()}://"
        )
    if not is_url and may_carry_credentials(text):
        raise ConfigError(
            f"{key}={quote_address(text)} may carry credentials, which would reach logs; leave "
            "them out, or begin it with ./ if a path has that name"
        )
    if kind == "path" and is_url:
        raise ConfigError(f"{key}={text} must be a path of this machine, without {scheme}://")
    if text.startswith(_SQLITE) and len(text) > len(_SQLITE):
        return f"{_SQLITE}{_local(key, text.removeprefix(_SQLITE))}"
    is_hub_name = kind == "hub" and _HUB_NAME.fullmatch(text) and not Path(text).is_dir()
    is_incomplete = kind == "run" and "/" not in text
    if is_url or kind == "url" or is_hub_name or is_incomplete:
        return text
    return _local(key, text)


def _local(key: str, path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{key}={path}: nobody here is called {expanded.partition('/')[0][1:]}; for a folder "
            f"of that name write ./{path}"
        )
    return os.path.abspath(expanded)
