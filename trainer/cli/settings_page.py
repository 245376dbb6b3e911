"""The settings of a command for people: in its help, one by one, and beside their values."""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from pipelines.command import REFUSED, Outcome, answer
from trainer.config.renamed import current_key
from trainer.config.settings import MISSING, Setting, closest, element_type, leaf_types, settings_of

_WIDTH = 100
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def settings_page(kind: type[Any]) -> str:
    """Describe all settings of a configuration dataclass: default, choices and meaning."""
    return "\n".join(_entry(setting) for setting in settings_of(kind))


def explanation(kind: type[Any], key: str) -> Outcome:
    """Describe one setting, or all of a group, or say that there is none and guess.

    Args:
        kind: The configuration dataclass.
        key: Such as "loader.decode_threads" or "loader"; an old name stands for the new one.
    """
    settings = list(settings_of(kind))
    key = current_key(key, [each.key for each in settings])
    found = [each for each in settings if each.key == key or each.key.startswith(f"{key}.")]
    if not found:
        meant = closest(key, [each.key for each in settings])
        guess = f"; did you mean {meant}?" if meant else ""
        return Outcome("", exit_code=REFUSED, error=f"there is no setting {key}{guess}")
    values = {
        each.key: {
            "default": None if each.default == MISSING else each.default,
            "required": each.default == MISSING,
            "kind": kind_of(each.wanted),
            "meaning": each.meaning,
        }
        for each in found
        if not each.is_group
    }
    return Outcome("\n".join(map(_entry, found)), {"settings": values})


def commented_yaml(kind: type[Any], values: Mapping[str, Any]) -> str:
    """Render a configuration as YAML with each setting's meaning above it.

    Args:
        kind: The configuration dataclass.
        values: Its values, plain.
    """
    meanings = {setting.key: setting for setting in settings_of(kind)}

    def lines(group: Mapping[str, Any], prefix: str, indent: str) -> Iterator[str]:
        for name, value in group.items():
            setting = meanings[f"{prefix}{name}"]
            yield from _wrap(setting.meaning, f"{indent}# ")
            if setting.is_group:
                yield f"{indent}{name}:"
                yield from lines(value, f"{setting.key}.", f"{indent}  ")
            else:
                text = yaml.safe_dump({name: value}, sort_keys=False).rstrip()
                yield textwrap.indent(text, indent)

    return "\n".join(lines(values, "", ""))


class ExplainAction(argparse.Action):
    """`--explain KEY`: say what a setting means and stop, as `--help` does.

    Args:
        kind: Gives the configuration dataclass, when it is asked for.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, kind: Callable[[], type[Any]]
    ) -> None:
        super().__init__(
            option_strings,
            dest,
            metavar="KEY",
            help="say what a setting, or each of a group, means, and stop",
        )
        self._kind = kind

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        """Say it."""
        _, key, *_ = arguments
        explained = explanation(self._kind(), key)
        answer(explained)
        parser.exit(explained.exit_code)


def _entry(setting: Setting) -> str:
    if setting.is_group:
        return "\n".join(_wrap(setting.meaning, f"  {setting.key}: ", " " * 6))
    default = "…" if setting.default == MISSING else format_value(setting.default)
    must = ", must be given" if setting.default == MISSING else ""
    head = f"  {setting.key}={default}  ({kind_of(setting.wanted)}{must})"
    return "\n".join([head, *_wrap(setting.meaning, " " * 6)])


def format_value(value: Any) -> str:
    """Write a value as YAML does, in one line."""
    text = yaml.safe_dump(
        list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000
    )
    return text.partition("\n")[0]


def kind_of(wanted: Any) -> str:
    """Name what a setting can be."""
    if part := element_type(wanted):
        names = ", ".join(setting.key for setting in settings_of(part))
        return f"list of groups of {names}"
    words = [leaf for leaf in leaf_types(wanted) if isinstance(leaf, str)]
    kinds = [_KINDS.get(leaf, "any") for leaf in leaf_types(wanted) if not isinstance(leaf, str)]
    bounds = " and ".join(_bounds(wanted))
    domain = f", {bounds}" if bounds else ""
    if _is_list(wanted):
        several = dict.fromkeys([*words, *(f"{kind}s" for kind in kinds)])
        one = "one or a " if _may_be_one(wanted) else ""
        return f"{one}list of {' | '.join(several)}{domain}"
    return f"{' | '.join(dict.fromkeys([*words, *kinds]))}{domain}"


def _bounds(wanted: Any) -> Iterator[str]:
    """Yield the bounds of numbers that a type declares, as in `Annotated[int, Field(ge=1)]`."""
    for constraint in getattr(wanted, "__metadata__", ()):
        for each in getattr(constraint, "metadata", ()):
            for name, words in _BOUNDS.items():
                if (bound := getattr(each, name, None)) is not None:
                    yield f"{words} {bound:g}"
    for argument in typing.get_args(wanted):
        yield from _bounds(argument)


def _is_list(wanted: Any) -> bool:
    is_list = typing.get_origin(wanted) is tuple
    return is_list or any(_is_list(each) for each in typing.get_args(wanted))


def _may_be_one(wanted: Any) -> bool:
    """Tell whether what may be a list may be a single value too."""
    parts = () if typing.get_origin(wanted) is tuple else typing.get_args(wanted)
    return any(leaf_types(part) and not _is_list(part) for part in parts)


def _wrap(text: str, first: str, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_on_hyphens=False,
    )
