"""Deleting the checkpoints of a run that are not kept, or showing which these are."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trainer.byte_size import format_bytes
from trainer.checkpoint.inventory import Clearance, Inventory
from trainer.checkpoint_command.retained import RetentionSettings, retained_checkpoints
from trainer.checkpoint_command.table import table
from trainer.command import Outcome


@dataclass(frozen=True, kw_only=True)
class PruneConfig(RetentionSettings):
    """What to keep, and whether to delete the rest.

    Attributes:
        yes: Delete; otherwise only show.
    """

    yes: bool = False


def prune_checkpoints(config: PruneConfig) -> Outcome:
    """Show what can be deleted of a run, or delete it.

    Raises:
        ConfigError: If there is no run, or no checkpoint of it.
        StoreError: If the store fails; what is left over can go at the next time.
    """
    shown = retained_checkpoints(config)
    clearance, sizes = shown.clearance, shown.inventory.sizes
    shown_table = table(
        shown.entries, features=shown.features, gone="deleted" if config.yes else "to be deleted"
    )
    going = (*clearance.manifests, *clearance.content)
    freed = f"{format_bytes(sum(sizes[key] for key in going))} of "
    freed += format_bytes(sum(sizes.values()))
    what = _counted(len(clearance.expired), "checkpoint")
    if left := _left_behind(shown.inventory, clearance):
        what += f" and {_counted(left, 'object')} that no checkpoint uses"
    policy = " ".join(f"{key}={value}" for key, value in asdict(config.policy).items())
    lines = [shown_table, "", f"kept by {policy}", *shown.notes]
    if config.yes:
        swept = shown.place.catalogue.clear(clearance)
        uploads = f", and {_counted(swept, 'unfinished upload')}" if swept else ""
        lines.append(f"deleted {what}{uploads}: {freed} freed")
    elif going:
        lines.append(f"would delete {what}: frees {freed}")
        lines.append("nothing was deleted; add yes=true to delete it")
    else:
        lines.append("there is nothing to delete")
    return Outcome("\n".join(lines))


def _left_behind(inventory: Inventory, clearance: Clearance) -> int:
    """Count the objects to delete that are no part of a checkpoint that expires."""
    own = {
        entry.key
        for images in clearance.expired
        if images in inventory.manifests
        for entry in inventory.manifests[images].objects
    }
    return len(set(clearance.content) - own)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
