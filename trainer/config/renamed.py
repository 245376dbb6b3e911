"""Settings that have another name now: the old one is understood for one release.

Words of a command line and experiment files that use an old name are told the new one; settings
that old runs have recorded are read without a word. A setting that is fingerprinted keeps its name,
as the fingerprint tells MLflow which run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

logger = logging.getLogger(__name__)

RENAMED: Mapping[str, str] = {
    "loader.max_bad_share": "loader.max_bad_fraction",
}
"""Old keys of `JobConfig` and what they are called now."""


def current_key(key: str, known: Collection[str]) -> str:
    """Return what a setting that somebody wrote is called now, and tell them.

    Args:
        key: What they wrote.
        known: The settings that there are.
    """
    new = RENAMED.get(key, key)
    if key in known or new not in known:
        return key
    logger.warning("%s is called %s now; the old name goes with the next release", key, new)
    return new


def with_current_names(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return recorded settings under the names that they have now; a new name goes first.

    Args:
        values: Plain values, nested as in a configuration.
        path: Key of `values` in the whole configuration, and a dot.
    """
    result = dict(values)
    for old, new in RENAMED.items():
        if not (old.startswith(path) and new.startswith(path)):
            continue
        *groups, name = old.removeprefix(path).split(".")
        holder = _copy_group(result, groups)
        if holder is None or name not in holder:
            continue
        value = holder.pop(name)
        *groups, name = new.removeprefix(path).split(".")
        if (holder := _copy_group(result, groups)) is not None:
            holder.setdefault(name, value)
    return result


def _copy_group(values: dict[str, Any], groups: list[str]) -> dict[str, Any] | None:
    """Return the group of that name, copied so that it may be changed; None if there is none."""
    for group in groups:
        if not isinstance(values.get(group), Mapping):
            return None
        values[group] = dict(values[group])
        values = values[group]
    return values
