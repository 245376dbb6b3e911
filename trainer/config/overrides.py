"""One `key=value` word of a command line, read by what its setting is."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Quote, QuotedString
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.errors import HydraException

from trainer.config.groups import groups, members
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError, unknown_key
from trainer.config.renamed import current_key
from trainer.config.settings import MISSING, Setting, closest, settings_of

_FREE = "engine.deepspeed."
"""Settings of DeepSpeed's own, which it checks itself: +engine.deepspeed.KEY=VALUE."""

_NO_PLAIN_TEXT = re.compile(r"""'.*'|".*"|null""", re.DOTALL | re.IGNORECASE)


_WORKER_RANGE = re.compile(r"cluster\.workers=(?P<least>\d+)\.\.(?P<most>\d+)")
_UNREADABLE = (HydraException, ValueError, RecursionError)
_SHOWN = 200
_MAY_CARRY_CREDENTIALS = re.compile(r":/.*[@?#:]", re.DOTALL)
"""An address, perhaps within a list, and what may come with a password or a token."""


class Override(NamedTuple):
    """A setting, or a group's member, and what was given for it."""

    key: str
    """Dotted, without what Hydra knows in front of it."""
    value: Any
    """The value, plain."""
    for_hydra: str
    """The word in Hydra's syntax."""


def parse_override(word: str, kind: type[Any]) -> Override:
    """Read one word of a command line.

    A value that is a text is taken as it is: 1e3 and ~/a,b=(c) are texts where a name or a place is
    wanted. Any other is in Hydra's syntax.

    Args:
        word: The word, `key=value`.
        kind: Dataclass of the settings; `JobConfig` has groups with members too.

    Raises:
        ConfigError: It is no such word, there is no such setting, or its value cannot be read.
    """
    marked, equals, text = word.partition("=")
    key = marked.lstrip("+~")
    mark = marked.removesuffix(key)
    if "~" in mark:
        raise ConfigError(f"{_cut(marked)}: no setting can be taken away; give it a value, or null")
    if not equals or not key or ":/" in key:
        raise ConfigError(f"{_cut(word)} is not of the form key=value")
    if kind is JobConfig and key in ("exp", *groups()):
        return Override(key, text, word)
    if kind is JobConfig and key.startswith(_FREE):
        return _parse_value(key, text, f"++{key}=")
    setting = _setting(key, kind)
    key = setting.key
    if mark:
        shown = "…" if setting.place else _cut(text)
        raise ConfigError(
            f"{marked}={shown}: this setting exists, so write it without {mark}: {key}={shown}"
        )
    if text.strip("\"' ") == MISSING:
        known = setting.is_single and setting.default not in (MISSING, None)
        example = f", as in {key}={setting.default}" if known else ""
        raise ConfigError(
            f"{key}={MISSING} marks a value that is still to be given; type it{example}"
        )
    plain = _NO_PLAIN_TEXT.fullmatch(text) is None
    if setting.is_text and plain:
        return Override(key, text, _quote(key, text))
    try:
        return _parse_value(key, text, f"{key}=")
    except ConfigError:
        # What is no list, mapping or group has its reason told by the type of the setting.
        if setting.is_single and not _is_sweep(word):
            return Override(key, text, _quote(key, text))
        raise


def split_range(word: str) -> list[str]:
    """Take `cluster.workers=4..16` apart, which gives the fewest workers and all of them."""
    found = _WORKER_RANGE.fullmatch(word)
    if found is None:
        return [word]
    return [f"cluster.min_workers={found['least']}", f"cluster.workers={found['most']}"]


MAX_POINTS = 1000
"""More runs no sweep has."""

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "\"'"


def swept_words(word: str) -> list[str]:
    """Return the words that one of a sweep stands for, in their order; itself if it is only one.

    Several values are separated by commas outside of quotes and brackets, or told by Hydra's
    functions `range(…)` and, of a group's members, `glob(…)`.

    Args:
        word: The word, `key=value,…`.

    Raises:
        ConfigError: They are none, too many, or not countable.
    """
    marked, equals, text = word.partition("=")
    if len(values := _split(text)) == 1:
        try:
            parsed = _read(f"key={text}")
        except _UNREADABLE:
            return [word]  # a text, or wrong, which is told when it is read
        values = _told_by_function(marked.lstrip("+"), text, parsed)
    if len(values) > MAX_POINTS or not values:
        count = "none" if not values else f"more than {MAX_POINTS:,}"
        raise ConfigError(f"{_cut(word)} gives {count} of the values that a sweep could take")
    return [f"{marked}{equals}{value}" for value in values]


def _split(text: str) -> list[str]:
    """Split a text at commas outside of quotes and brackets."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        depth += (letter in _OPENING) - (letter in _CLOSING) if not quote else 0
        if letter == "," and not (quote or depth):
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts] if len(parts) > 1 else [text]


def _told_by_function(key: str, text: str, parsed: HydraOverride) -> list[str]:
    """Return the values that a function of Hydra's gives; the text itself if it calls none.

    Raises:
        ConfigError: It gives values that cannot be counted, or chooses among those of no group.
    """
    glob: Any = parsed.value()
    if isinstance(glob, Glob):
        if key not in ("exp", *groups()):
            raise ConfigError(f"{key}={_cut(text)}: only members of groups are found by glob(…)")
        return list(glob.filter(members(key)))
    if not parsed.is_sweep_override():
        return [text]
    if parsed.is_interval_sweep():
        raise ConfigError(
            f"{key}={_cut(text)} gives values that cannot be counted; list them, or use range(…)"
        )
    return list(islice(parsed.sweep_string_iterator(), MAX_POINTS + 1))


def _setting(key: str, kind: type[Any]) -> Setting:
    settings = {setting.key: setting for setting in settings_of(kind)}
    key = current_key(key, settings)
    if key in settings:
        return settings[key]
    leaves = [name for name, setting in settings.items() if not setting.is_group]
    group = key.split(".", maxsplit=1)[0]
    siblings = [name for name in leaves if name.startswith(f"{group}.")]
    top = sorted({name.split(".")[0] for name in settings})
    raise ConfigError(unknown_key(key, siblings or top, meant=closest(key, leaves)))


def _parse_value(key: str, text: str, prefix: str) -> Override:
    shown = _cut(text)
    try:
        parsed = _read(f"{prefix}{text}")
    except _UNREADABLE as error:
        raise ConfigError(
            f"{key}={shown} cannot be read: in a list or mapping put texts in quotes, for "
            "~ # = ( ) and others mean something there, and the whole word in quotes of the other "
            f'kind for the shell, as in \'{key}=["~/a", "b,c"]\''
        ) from error
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{key}={shown} gives several values, and a command takes one; run it once for each. "
            f"A launch with --multirun makes a run of each: python -m trainer.launch -m … "
            f"{key}={shown}"
        )
    return Override(key, parsed.value(), f"{prefix}{text}")


def _cut(text: str) -> str:
    """Shorten what was typed, to quote it; of addresses with what may be credentials to nothing."""
    if _MAY_CARRY_CREDENTIALS.search(text):
        return "…"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _is_sweep(word: str) -> bool:
    try:
        return _read(word).is_sweep_override()
    except _UNREADABLE:
        return False


def _read(word: str) -> HydraOverride:
    return OverridesParser.create().parse_override(word)


def _quote(key: str, text: str) -> str:
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"
