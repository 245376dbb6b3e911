"""The settings of a configuration dataclass as people meet them: key, default, meaning, choices."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

MISSING = "???"
"""Default of a setting that must be given."""

_ATTRIBUTE = re.compile(r" {4}(\w+): (.*)")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value of a configuration.

    Attributes:
        key: Where it is, such as "optim.learning_rate".
        wanted: Its type, with its domain if that is part of the type.
        default: Its default; `MISSING` if it must be given.
        meaning: What the docstring of its dataclass says of it.
        place: What kind of place it names, if it names one; see `trainer.config.written_paths`.
    """

    key: str
    wanted: Any
    default: Any
    meaning: str
    place: str | None

    @property
    def is_group(self) -> bool:
        """Whether it holds settings of its own."""
        return dataclasses.is_dataclass(self.wanted)

    @property
    def words(self) -> list[str]:
        """The words that it can be, besides what else it can be, in their order."""
        return [leaf for leaf in leaf_types(self.wanted) if isinstance(leaf, str)]

    @property
    def is_single(self) -> bool:
        """Whether it is one value: no group, list or mapping."""
        return not self.is_group and not _holds_several(self.wanted)

    @property
    def is_text(self) -> bool:
        """Whether it is a text whatever it looks like, so that 123 and ~/a,b=c are texts."""
        leaves = leaf_types(self.wanted)
        return self.is_single and all(leaf is str or isinstance(leaf, str) for leaf in leaves)


def settings_of(kind: type[Any], prefix: str = "", *, defaults: Any = MISSING) -> Iterator[Setting]:
    """Yield the groups and settings of a configuration dataclass, a group before what it holds.

    Args:
        kind: The dataclass.
        prefix: Its key and a dot; "" for a whole configuration.
        defaults: An instance with other defaults than the dataclass's own.
    """
    hashable: Any = kind  # whatever mypy thinks of the classes of dataclasses
    hints, meanings = field_types(hashable), _meanings(hashable)
    for spec in dataclasses.fields(kind):
        own = _default(spec) if defaults is MISSING else getattr(defaults, spec.name)
        setting = Setting(
            key=f"{prefix}{spec.name}",
            wanted=hints[spec.name],
            default=own,
            meaning=meanings.get(spec.name, ""),
            place=spec.metadata.get("place"),
        )
        yield setting
        if setting.is_group:
            yield from settings_of(setting.wanted, f"{setting.key}.", defaults=own)


@cache
def field_types(kind: type[Any]) -> Mapping[str, Any]:
    """Return the type of each field, with its domain if that is part of the type.

    Python reads them anew from their texts each time.
    """
    return typing.get_type_hints(kind, include_extras=True)


def element_type(wanted: Any) -> type[Any] | None:
    """Give the dataclass that a setting is a list of, if it is one."""
    arguments = typing.get_args(wanted)
    is_list = typing.get_origin(wanted) is tuple and dataclasses.is_dataclass(arguments[0])
    return typing.cast(type[Any], arguments[0]) if is_list else None


def leaf_types(wanted: Any) -> list[Any]:
    """Take a type apart: the types of single values, and the values of `Literal`, without None.

    `tuple[int, ...] | Literal["all"] | None` gives int and "all".
    """
    if wanted is None or wanted is type(None) or wanted is Ellipsis:
        return []
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return leaf_types(arguments[0])
    if origin is Literal:
        return list(arguments)
    if origin is not None or isinstance(wanted, types.UnionType):
        return [leaf for argument in arguments for leaf in leaf_types(argument)]
    return [wanted]


def _holds_several(wanted: Any) -> bool:
    origin = typing.get_origin(wanted)
    if origin is Literal:
        return False
    several = isinstance(origin, type) and issubclass(origin, tuple | list | dict)
    return several or any(_holds_several(each) for each in typing.get_args(wanted))


def closest(key: str, known: Sequence[str]) -> str | None:
    """Guess which setting was meant: by its last word, by the initials of that, by its letters."""
    group, _, name = key.rpartition(".")
    near = sorted(known, key=lambda each: not each.startswith(f"{group}."))
    for each in near:
        if each.rpartition(".")[2] == name:
            return each
    for each in near:
        words = each.rpartition(".")[2].split("_")
        if len(words) > 1 and "".join(word[0] for word in words) == name:
            return each
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.4)), None)


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return MISSING if spec.default is dataclasses.MISSING else spec.default


@cache
def _meanings(kind: type[Any]) -> dict[str, str]:
    """Read what the docstrings of a class, and of those that it extends, say of its attributes."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        _, _, rest = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in rest.partition("\n\n")[0].splitlines():
            if match := _ATTRIBUTE.fullmatch(line):
                name, found[name] = match[1], match[2]
            elif name:
                found[name] += f" {line.strip()}"
    return found
