"""Hydra: YAML files and command-line overrides composed into one configuration.

The only place that knows Hydra. Nothing in a configuration is ever instantiated by name: Hydra
gives plain values, and `trainer.config.job` turns them into dataclasses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from trainer.config.groups import CONFIG_FOLDER, check_members, experiment, groups
from trainer.config.job import JobConfig
from trainer.config.overrides import Override, parse_override
from trainer.config.reading import ConfigError, defaults, from_dict
from trainer.config.renamed import RENAMED, current_key
from trainer.config.settings import MISSING
from trainer.config.written_paths import resolve_places

C = TypeVar("C")

# The value of another setting; what could read the environment is none.
_INTERPOLATION = re.compile(r"\$\{[\w.]+\}")


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
    check_members(overrides)
    words = [parse_override(word, JobConfig) for word in overrides]
    _register_schema()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base="1.3"):
            composition = compose(
                config_name="launch", overrides=[word.for_hydra for word in words]
            )
        _rename(composition, typed={word.key for word in words})
        _fill_in(composition, overrides)
        values = _plain(composition)
    except ConfigError:
        raise
    except (
        *(HydraException, OmegaConfBaseException, yaml.YAMLError),
        # What the YAML reader does not expect: no text, long numbers, what is nested without end.
        *(ValueError, RecursionError),
    ) as error:
        # The command line has been read before.
        reason = (
            "it is nested too deep"
            if isinstance(error, RecursionError)
            else _first_paragraph(error) or _first_paragraph(error.__cause__)
        )
        raise ConfigError(
            "the configuration cannot be composed from the files of "
            f"{' '.join(_file_words(words))}: {reason}"
        ) from error
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


def _file_words(words: Sequence[Override]) -> list[str]:
    """Return the words that name files."""
    return [word.for_hydra for word in words if word.key in ("exp", *groups())]


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


def _check_interpolations(value: Any, key: str = "") -> None:
    """Refuse what would read the environment, or anything but another setting, into a value."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            _check_interpolations(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for each in value:
            _check_interpolations(each, key)
    elif isinstance(value, str) and "${" in _INTERPOLATION.sub("", value):
        raise ConfigError(
            f"{key}={value} cannot be used: a configuration reads no environment and calls no "
            "resolvers, since it may be someone else's; only ${other.setting} is replaced. Give "
            f'the value on the command line: {key}="$VARIABLE"'
        )


def _first_paragraph(error: BaseException | None) -> str:
    """Leave out what Hydra and OmegaConf tell of their own objects."""
    text = re.split(r"\n\n|\n +(?:full_key|object_type)", str(error).strip())[0]
    return " ".join(text.split())
