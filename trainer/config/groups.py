"""The groups under `configs/` and their members, by the names of their files alone.

Nothing heavy is imported, so that a name that does not exist is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.addresses import may_carry_credentials, quote_address

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"


class UnknownMember(ValueError):
    """No experiment is named, or a group has no such member."""


def members(group: str) -> list[str]:
    """List the members of a configuration group, those of its folders as `folder/name`."""
    folder = CONFIG_FOLDER / group
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in found)


def groups() -> list[str]:
    """List the groups: the folders under `configs/`."""
    return sorted(path.name for path in CONFIG_FOLDER.iterdir() if path.is_dir())


def experiment(overrides: Sequence[str]) -> str | None:
    """Return the experiment that the command line names."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "exp":
            return value
    return None


def check_members(overrides: Sequence[str], *, several: bool = False) -> None:
    """Refuse a command line that names no experiment, or a member that is not there.

    Args:
        overrides: The words.
        several: Whether a word may have several members, separated by commas, or a `glob(…)`.

    Raises:
        UnknownMember: With the members that there are.
    """
    if experiment(overrides) is None:
        raise UnknownMember(
            f"no experiment is named: +exp=NAME, one of {', '.join(members('exp'))}"
        )
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+")
        if group not in groups():
            continue
        names = [each.strip() for each in value.split(",")] if several else [value]
        is_function = several and "(" in value
        if not is_function and (unknown := [each for each in names if each not in members(group)]):
            told = quote_address(value) if may_carry_credentials(value) else unknown[0]
            raise UnknownMember(
                f"there is no {group}={told}; configs/{group} has {', '.join(members(group))}"
            )
        if group == "exp" and key != "+exp":
            raise UnknownMember(f"write +exp={value}: an experiment is added to the configuration")
        if group not in ("exp", key):
            raise UnknownMember(f"write {group}={value}, without {key.removesuffix(group)}")
