"""Hydra: YAML files and command-line overrides composed into one configuration.

The only place that knows Hydra. Nothing in a configuration is ever instantiated by name: Hydra
gives plain values, and `trainer.schema` turns them into dataclasses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.schema import ConfigError, JobConfig, defaults, from_dict, unknown_key

# Settings of DeepSpeed's own, which it checks itself: +engine.deepspeed.KEY=VALUE
_FREE = "engine.deepspeed."


class MissingSettingError(ConfigError):
    """A setting that has no default is not given."""


CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def composed(overrides: Sequence[str]) -> JobConfig:
    """Compose `configs/launch.yaml` with overrides such as `+exp=digits train.seed=1`.

    Args:
        overrides: Hydra's override syntax.

    Returns:
        The configuration; not yet validated across fields.

    Raises:
        ConfigError: For an unknown experiment, member or key, or a value of another type.
    """
    if _experiment(overrides) is None:
        raise ConfigError(f"no experiment is named: +exp=NAME, one of {', '.join(members('exp'))}")
    _register_schema()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base="1.3"):
            values = _plain(compose(config_name="launch", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error, overrides)) from error
    if values["run"] == JobConfig.run:
        values["run"] = _experiment(overrides) or values["run"]
    if values["home"] == JobConfig.home:
        values["home"] = os.environ.get("LAPFLOW_HOME", values["home"])
    return from_dict(JobConfig, values)


def settings(kind: type[Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words into plain values nested like a configuration dataclass.

    Raises:
        MissingSettingError: For a setting without a default that is not given.
        ConfigError: For a word that is not `key=value`, or an unknown key.
    """
    known = defaults(kind)
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not of the form key=value")
        if not _fits(key, _leaves(known)):
            raise ConfigError(unknown_key(key, _leaves(known)))
    try:
        merged = OmegaConf.merge(OmegaConf.create(known), OmegaConf.from_dotlist(list(overrides)))
        if missing := OmegaConf.missing_keys(merged):
            named = [name for name in _leaves(known) if name in missing]
            raise MissingSettingError(f"{' and '.join(named)} must be given")
        return _plain(merged)
    except OmegaConfBaseException as error:
        # The lines after the first tell of OmegaConf's own objects.
        raise ConfigError(str(error).strip().partition("\n")[0]) from error


def members(group: str) -> list[str]:
    """List the members of a configuration group, those of its folders as `folder/name`."""
    folder = CONFIG_FOLDER / group
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in found)


@cache
def _register_schema() -> None:
    ConfigStore.instance().store(name="schema", node=defaults())


def _plain(config: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _experiment(overrides: Sequence[str]) -> str | None:
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "exp":
            return value.replace("/", "-")
    return None


def _explained(error: Exception, overrides: Sequence[str]) -> str:
    """Say in one paragraph which override is wrong and what would be right."""
    known = _leaves(defaults())
    for override in overrides:
        key, _, value = override.partition("=")
        bare = key.lstrip("+~")
        folder = CONFIG_FOLDER / bare
        if folder.is_dir() and not (folder / f"{value}.yaml").is_file():
            return f"there is no {bare}={value}; configs/{bare} has {', '.join(members(bare))}"
        if bare == "exp" and not key.startswith("+"):
            return f"write +exp={value}: an experiment is added to the configuration"
        if not folder.is_dir() and not _fits(bare, known):
            siblings = [name for name in known if name.split(".")[0] == bare.split(".")[0]]
            return unknown_key(bare, siblings or sorted({name.split(".")[0] for name in known}))
        if not folder.is_dir() and key.startswith("+") and not bare.startswith(_FREE):
            return f"{key}={value}: this setting exists, so write it without +: {bare}={value}"
    return " ".join(str(error).split())


def _fits(key: str, known: Sequence[str]) -> bool:
    return key.startswith(_FREE) or any(name == key or name.startswith(f"{key}.") for name in known)


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            names += _leaves(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names
