"""The list of a run's checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trainer.byte_size import format_bytes
from trainer.checkpoint_command.retained import RetentionSettings, retained_checkpoints
from trainer.checkpoint_command.table import STATES, Entry, table
from trainer.command import Outcome


@dataclass(frozen=True, kw_only=True)
class ListConfig(RetentionSettings):
    """What to list.

    Attributes:
        json: Print plain values for machines.
    """

    json: bool = False


def list_checkpoints(config: ListConfig) -> Outcome:
    """List the checkpoints of a run.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails.
    """
    shown = retained_checkpoints(config)
    newest = shown.inventory.newest_valid
    resume_from = None if newest is None else shown.place.catalogue.uri(newest.images)
    total = sum(shown.inventory.sizes.values())
    if config.json:
        values = {
            "run": shown.place.uri,
            "resume_from": resume_from,
            "size_bytes": total,
            "features": shown.features,
            "policy": asdict(config.policy),
            "checkpoints": [each.to_dict() for each in shown.entries],
        }
        return Outcome(json.dumps(values, indent=2))
    lines = [
        table(shown.entries, features=shown.features),
        "",
        f"{_counts(shown.entries)}, {format_bytes(total)} in all",
        f"resume from {resume_from}" if resume_from else "there is nothing to resume from",
        *shown.notes,
    ]
    return Outcome("\n".join(lines))


def _counts(listed: Sequence[Entry]) -> str:
    found = Counter(each.state for each in listed)
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])
