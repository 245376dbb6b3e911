"""Hydra: YAML files and command-line overrides composed into one configuration.

The only place that knows Hydra. Nothing in a configuration is ever instantiated by name: Hydra
gives plain values, and `trainer.config.job` turns them into dataclasses.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipelines.documents import DocumentError, read_yaml_text
from pipelines.domains import shown
from trainer.config.groups import CONFIG_FOLDER, check_members, experiment, groups, members
from trainer.config.job import JobConfig
from trainer.config.overrides import Override, parse_override, split_range
from trainer.config.reading import ConfigError, defaults, from_dict
from trainer.config.renamed import RENAMED, current_key
from trainer.config.settings import MISSING
from trainer.config.written_paths import resolve_places

C = TypeVar("C")

# The value of another setting; what could read the environment is none.
_INTERPOLATION = re.compile(r"\$\{[\w.]+\}")
_MAX_INTERPOLATIONS = 16


class MissingSettingError(ConfigError):
    """A setting that has no default is not given."""


def compose_job(overrides: Sequence[str]) -> JobConfig:
    """Compose `configs/launch.yaml` with overrides such as `+exp=digits train.seed=1`.

    Args:
        overrides: Hydra's override syntax, in which a setting that is a text needs no quotes.

    Returns:
        The configuration, its places absolute; not yet validated across fields.

    Raises:
        UnknownMember: For no experiment, or an unknown one, or an unknown member of a group.
        ConfigError: For an unknown key, or a value of another type.
    """
    overrides = [word for given in overrides for word in split_range(given)]
    check_members(overrides)
    words = [parse_override(word, JobConfig) for word in overrides]
    chosen = [(word.key, word.value) for word in words if word.key in groups()]
    _check_files(chosen)
    _register_schema()
    try:
        composition = _compose(words)
        _check_interpolations(OmegaConf.to_container(composition, resolve=False))
        _rename(composition, typed={word.key for word in words})
        _fill_in(composition, overrides)
        values = _plain(composition)
    except (OmegaConfBaseException, RecursionError) as error:
        raise _refusal(chosen, error) from error
    return resolve_places(from_dict(JobConfig, values))


def parse_words(kind: type[C], overrides: Sequence[str]) -> C:
    """Read `key=value` words into a command's configuration dataclass.

    Raises:
        MissingSettingError: For a setting without a default that is not given.
        ConfigError: For a word that is not `key=value`, an unknown key, or a value that it cannot
            have.
    """
    values = OmegaConf.create(defaults(kind))
    for word in overrides:
        override = parse_override(word, kind)
        OmegaConf.update(values, override.key, override.value)
    try:
        if missing := OmegaConf.missing_keys(values):
            named = [name for name in defaults(kind) if name in missing]
            raise MissingSettingError(f"{' and '.join(named)} must be given")
        plain = _plain(values)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_paragraph(error)) from error
    return resolve_places(from_dict(kind, plain))


def _compose(words: Sequence[Override]) -> DictConfig:
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base="1.3"):
            return compose(config_name="launch", overrides=[word.for_hydra for word in words])
    # Hydra fails an assertion, or in any other way, on what it does not expect; the words of the
    # command line and the form of all files have been looked at.
    except Exception as error:
        raise _refusal([(word.key, word.value) for word in words], error) from error


def _refusal(chosen: Sequence[tuple[str, str]], error: Exception) -> ConfigError:
    reason = (
        "it is nested too deep"
        if isinstance(error, RecursionError)
        else _first_paragraph(error) or _first_paragraph(error.__cause__) or type(error).__name__
    )
    files = " ".join(f"{key}={value}" for key, value in chosen if key in groups())
    return ConfigError(f"the configuration cannot be composed from the files of {files}: {reason}")


# What OmegaConf raises for a document that is one value is an assertion's.
_UNREADABLE = (OmegaConfBaseException, yaml.YAMLError, AssertionError)
_HEADER = re.compile(r"\s*#\s*@")


def _check_files(chosen: Sequence[tuple[str, str]]) -> None:
    """Look at each file that Hydra will read before it does.

    Args:
        chosen: Groups and their members on the command line.

    Raises:
        ConfigError: One is no file of settings: it is no YAML within bounds, or asks Hydra for
            anything but members of groups.
    """
    waiting, seen = [("", "launch"), *chosen], set[tuple[str, str]]()
    while waiting:
        group, member = waiting.pop()
        if (group, member) in seen:
            continue
        seen.add((group, member))
        path = CONFIG_FOLDER / group / f"{member}.yaml"
        try:
            text = read_yaml_text(path)
            _check_header(text)
            waiting += _named(OmegaConf.create(text), group=group, member=member)
        except (OSError, ValueError, *_UNREADABLE) as error:
            reason = _first_paragraph(error) or "it is no mapping of settings"
            raise ConfigError(
                f"{path} is no file of settings: {reason}; mend it, or choose another"
            ) from error


def _check_header(text: str) -> None:
    """Refuse a file that would have Hydra put its settings elsewhere.

    Hydra takes for its header the comments with an @ at the file's top, and no others.

    Raises:
        DocumentError: There is such a header, or one that Hydra cannot read.
    """
    for line in filter(None, map(str.strip, text.splitlines())):
        if not _HEADER.match(line):
            return
        words = [word for word in line.lstrip("#").strip().split(" ") if word]
        if len(words) != 2:
            raise DocumentError(
                f"Hydra would take its comment {shown(line)} for a header; put that below the "
                "first setting, or leave out the @"
            )
        if words[0] == "@package" and words[1] != "_global_":
            raise DocumentError(f"it has a header other than '# @package _global_': {shown(line)}")


def _named(config: Any, *, group: str, member: str) -> list[tuple[str, str]]:
    """Return the members of groups that a file takes up.

    Raises:
        DocumentError: It takes up something else, or sets what is Hydra's.
    """
    values = OmegaConf.to_container(config, resolve=False)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise DocumentError("it is no mapping of settings")
    if "hydra" in values:
        raise DocumentError("it has settings of hydra, which are not those of a job")
    listed = values.get("defaults", [])
    beside = posixpath.dirname(posixpath.join("/", group, member))
    named = []
    for entry in listed if isinstance(listed, list) else [listed]:
        if entry in ("_self_", "schema"):
            continue
        text = f"{entry}"
        if isinstance(entry, dict) and len(entry) == 1:
            ((key, name),) = entry.items()
            text = f"{key}/{name}".removeprefix("override ")
        _, where, *rest = posixpath.join(beside, text).split("/", 2)
        if where not in groups() or not rest or rest[0] not in members(where):
            raise DocumentError(
                f"its defaults have {shown(entry)}, which is none of _self_, /exp/MEMBER and "
                f"override /GROUP: MEMBER, by the names of files under {CONFIG_FOLDER}"
            )
        named.append((where, rest[0]))
    return named


@cache
def _register_schema() -> None:
    schema = OmegaConf.create(defaults(JobConfig))
    for given_later in ("run", "home", *RENAMED):
        OmegaConf.update(schema, given_later, MISSING)
    ConfigStore.instance().store(name="schema", node=schema)


def _rename(composition: DictConfig, *, typed: Collection[str]) -> None:
    """Give what files call by an old name its new one, unless the command line has set that."""
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        holder = OmegaConf.select(composition, group) if group else composition
        if not isinstance(holder, DictConfig):
            continue  # a file has put a value in the place of the group, which is refused later
        if not OmegaConf.is_missing(holder, name):
            current_key(old, [new])
            if new not in typed:
                OmegaConf.update(composition, new, holder[name])
        with open_dict(holder):
            del holder[name]


def _fill_in(composition: DictConfig, overrides: Sequence[str]) -> None:
    """Set what has a default of its own where neither files nor command line give a value."""
    name = (experiment(overrides) or JobConfig.run).replace("/", "-")
    home = os.environ.get("LAPFLOW_HOME") or JobConfig.home
    for key, value in (("run", name), ("home", home)):
        if OmegaConf.is_missing(composition, key):
            composition[key] = value


def _plain(config: DictConfig) -> dict[str, Any]:
    unresolved = OmegaConf.to_container(config, resolve=False)
    assert isinstance(unresolved, dict)
    _check_interpolations(unresolved)
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _check_interpolations(config: Any) -> None:
    """Refuse what would read the environment, or anything but another setting, into a value.

    Raises:
        ConfigError: There is such a value; or so many values of others that they could grow without
            end, as each may hold others in turn.
    """
    count = 0
    for key, text in _texts(config):
        rest, found = _INTERPOLATION.subn("", text)
        count += found
        if "${" in rest:
            raise ConfigError(
                f"{key}={text[:200]} cannot be used: a configuration reads no environment and "
                "calls no resolvers, since it may be someone else's; only ${other.setting} is "
                f'replaced. Give the value on the command line: {key}="$VARIABLE"'
            )
        if count > _MAX_INTERPOLATIONS:
            raise ConfigError(
                f"{key}={text[:200]} cannot be used: a configuration takes at most "
                f"{_MAX_INTERPOLATIONS} values from other settings by ${{other.setting}}"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)
    elif isinstance(value, str):
        yield key, value


def _first_paragraph(error: BaseException | None) -> str:
    """Leave out what Hydra and OmegaConf tell of their own objects."""
    text = re.split(r"\n\n|\n +(?:full_key|object_type)", str(error).strip())[0]
    return " ".join(text.split())
